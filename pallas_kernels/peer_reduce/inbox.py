"""Where devices write each other's partial results: memory that lives as long as what runs on it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.packing import SIDE

FLAG_ROWS = 8
"""Rows that a flag stands for, of `SIDE` columns or of all coordinates."""

_TILES = (FLAG_ROWS, 16, 32, 64)
"""Rows that a product writes at a time."""


class PeerLostError(RuntimeError):
    """A device waited in vain for another one's part of a sum."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Inbox:
    """One device's inbox for the parts of P devices, for sums of up to M rows and N columns and 64 coordinates.

    `y` [2, P, M, N] and `z` [2, P, M, 64] are float32: what device p sent for sum g lies in place [g % 2, p]. Two
    places are enough, with no barrier behind a sum: a device that sends for sum g + 2 has seen everybody's parts of
    g + 1, which each sent after it was done with g. `flags` [2, P, F] int32 hold the number of the sum that was last
    sent, one for each part that is sent by itself; `generation` [1] int32 is the number of the next sum, from 1 on, the
    same on all devices at the same point of the program. `fault` [4] int32 is zero, or says who was waited for in vain:
    1, the sum's number, and the device that it waited for.

    An inbox may never move while others write into it: it is a donated argument of a program and a result of it, with
    the sharding of results given to `jax.jit` (else XLA may pair it with another result and copy it), in a `while_loop`
    a part of what is carried. All are ready before the first program starts. Every device runs the same sums in the
    same order. Made by `empty_inbox`; under `shard_map` each device has its own.
    """

    y: Any
    z: Any
    flags: Any
    generation: Any
    fault: Any

    @property
    def devices(self) -> int:
        """Devices that write here, P."""
        return self.y.shape[1]

    def check(self) -> None:
        """Wait for what is running, and raise where a device was lost; for the inboxes of all devices, stacked.

        Raises:
            PeerLostError: Names the kernel, the sum, and both devices.
        """
        faults = np.asarray(jax.device_get(self.fault)).reshape(-1, 4)
        for waiting, (failed, generation, lost, _) in enumerate(faults):
            if failed:
                raise PeerLostError(
                    f"peer_reduce: device {waiting} waited in vain for the part of device {lost} of sum {generation}"
                )


def empty_inbox(*, devices: int, rows: int, columns: int) -> Inbox:
    """Make one device's inbox, with room for whole tiles of rows.

    Raises:
        ValueError: A size cannot be.
    """
    if devices < 2 or rows < 1 or columns < 1:
        raise ValueError(
            f"an inbox is for at least 2 devices, 1 row and 1 column, got devices={devices}, rows={rows},"
            f" columns={columns}"
        )
    tile = next((tile for tile in _TILES if tile >= rows), _TILES[-1])
    rows = -(-rows // tile) * tile
    flags = rows // FLAG_ROWS * (-(-columns // SIDE) + 1)
    return Inbox(
        y=jnp.zeros((2, devices, rows, columns), jnp.float32),
        z=jnp.zeros((2, devices, rows, SIDE), jnp.float32),
        flags=jnp.zeros((2, devices, flags), jnp.int32),
        generation=jnp.ones(1, jnp.int32),
        fault=jnp.zeros(4, jnp.int32),
    )
