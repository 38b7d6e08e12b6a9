"""One model over several hosts, by `jax.distributed`: process 0 decides and tells, the others do the same calls.

Every process builds the same runner. Process 0 has HTTP, engine and scheduler; each call that the engine makes of its
runner goes to the others first, by name with its arguments, so that all enqueue the same programs in the same order.
That is all that travels between hosts beside what XLA's collectives do. Who hears nothing of another for
`LOST_SECONDS`, or finds its connection closed, says which process it was and ends: the group ends as a whole, and is
started again as one.
"""

import contextlib
import dataclasses
import hashlib
import logging
import os
import queue
import secrets
import socket
import threading
import types
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import jax
import numpy as np

from serve.config import ServeConfig

log = logging.getLogger(__name__)

LOST_SECONDS = 10.0
"""Silence after which a process counts as lost. Each says something once a second."""

_ADDRESS_BYTES = 256
_LOST_STATUS = 3

type Leave = Callable[[str], None]


class Group:
    """Connections between process 0 and the others, watched by threads of their own."""

    def __init__(self, connections: dict[int, Connection], *, leave: Leave | None = None):
        self._connections = connections
        self._locks = {process: threading.Lock() for process in connections}
        self._leave = leave or _leave
        self._ending = threading.Event()
        self.calls: queue.SimpleQueue[tuple[str, tuple[Any, ...], dict[str, Any]] | None] = queue.SimpleQueue()
        """What process 0 said to do; None for the end."""
        for process in connections:
            for work in (self._listen, self._beat):
                threading.Thread(target=work, args=(process,), name=f"process {process}", daemon=True).start()

    @property
    def leads(self) -> bool:
        """Whether this is process 0."""
        return jax.process_index() == 0

    def tell(self, message: Any) -> None:
        """Send a message to all others."""
        for process in self._connections:
            self._send(process, message)

    def end(self) -> None:
        """Tell the others to end, and stop to watch them."""
        self._ending.set()
        self.tell(("end", None))

    def _send(self, process: int, message: Any) -> None:
        try:
            with self._locks[process]:
                self._connections[process].send(message)
        except OSError as error:
            self._lose(process, type(error).__name__)

    def _beat(self, process: int) -> None:
        while not self._ending.wait(1.0):
            self._send(process, ("beat", None))

    def _listen(self, process: int) -> None:
        connection = self._connections[process]
        try:
            while connection.poll(LOST_SECONDS):
                kind, content = connection.recv()
                if kind == "call":
                    self.calls.put(content)
                elif kind == "end":
                    self._ending.set()
                    self.calls.put(None)
                    return
                elif kind == "lost":
                    self._lose(content, "as process 0 says")
            self._lose(process, f"silent for {LOST_SECONDS:.0f} s")
        except (EOFError, OSError) as error:
            self._lose(process, type(error).__name__)

    def _lose(self, process: int, reason: str) -> None:
        if self._ending.is_set():
            return
        self._ending.set()
        if self.leads:
            for other in self._connections.keys() - {process}:
                with contextlib.suppress(OSError), self._locks[other]:
                    self._connections[other].send(("lost", process))
        self._leave(
            f"process {process} of {jax.process_count()} was lost ({reason}): this process ends; start all again"
        )


def _leave(message: str) -> None:
    """End at once: what runs on the devices waits for the lost process and cannot be stopped."""
    log.error(message)
    logging.shutdown()
    os._exit(_LOST_STATUS)


def connect() -> Group:
    """Connect process 0 with the others; all must call it at the same time."""
    from jax.experimental import multihost_utils

    leads = jax.process_index() == 0
    secret = secrets.token_bytes(32)
    listener = Listener(("", 0), authkey=secret) if leads else None
    port = listener.address[1] if listener is not None else 0
    said = f"{port} {secret.hex()} {_own_address()}".encode()[:_ADDRESS_BYTES]
    heard = multihost_utils.broadcast_one_to_all(np.frombuffer(said.ljust(_ADDRESS_BYTES), np.uint8))
    if listener is not None:
        with listener:
            connections = {}
            for _ in range(jax.process_count() - 1):
                connection = listener.accept()
                connections[connection.recv()] = connection
        return Group(connections)
    port_, secret_, address = bytes(np.asarray(heard)).decode().split()
    connection = Client((address, int(port_)), authkey=bytes.fromhex(secret_))
    connection.send(jax.process_index())
    return Group({0: connection})


def _own_address() -> str:
    """Give an address of this host that others reach: the one it would itself use to go out."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"


def led[R](runner: R, group: Group) -> R:
    """Give process 0's runner as one of which each call of a public method is told to the others, then made here."""

    def told(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            group.tell(("call", (name, args, kwargs)))
            return method(*args, **kwargs)

        return call

    found = {name: getattr(runner, name) for name in dir(runner) if not name.startswith("_")}
    own = {name: told(name, value) if callable(value) else value for name, value in found.items()}
    return types.SimpleNamespace(**own)  # type: ignore[return-value]


def follow(runner: Any, group: Group) -> None:
    """Make the calls that process 0 tells of, until it says that it ends."""
    while (call := group.calls.get()) is not None:
        name, args, kwargs = call
        getattr(runner, name)(*args, **kwargs)


def check_same(config: ServeConfig) -> None:
    """Refuse to go on where processes were started with different settings.

    Raises:
        ValueError: Names the processes.
    """
    from jax.experimental import multihost_utils

    shared = dataclasses.replace(config, process_id=None, host="", port=0, coordinator="", compilation_cache="")
    own = np.frombuffer(hashlib.sha256(repr(shared).encode()).digest()[:8], np.uint32)
    all_of_them = np.asarray(multihost_utils.process_allgather(own))
    different = [i for i, digest in enumerate(all_of_them) if (digest != all_of_them[0]).any()]
    if different:
        raise ValueError(f"processes {different} were started with other settings than process 0")
