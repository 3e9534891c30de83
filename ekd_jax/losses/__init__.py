"""Distillation losses: pure functions of arrays, with nothing to configure.

Every loss takes raw logits or feature maps, works in float32 and in log space
whatever comes in, keeps the batch (only `ekd_loss` reduces it, to the scalar
that is trained on) and says in its signature where gradients stop. None of
them knows about models or training loops, so they serve any JAX program.
"""

from ekd_jax.losses._distillation import distillation_loss
from ekd_jax.losses._ekd import ekd_loss
from ekd_jax.losses._ensemble import ensemble_logits
from ekd_jax.losses._feature import feature_loss
from ekd_jax.losses._mutual import mutual_learning_loss

__all__ = [
  "distillation_loss",
  "ekd_loss",
  "ensemble_logits",
  "feature_loss",
  "mutual_learning_loss",
]
