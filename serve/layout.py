"""Weights in the order that the kernels of this process's accelerator read them in."""

from pallas_kernels.dispatch import is_hopper, platform
from serve.gpu import lay_out_for_hopper
from serve.tpu import lay_out_for_tpu
from spear_jax.models.decoder import Decoder


def lay_out(model: Decoder) -> Decoder:
    """Lay a model of int4 weights out for a TPU or a Hopper GPU, or give it back where neither is there."""
    if platform() == "tpu":
        return lay_out_for_tpu(model)
    return lay_out_for_hopper(model) if is_hopper() else model
