"""Pure mathematics of rounding a weight to int4: no model, no data, one module or a stack of layers at a time.

A problem is a weight [*L, N, K] and the second moment `R = E[x x^T]` [*L, K, K] of the inputs it meets; the error of a
row `e` is `e R e^T`, its share of the mean squared error of the module's output. From weak to strong:

    grid = min_max_grid(weight, spec)                    # round_to_nearest of spear_jax.quant
    grid = search_scales(weight, moment, spec)           # or learn_clip
    rounded = gptq(weight, moment, grid)                 # or gptq_search
    rounded = refine(weight, moment, rounded)
    tensor = rounded.to_tensor()
"""

from calibrate.solvers.awq import scale_channels, search_channel_scales
from calibrate.solvers.clip import learn_clip, search_scales
from calibrate.solvers.gptq import gptq, gptq_search, refine
from calibrate.solvers.grid import Grid, Rounded, min_max_grid, round_to_grid, row_error

__all__ = [
    "Grid",
    "Rounded",
    "gptq",
    "gptq_search",
    "learn_clip",
    "min_max_grid",
    "refine",
    "round_to_grid",
    "row_error",
    "scale_channels",
    "search_channel_scales",
    "search_scales",
]
