"""Which backend runs an operation: the one that was asked for, or the first that can."""

import contextlib
import contextvars
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax

log = logging.getLogger(__name__)

Implementation = Literal["mosaic_gpu", "mosaic_tpu", "xla"]

_PREFERENCE: dict[str, tuple[str, ...]] = {
    "gpu": ("mosaic_gpu", "xla"),
    "tpu": ("mosaic_tpu", "xla"),
    "cpu": ("xla",),
}


_BY_XLA: contextvars.ContextVar[bool] = contextvars.ContextVar("by_xla", default=False)

_TARGET: contextvars.ContextVar[tuple[str, str | None] | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def compiling_for(platform: Literal["gpu", "tpu", "cpu"], *, kind: str | None = None) -> Iterator[None]:
    """Choose backends as on `platform`, and block sizes as on a device of `kind`, for programs that run elsewhere.

    `kind` is what jax calls the device (`Device.device_kind`); by default this process's own is taken.
    """
    token = _TARGET.set((platform, kind))
    try:
        yield
    finally:
        _TARGET.reset(token)


@contextlib.contextmanager
def by_xla() -> Iterator[None]:
    """Let XLA compute what is traced inside and names no backend: only that is differentiated, or divided by a mesh."""
    token = _BY_XLA.set(True)
    try:
        yield
    finally:
        _BY_XLA.reset(token)


def platform() -> str:
    """Give the platform that backends are chosen for: this process's, unless something is compiled for another."""
    target = _TARGET.get()
    return jax.default_backend() if target is None else target[0]


def device_kind() -> str:
    """Give the kind of device that block sizes are chosen for, as jax names it."""
    target = _TARGET.get()
    return jax.devices()[0].device_kind if target is None or target[1] is None else target[1]


def is_hopper() -> bool:
    """Say whether programs are for Hopper GPUs: this process has them, or something is compiled for a GPU elsewhere."""
    if (target := _TARGET.get()) is not None:
        return target[0] == "gpu"
    return jax.default_backend() == "gpu" and getattr(jax.devices()[0], "compute_capability", "") == "9.0"


def refuse_other_gpus() -> None:
    """Raise NotImplementedError on a GPU that the kernels are not for; a machine without any may compile for one."""
    if jax.default_backend() == "gpu" and not is_hopper():
        raise NotImplementedError(f"the GPU kernel is for Hopper, not {jax.devices()[0].device_kind}")


def call(
    op: str,
    backends: Mapping[str, Callable[..., Any]],
    implementation: Implementation | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run `op` on `implementation`, or on the platform's preferred backend that supports the case.

    A backend says that it cannot do a case by raising `NotImplementedError` while it is traced. The one that is taken
    is told to this module's log, at level debug.

    Raises:
        ValueError: `implementation` is not the name of a backend.
        NotImplementedError: The backend that was asked for does not exist for this operation or cannot do this case.
        ExceptionGroup: No backend can; holds what each one said.
    """
    if implementation is not None:
        if implementation not in ("mosaic_gpu", "mosaic_tpu", "xla"):
            raise ValueError(f"{op}: implementation must be mosaic_gpu, mosaic_tpu or xla, got {implementation!r}")
        if implementation not in backends:
            raise NotImplementedError(f"{op} has no {implementation} backend; it has {', '.join(backends)}")
        return backends[implementation](*args, **kwargs)
    refusals = []
    for name in ("xla",) if _BY_XLA.get() else _PREFERENCE.get(platform(), ("xla",)):
        if name in backends:
            try:
                result = backends[name](*args, **kwargs)
            except NotImplementedError as refusal:
                refusals.append(refusal)
            else:
                log.debug("%s by %s", op, name)
                return result
    raise ExceptionGroup(f"no backend can run this {op}", refusals)
