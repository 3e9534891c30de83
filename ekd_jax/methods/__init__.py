"""Training methods, one file each, behind one interface (`Method`)."""

from ekd_jax.methods.dml import dml as dml
from ekd_jax.methods.ekd import ekd as ekd
from ekd_jax.methods.ffl import ffl as ffl
from ekd_jax.methods.ffsd import ffsd as ffsd
from ekd_jax.methods.interface import AXIS_NAME as AXIS_NAME
from ekd_jax.methods.interface import Method as Method
from ekd_jax.methods.interface import Student as Student
from ekd_jax.methods.pcl import mean_decay as mean_decay
from ekd_jax.methods.pcl import pcl as pcl
from ekd_jax.methods.pcl import ramp_up_as_coded as ramp_up_as_coded
from ekd_jax.methods.solo import solo as solo
