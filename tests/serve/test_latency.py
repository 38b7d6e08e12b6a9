"""The latency table: what it interpolates, what it refuses, and how its correction drifts."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.latency import H200, Drift, LatencyTable, Profile, load_profile, make_table, monotone, roofline
from spear_jax.config import ModelConfig, load_yaml
from spear_jax.testing import tiny_config

AXES = {"decodes": (0, 1, 4), "chunks": (0, 16, 64), "contexts": (10, 110)}


jitted_step = jax.jit(LatencyTable.step)


def linear_table() -> LatencyTable:
    """1 ms a sequence, 0.1 ms a prompt token, 0.01 ms a token of context and sequence or chunk; half without ECs."""
    d, c, k = np.meshgrid(*AXES.values(), indexing="ij")
    seconds = 1e-3 * d + 1e-4 * c + 1e-5 * k * (d + (c > 0))
    return make_table(np.stack([seconds, seconds / 2]), longest=False, **AXES)


def test_what_is_linear_is_interpolated_and_extrapolated_exactly() -> None:
    table = linear_table()
    for decodes, context in ((0, 10), (3, 60), (4, 300)):
        expected = [decodes * (1e-3 + 1e-5 * context) + c * 1e-4 + (c > 0) * 1e-5 * context for c in AXES["chunks"]]
        np.testing.assert_allclose(table.at(decodes, context), [expected, np.array(expected) / 2], rtol=1e-12)
    assert table.at(2, 0)[0, 0] == pytest.approx(2 * (1e-3 + 1e-5 * 10))  # below the first context: as there
    assert table.step(2, 40, 90)[0, 1] == pytest.approx(2 * (1e-3 + 4e-4) + 16e-4 + 9e-4)
    np.testing.assert_allclose(table.scaled(3.0).at(1, 50), 3 * table.at(1, 50))


@settings(deadline=None)
@given(decodes=st.integers(0, 4), context=st.integers(0, 400), start=st.integers(0, 400))
def test_a_jitted_program_reads_the_same_numbers(decodes: int, context: int, start: int) -> None:
    table = linear_table()
    on_device = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), table)
    found = jitted_step(on_device, decodes, context, start)
    np.testing.assert_allclose(found, table.step(decodes, context, start), rtol=2e-5, atol=1e-8)


@given(st.lists(st.floats(0, 1), min_size=16, max_size=16))
def test_a_table_never_gets_faster_with_more_to_do(values: list[float]) -> None:
    seconds = monotone(np.array(values).reshape(2, 2, 2, 2))
    assert all((np.diff(seconds, axis=axis) >= 0).all() for axis in (1, 2, 3))
    assert (np.diff(seconds, axis=0) <= 0).all()
    assert (seconds >= np.array(values).reshape(2, 2, 2, 2)).all()


def test_a_file_gives_back_what_was_saved_and_refuses_another_machine(tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    identity = {"device": "cpu", "model": "demo", "slots": 4}
    saved = Profile(table=linear_table(), kept=(("qkv", "o"), ()), identity=identity, source="measured")
    saved.save(path)
    loaded = load_profile(path)
    np.testing.assert_allclose(loaded.table.seconds, saved.table.seconds, atol=1e-8)
    assert (loaded.kept, loaded.source) == (saved.kept, "measured")
    loaded.check(identity, path=path)
    with pytest.raises(ValueError, match=r"device 'cpu', now 'H100', slots 4, now 8"):
        loaded.check(identity | {"device": "H100", "slots": 8}, path=path)


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="serve profile"):
        load_profile(tmp_path / "none.json")
    path = tmp_path / "latency.json"
    Profile(table=linear_table(), kept=((), ()), identity={}, source="measured").save(path)
    good = json.loads(path.read_text())
    for change, word in [({"format": 0}, "format 0"), ({"chunks": [0, 64, 16]}, "chunks must rise"),
                         ({"contexts": [10, 20, 30]}, "have shape"), ({"kept": [[]]}, "1 sets")]:  # fmt: skip
        path.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=word):
            load_profile(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="no latency table"):
        load_profile(path)


def test_drift_follows_slowly_and_shrugs_off_a_pause() -> None:
    drift = Drift()
    drift.observe(predicted=0.01, observed=10.0)
    assert drift.factor < 1.03
    for _ in range(400):
        drift.observe(predicted=0.01, observed=0.015)
    assert drift.factor == pytest.approx(1.5, rel=1e-3)


@pytest.mark.parametrize("config", [load_yaml(ModelConfig, "configs/models/llama-3.1-8b.yaml"), tiny_config()])
def test_a_roofline_reads_the_weights_once_a_step(config: ModelConfig) -> None:
    profile = roofline(config, H200, decodes=(0, 1, 64), chunks=(0, 256), contexts=(1, 4096))
    table = profile.table
    assert "not measured" in profile.source
    one = float(table.at(1, 1)[1, 0])
    linear = config.num_layers * sum(n * k for n, k in config.module_shapes().values())
    read = linear / 2 + 2 * config.vocab_size * config.hidden_size
    assert one == pytest.approx(H200.overhead + read / H200.bandwidth, rel=0.02)
    assert table.at(1, 1)[0, 0] == one  # answers keep their compensators
    assert table.at(0, 1)[0, 1] > table.at(0, 1)[1, 1]
    assert table.at(0, 1)[0, 0] == 0
