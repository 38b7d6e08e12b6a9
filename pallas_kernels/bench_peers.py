"""Time int4 products of other libraries, and cuBLAS, through PyTorch: a process of its own, without JAX.

`python -m pallas_kernels.bench` starts it. It reads cases (JSON) from stdin and writes one line of JSON for each to
stdout: microseconds and the relative error against float32, or why there are none.

How calls are timed: a CUDA graph of calls with weights that take turns, so that none is in the cache, replayed several
times between two events, over the number of calls; the median of that. Gaps between kernels count, as they do in
`timing.microseconds_in_a_row`, but not in `timing.kernel_microseconds`.
"""

import argparse
import collections
import dataclasses
import importlib
import itertools
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from pallas_kernels.shapes import copies

METHODS: dict[str, tuple[str, int]] = {
    "torch_bf16": ("torch", -1),
    "torch_int4pack_128": ("torch", 128),
    "humming_channel": ("humming", -1),
    "humming_128": ("humming", 128),
    "gemlite_128": ("gemlite", 128),
    "gemlite_channel": ("gemlite", -1),
}
"""What can be timed: its library, and the columns that share a scale (-1: all).

`torch_bf16` is cuBLAS on bfloat16 weights, `torch_int4pack_128` PyTorch's `_weight_int4pack_mm`, which has no scales of
whole channels.
"""

PEERS = {"torch": "torch", "humming": "humming-kernels", "gemlite": "gemlite"}
"""Libraries and the packages that they come in."""

_FEW_ROWS = 64
_TURNS = 20
"""Calls in a graph for few rows of x: the time of starting the graph is spread over them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A method, and a product of m rows of x with a weight [n, k] of a model."""

    method: str
    model: str
    weight: str
    m: int
    n: int
    k: int


def methods(names: Sequence[str]) -> list[str]:
    """Give the methods that names of libraries or methods stand for, each once.

    Raises:
        ValueError: A name is neither.
    """
    found: dict[str, None] = {}
    for name in names:
        meant = [method for method, (peer, _) in METHODS.items() if name in (method, peer)]
        if not meant:
            raise ValueError(f"no peer is called {name!r}: expected some of {', '.join([*PEERS, *METHODS])}")
        found |= dict.fromkeys(meant)
    return list(found)


def versions() -> dict[str, str]:
    """Give the versions of the libraries and of what they compile with, of those that are installed here."""
    found = {}
    for package in (*PEERS.values(), "triton"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def run(
    cases: Sequence[Case],
    *,
    seconds: float,
    deadline: float = float("inf"),
    options: Sequence[str] = (),
    python: str = sys.executable,
) -> Iterator[dict[str, Any]]:
    """Measure cases in another process, in order; give what was found, or why nothing was, as it comes.

    A case that takes longer than `seconds` (building weights and compiling included) or that ends the process costs
    itself alone: the rest go on in a new process. Nothing begins after `deadline` (of `time.monotonic`).
    """
    pending = list(cases)
    while pending and time.monotonic() < deadline:
        with _Child(pending, [python, "-m", "pallas_kernels.bench_peers", *options]) as child:
            while pending and (left := deadline - time.monotonic()) > 0:
                begin = time.monotonic()
                found, why = child.result(min(seconds, left))
                if found is None and left < seconds and why.startswith("took"):
                    return
                took = {"seconds": round(time.monotonic() - begin, 1)}
                yield dataclasses.asdict(pending.pop(0)) | ({"failure": why} if found is None else found) | took
                if found is None or found.get("fatal"):
                    break


class _Child:
    """A process that measures cases."""

    def __init__(self, cases: Sequence[Case], command: list[str]):
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            cwd=Path(__file__).resolve().parent.parent,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._said: collections.deque[str] = collections.deque(maxlen=20)
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read, self._read_errors)]
        for reader in self._readers:
            reader.start()
        assert self._process.stdin is not None
        try:
            with self._process.stdin as stdin:
                json.dump([dataclasses.asdict(case) for case in cases], stdin)
        except BrokenPipeError:
            pass  # It ended before it read its cases: `result` says why.

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            self._said.extend(line.strip() for line in lines if line.strip())

    def result(self, seconds: float) -> tuple[dict[str, Any] | None, str]:
        """Give the next result, or None and the reason."""
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            return None, f"took longer than {seconds:g} s"
        if line is not None:
            return json.loads(line), ""
        code = self._process.wait()
        self._readers[1].join(timeout=10)
        return None, f"the process ended with {code}: {self._said[-1][:500] if self._said else 'no message'}"

    def __enter__(self) -> "_Child":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join(timeout=10)


# What follows runs in the other process; PyTorch is imported there alone.

_Call = Callable[[Any], Any]


def _module(name: str) -> Any:
    """Import a module of a library that the project does not depend on."""
    return importlib.import_module(name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Weights:
    """Products `calls` with different weights, and the first weight [N, K] in float32."""

    calls: list[_Call]
    first: Any


def _draw(n: int, k: int, group: int, generator: Any) -> tuple[Any, Any]:
    """Draw codes 1 to 15, which stand for -7 to 7 so that kernels for symmetric codes can take them, and scales."""
    torch = _module("torch")
    codes = torch.randint(1, 16, (n, k), dtype=torch.uint8, device="cuda", generator=generator)
    spread = 0.5 + torch.rand((n, 1 if group == -1 else k // group), device="cuda", generator=generator)
    return codes, (spread * k**-0.5 / 4).to(torch.bfloat16)


def _dequantize(codes: Any, scale: Any) -> Any:
    n, k = codes.shape
    return ((codes.float() - 8).reshape(n, scale.shape[1], -1) * scale.float()[..., None]).reshape(n, k)


def _torch_bf16(codes: Any, scale: Any) -> _Call:
    torch = _module("torch")
    weight = _dequantize(codes, scale).to(torch.bfloat16)
    return lambda x: torch.nn.functional.linear(x, weight)


def _torch_int4pack(codes: Any, scale: Any) -> _Call:
    torch = _module("torch")
    pairs = (codes[:, ::2] << 4) | codes[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    group = codes.shape[1] // scale.shape[1]
    # Scales and offsets [K / group, N, 2]; code 8 is zero.
    scales = torch.stack([scale.T, torch.zeros_like(scale.T)], dim=-1).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, group, scales)


def _humming(codes: Any, scale: Any) -> _Call:
    torch, ops = _module("torch"), _module("humming.ops")
    n, k = codes.shape
    group = 0 if scale.shape[1] == 1 else k // scale.shape[1]
    config = {"dtype": "int4", "group_size": group}
    layer = (
        _module("humming.layer")
        .HummingLayer(shape_n=n, shape_k=k, weight_config=config, torch_dtype=torch.bfloat16)
        .cuda()
    )
    layer.load_from_tensors({"weight": ops.pack_weight(codes.to(torch.int32), 4), "weight_scale": scale})
    layer.transform()
    return layer


def _gemlite(codes: Any, scale: Any) -> _Call:
    torch = _module("torch")
    channel = scale.shape[1] == 1
    zeros = torch.full_like(scale, 8)
    # One scale a channel is applied to sums, which is the faster way.
    layer = _module("gemlite.helper").A16Wn(device="cuda:0", dtype=torch.bfloat16, post_scale=channel)
    return layer.from_weights(codes, scale, zeros, W_nbits=4, group_size=codes.shape[1] // scale.shape[1])


_BUILDERS: dict[str, Callable[[Any, Any], _Call]] = {
    "torch_bf16": _torch_bf16,
    "torch_int4pack_128": _torch_int4pack,
    "humming_channel": _humming,
    "humming_128": _humming,
    "gemlite_128": _gemlite,
    "gemlite_channel": _gemlite,
}


def _prepare(peer: str, gemlite_tuning: str) -> None:
    """Import a library, so that one that is not installed says so, and settle how it tunes itself."""
    torch = _module("torch")
    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch finds no GPU")
    library = _module(peer)
    if peer == "gemlite":
        if gemlite_tuning == "shipped":
            library.load_config(str(Path(library.__file__).parent / "configs" / "h100.json"))
        else:
            library.reset_config()


def _weights(case: Case, seed: int) -> _Weights:
    torch = _module("torch")
    method, (_, group) = case.method, METHODS[case.method]
    generator = torch.Generator(device="cuda").manual_seed(seed)
    nbytes = case.n * case.k * 2 if method == "torch_bf16" else case.n * case.k // 2
    calls, first = [], None
    for _ in range(copies(nbytes)):
        codes, scale = _draw(case.n, case.k, group, generator)
        if first is None:
            first = _dequantize(codes, scale)
            first = first.to(torch.bfloat16).float() if method == "torch_bf16" else first
        calls.append(_BUILDERS[method](codes, scale))
    return _Weights(calls=calls, first=first)


def _measure(case: Case, weights: _Weights, seed: int) -> dict[str, Any]:
    torch = _module("torch")
    generator = torch.Generator(device="cuda").manual_seed(seed + 1)
    x = torch.randn((case.m, case.k), dtype=torch.float32, device="cuda", generator=generator).to(torch.bfloat16)
    wanted = x.float() @ weights.first.T
    got = weights.calls[0](x).float()
    error = ((got - wanted).abs().max() / wanted.abs().max()).item()
    del wanted, got
    for call in weights.calls:
        call(x)
    torch.cuda.synchronize()
    # A whole number of rounds, so that every weight counts alike.
    rounds = -(-(_TURNS if case.m <= _FEW_ROWS else 1) // len(weights.calls))
    turns = list(itertools.chain.from_iterable([weights.calls] * rounds))
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in turns:
                call(x)
        play, how = graph.replay, {}
    except Exception as failure:
        torch.cuda.synchronize()

        def play() -> None:
            for call in turns:
                call(x)

        how = {"without_graph": _message(failure)}
    return {"us_in_a_row": _milliseconds(play) * 1e3 / len(turns), "error": error, **how}


def _milliseconds(play: Callable[[], None]) -> float:
    """Give the median time of `play`, started several times in a row where it is short."""
    torch = _module("torch")

    def timed(times: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            play()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / times

    play()
    once = timed(1)
    times = min(10, max(1, round(5 / once)))
    return statistics.median(timed(times) for _ in range(9 if once < 50 else 3))


def _message(failure: BaseException) -> str:
    text = " ".join(str(failure).split())
    return f"{type(failure).__name__}: {text[:400]}"


def serve(cases: Sequence[Case], out: IO[str], *, seed: int, gemlite_tuning: str) -> None:
    """Measure cases in this process, a line for each; stop after one that may have spoilt the GPU for the others."""
    prepared: dict[str, str | None] = {}
    built: tuple[Any, Any] = (None, None)
    for case in cases:
        peer = METHODS[case.method][0]
        try:
            if peer not in prepared:
                prepared[peer] = "could not be loaded"
                try:
                    _prepare(peer, gemlite_tuning)
                    prepared[peer] = None
                except Exception as failure:
                    prepared[peer] = f"{PEERS[peer]} cannot be used: {_message(failure)}"
            if prepared[peer] is not None:
                result = {"failure": prepared[peer]}
            else:
                key = case.method, case.n, case.k
                if built[0] != key:
                    built = (None, None)  # Frees the weights before others are built.
                    built = key, _weights(case, seed)
                result = _measure(case, built[1], seed)
        except Exception as failure:
            fatal = "CUDA" in str(failure) or "Accelerator" in type(failure).__name__
            result = {"failure": _message(failure), "fatal": fatal}
        print(json.dumps(result), file=out, flush=True)
        if result.get("fatal"):
            return


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench_peers", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--gemlite-tuning",
        choices=["shipped", "search"],
        default="shipped",
        help="GemLite's own settings for an H100, and its search where it has none; or always its search",
    )
    flags = parser.parse_args()
    # Libraries print to stdout, where results alone may go.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        cases = [Case(**case) for case in json.load(sys.stdin)]
        serve(cases, out, seed=flags.seed, gemlite_tuning=flags.gemlite_tuning)


if __name__ == "__main__":
    main()
