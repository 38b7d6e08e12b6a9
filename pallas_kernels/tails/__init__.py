"""What stands before an int4 product: the norm of a sum or a gated activation, and the compensator's coordinates."""

from pallas_kernels.tails.api import glu_project, rmsnorm_project
from pallas_kernels.tails.reference import Activation, rmsnorm

__all__ = ["Activation", "glu_project", "rmsnorm", "rmsnorm_project"]
