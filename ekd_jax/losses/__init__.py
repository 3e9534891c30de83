"""Distillation losses: pure functions of arrays, with nothing to configure.

Every loss takes raw logits or feature maps, works in float32 and in log space
whatever comes in, keeps the batch (only `ekd_loss`, `ffl_loss` and `pcl_loss`
reduce it, to the scalar that is trained on) and says in its signature where
gradients stop. None of them knows about models or training loops, so they serve
any JAX program.
"""

from ekd_jax.losses._attention import (
  attention_loss,
  attention_map,
  diversity_loss,
  normalized_feature_loss,
  shifted_features,
)
from ekd_jax.losses._distillation import distillation_loss
from ekd_jax.losses._ekd import ekd_loss
from ekd_jax.losses._ensemble import ensemble_logits
from ekd_jax.losses._feature import feature_loss
from ekd_jax.losses._ffl import ffl_loss
from ekd_jax.losses._mutual import mutual_learning_loss
from ekd_jax.losses._pcl import pcl_loss
from ekd_jax.losses._ramp_up import ramp_up

__all__ = [
  "attention_loss",
  "attention_map",
  "distillation_loss",
  "diversity_loss",
  "ekd_loss",
  "ensemble_logits",
  "feature_loss",
  "ffl_loss",
  "mutual_learning_loss",
  "normalized_feature_loss",
  "pcl_loss",
  "ramp_up",
  "shifted_features",
]
