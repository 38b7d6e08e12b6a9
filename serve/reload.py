"""Go on with another checkpoint of the same architecture, between two steps."""

import logging
import threading
import time

from rich.console import Console

from serve.config import ServeConfig
from serve.gateway import Gateway

log = logging.getLogger(__name__)


class Reloader:
    """Reads the model again in a thread when it is called, and hands it to the engine, if it can go on with it.

    Whatever is wrong with it, the model that is served stays. Answers that are being generated go on: what the cache
    holds of them was computed by the weights before.
    """

    def __init__(self, config: ServeConfig, gateway: Gateway):
        self._config = config
        self._gateway = gateway
        self._thread: threading.Thread | None = None

    def __call__(self) -> None:
        """Begin, unless the model is being read already or was never ready."""
        if self._gateway.engine is None or (self._thread is not None and self._thread.is_alive()):
            log.warning("the model is being read already")
            return
        self._thread = threading.Thread(target=self._reload, name="reload", daemon=True)
        self._thread.start()

    def _reload(self) -> None:
        from serve.startup import Phases, load_prepared

        engine, model, metrics = self._gateway.engine, self._gateway.model, self._gateway.metrics
        assert engine is not None
        assert model is not None
        assert metrics is not None
        begin = time.monotonic()
        log.info("reading %s again", self._config.model)
        try:
            with Phases(Console(stderr=True)) as phases:
                prepared = load_prepared(self._config, phases)
            if prepared.tokenizer.backend_tokenizer.to_str() != model.tokenizer.backend_tokenizer.to_str():
                raise ValueError("its tokenizer is another one")
            engine.swap(prepared.model)
        except Exception as error:
            metrics.reloaded(taken=False)
            log.error("not taken, the model before is served on: %s", " ".join(str(error).split()) or repr(error))
            return
        metrics.reloaded(taken=True)
        log.info(
            "reloaded in %.1f s: the next step is by %s as it is now", time.monotonic() - begin, self._config.model
        )
