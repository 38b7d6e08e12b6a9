"""Several processes, one on each host, that share a model or a training run by `jax.distributed`."""

import logging

import jax
import numpy as np

log = logging.getLogger(__name__)

_JOIN_SECONDS = 600
"""How long processes wait for one another at the start."""

_HEARTBEAT_SECONDS = 60


def check_processes(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Refuse settings of processes that do not fit together.

    Raises:
        ValueError: Says what is missing.
    """
    if coordinator in (None, "auto"):
        if (num_processes, process_id) != (None, None):
            raise ValueError("num_processes and process_id need a coordinator, as HOST:PORT of process 0")
    elif num_processes is None or process_id is None or not 0 <= process_id < num_processes:
        raise ValueError(f"process_id must be from 0 to num_processes - 1, got {process_id} of {num_processes}")


def join(coordinator: str, *, num_processes: int | None, process_id: int | None) -> bool:
    """Make this process one of several, before anything else is done with JAX; gives whether there are others.

    `coordinator` is HOST:PORT of process 0; `auto` finds it, and the rest, on a Cloud TPU, under SLURM and Open MPI.

    Raises:
        ValueError: The others cannot be reached.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            None if coordinator == "auto" else coordinator,
            num_processes,
            process_id,
            initialization_timeout=_JOIN_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the processes of coordinator {coordinator} cannot meet: {reason}") from None
    log.info("process %d of %d, %d devices here", jax.process_index(), jax.process_count(), jax.local_device_count())
    return jax.process_count() > 1


def least_of_all(value: int) -> int:
    """Give the least value of all processes, each of which must call it."""
    if jax.process_count() == 1:
        return value
    from jax.experimental.multihost_utils import process_allgather

    return int(np.min(np.asarray(process_allgather(np.int32(value)))))
