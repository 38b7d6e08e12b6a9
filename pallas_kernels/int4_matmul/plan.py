"""How an int4 product is cut up for Hopper."""

import dataclasses
import math

from pallas_kernels.int4_matmul.fragments import CODE_ROWS
from pallas_kernels.packing import SIDE

_MOST_BLOCKS = 256 // CODE_ROWS
"""Blocks of 64 columns in a copy: the copy engine takes 256 lines."""

_WARPGROUP = 128
_MOST_THREADS = 1024
MOST_PROJECTED_ROWS = 64
"""Rows of x up to which a product computes the coordinates of its compensator itself."""

RATIONED_ROWS = 128
"""Rows of x in a tile from which on the computing warpgroups get registers of the feeding one."""

FEEDER_REGISTERS = 40
"""Registers that a thread of the feeding warpgroup then keeps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HopperConfig:
    """How a product is cut up.

    `tile_m` rows of x a block takes (a multiple of 8, at most 256); `row_tiles` warpgroups side by side, 64 output
    channels each; `k_parts` warpgroups and `splits` blocks of a cluster that share K; `blocks` of 64 columns in a step,
    which one copy brings and which are converted one by one, each while the one before is multiplied;
    `slots` steps that are in shared memory or on the way there; `overlap` lets the kernel start while the one before it
    still runs.
    """

    tile_m: int
    row_tiles: int = 1
    k_parts: int = 1
    splits: int = 1
    blocks: int = 2
    slots: int = 4
    overlap: bool = True

    def check(self, *, n: int, k: int, groups: int, projected: bool = False, paired: bool = False) -> None:
        """Raise NotImplementedError where a weight [n, k] with so many groups of columns cannot be cut up like this.

        `projected` says that coordinates are computed along with the product, `paired` that tiles belong together.
        """
        if (self.row_tiles + projected) * self.k_parts * _WARPGROUP + _WARPGROUP > _MOST_THREADS:
            raise NotImplementedError(f"{self.row_tiles} tiles x {self.k_parts} parts take more than 1,024 threads")
        if projected and self.tile_m > MOST_PROJECTED_ROWS:
            raise NotImplementedError(f"coordinates are for up to {MOST_PROJECTED_ROWS} rows, got {self.tile_m}")
        if paired and self.row_tiles % 2:
            raise NotImplementedError(f"paired tiles go two by two into a block, got row_tiles={self.row_tiles}")
        if self.tile_m % 8 or not 8 <= self.tile_m <= 256:
            raise NotImplementedError(f"tile_m must be a multiple of 8 up to 256, got {self.tile_m}")
        if self.blocks > _MOST_BLOCKS:
            raise NotImplementedError(f"a copy brings {_MOST_BLOCKS} blocks at most, got {self.blocks}")
        if n % (SIDE * self.row_tiles):
            raise NotImplementedError(f"{n} output channels are no multiple of {self.row_tiles} tiles of {SIDE}")
        share = SIDE * self.k_parts * self.splits * self.blocks
        if k % share:
            raise NotImplementedError(f"{k} columns are no multiple of {share}: 64 x k_parts x splits x blocks")
        step, group = SIDE * self.blocks, k // groups
        if groups > 1 and any(size % group and group % size for size in (step, SIDE)):
            raise NotImplementedError(f"groups of {group} columns, blocks of {SIDE}, steps of {step}: no multiples")

    @property
    def parts(self) -> int:
        """Pieces that K is cut into."""
        return self.k_parts * self.splits

    @property
    def reducers(self) -> int:
        """Blocks of a cluster that sum partial results, each for tile_m / reducers rows of x."""
        return math.gcd(self.splits, self.tile_m // 8)
