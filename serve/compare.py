"""Two engines behind one gateway, to compare: the model, and the same without its error compensators."""

from serve.engine import Engine
from serve.latency import LatencyTable
from serve.request import Request
from spear_jax.evaluation.comparison import without_compensators
from spear_jax.models.decoder import Decoder


class ComparedEngines:
    """Looks like an engine; requests that are `bare` go to the one whose model has no compensators.

    The models share their weights. Each engine has slots and a cache of its own, and they take turns on the device, so
    that neither is as fast as alone.
    """

    def __init__(self, full: Engine, bare: Engine):
        self._full, self._bare = full, bare

    def submit(self, request: Request) -> None:
        """Hand over a request. Thread-safe."""
        self._of(request).submit(request)

    def abort(self, request: Request) -> None:
        """Forget a request. Thread-safe."""
        self._of(request).abort(request)

    def abort_all(self) -> None:
        """End every request with an error and take no more. Thread-safe."""
        self._full.abort_all()
        self._bare.abort_all()

    def swap(self, model: Decoder) -> None:
        """Go on with another model of the same architecture. Thread-safe.

        Raises:
            ValueError: It is another one; says what differs.
        """
        self._full.swap(model)
        self._bare.swap(without_compensators(model))

    def stop(self, *, timeout: float) -> bool:
        """End both threads; says whether they ended in `timeout` seconds each."""
        self.abort_all()
        full, bare = self._full.stop(timeout=timeout), self._bare.stop(timeout=timeout)
        return full and bare

    @property
    def table(self) -> LatencyTable | None:
        """What steps take now, as the one with compensators knows it."""
        return self._full.table

    @property
    def refuses(self) -> bool:
        """Whether requests whose limits cannot be kept are refused."""
        return self._full.refuses

    @property
    def failure(self) -> BaseException | None:
        """What ended one of them, or None."""
        return self._full.failure or self._bare.failure

    @property
    def alive(self) -> bool:
        """Whether both threads run."""
        return self._full.alive and self._bare.alive

    @property
    def seconds_since_beat(self) -> float:
        """Time since the one that has not answered for longer went round its loop."""
        return max(self._full.seconds_since_beat, self._bare.seconds_since_beat)

    def _of(self, request: Request) -> Engine:
        return self._bare if request.bare else self._full
