"""Arms as a command line says them, and a run of a few on a tiny model."""

import json
import sys

import numpy as np
import pytest

from calibrate import ablate as command
from calibrate.arms import PRESETS, AblateConfig, Arm, parse_arm
from calibrate.weights import dense_weights, float_weights
from calibrate.workbench import Workbench


def test_settings_of_an_arm_win_over_common_ones():
    arm = parse_arm("a:train.steps=7,gate.form=published,int8=0", ("train.steps=3", "budget=0.02"))
    assert (arm.name, arm.train.steps, arm.budget, arm.gate.form, arm.int8) == ("a", 7, 0.02, "published", False)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_be_read(name):
    arms = [parse_arm(text) for text in PRESETS[name]]
    assert len({arm.name for arm in arms}) == len(arms) > 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:colour=red", "arm a: colour: unknown; known: base"),
        ("a:train.pace=1", "arm a: train.pace: unknown"),
        ("a:seed=x", "arm a: seed: expected a int, got 'x'"),
        ("a:int8=maybe", "expected a bool, got 'maybe'"),
        ("a:train=5", "expected a TrainConfig"),
        ("a:seed", "expected key=value, got 'seed'"),
    ],
)
def test_mistakes_in_arms_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_arm(text)


def test_ranks_beyond_what_is_decomposed_are_refused_before_anything_is_loaded(tmp_path):
    config = AblateConfig(model="no/such", text=(tmp_path / "none.txt",), arms=("a:max_rank=64",), spectrum=24)
    with pytest.raises(ValueError, match="arm a: max_rank 64 is beyond --spectrum 24"):
        command.ablate(config)


def test_arms_are_measured_and_saved(tiny_source, words, tmp_path, capsys, monkeypatch):
    flags = (
        f"--model {tiny_source} --text {words} --window 32 --windows 2 --sequences 8 --length 16 --moment-sequences 8 "
        "--damage-sequences 2 --batch-size 4 --spectrum 4 --initial "
        "--common budget=0.2 max_rank=4 train.steps=2 train.batch_size=4 train.held_out=0.2 bits=4 "
        "--arms plain:compensate=0 svd: local:local_steps=20 joint:zero=scales,joint=ranges+norms "
        f"--save {tmp_path / 'saves'} --output {tmp_path / 'out.json'}"
    )
    monkeypatch.setattr(sys, "argv", ["ablate", *flags.split()])
    with pytest.raises(SystemExit) as leaving:
        command.main()
    printed = capsys.readouterr()
    assert leaving.value.code == 0, printed.err
    summary, arms = json.loads(printed.out), json.loads((tmp_path / "out.json").read_text())["arms"]
    assert list(summary) == list(arms) == ["plain", "svd", "local", "joint"]
    assert arms["plain"]["perplexity"] == arms["plain"]["rtn"]
    for name in ("svd", "local", "joint"):
        assert summary[name]["perplexity"]["words.txt"] == arms[name]["perplexity"]["words.txt"] > 1
        assert 0 < arms[name]["overhead_of_model"] <= 0.2
        assert [point["step"] for point in arms[name]["curve"]] == [0, 2]
    assert arms["local"]["initial"] != arms["svd"]["initial"]
    with np.load(tmp_path / "saves" / "joint.npz") as saved:
        assert {"ranges.qkv", "norms.final_norm", "factors.qkv.a", "ranks.qkv", "stored.down.scale"} <= set(saved.files)


def test_damage_behind_channel_scales_is_of_rounding_alone(tiny_source, words):
    """With AWQ a module's weights fit no other model than the one behind the same scales."""
    bench = Workbench(
        AblateConfig(model=str(tiny_source), text=(words,), window=32, windows=1, sequences=4, length=16, group_size=32)
    )
    base, _ = bench.base(Arm(base="awq"))
    assert any(
        np.abs(new - old).max() > 1e-3
        for new, old in zip(*(float_weights(model).values() for model in (base.exact, bench.exact)), strict=True)
    )
    assert np.abs(bench.damage("unrounded", base, float_weights(base.exact))).max() < 1e-5
    assert bench.damage("rounded", base, dense_weights(base.model)).min() > 1e-5
