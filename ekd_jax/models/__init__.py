"""Networks of the model families, each as a stem and a branch.

All students of a run share one stem (the common base) and differ in their
branch. A branch returns `Outputs`; `Network` joins the two into the ordinary
module that a student is when it is taken alone.
"""

from ekd_jax.models.network import Network as Network
from ekd_jax.models.network import Outputs as Outputs
from ekd_jax.models.own import OwnFamily as OwnFamily
from ekd_jax.models.resnet import CifarResNet as CifarResNet
