"""Which backend runs an operation: the one that was asked for, or the first that can."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

Implementation = Literal["mosaic_gpu", "mosaic_tpu", "xla"]

_PREFERENCE: dict[str, tuple[str, ...]] = {
    "gpu": ("mosaic_gpu", "xla"),
    "tpu": ("mosaic_tpu", "xla"),
    "cpu": ("xla",),
}


def call(
    op: str,
    backends: Mapping[str, Callable[..., Any]],
    implementation: Implementation | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run `op` on `implementation`, or on the platform's preferred backend that supports the case.

    A backend says that it cannot do a case by raising `NotImplementedError` while it is traced.

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
    for name in _PREFERENCE.get(jax.default_backend(), ("xla",)):
        if name in backends:
            try:
                return backends[name](*args, **kwargs)
            except NotImplementedError as refusal:
                refusals.append(refusal)
    raise ExceptionGroup(f"no backend can run this {op}", refusals)
