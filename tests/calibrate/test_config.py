import dataclasses

import pytest

from calibrate.config import QUICK, CalibrateConfig, parse
from calibrate.plan import Plan, make_plan
from calibrate.train import TrainConfig
from spear_jax.testing import tiny_config


def test_nothing_means_the_demo_and_quick():
    config = parse([])
    assert config.quick
    assert config.model == "demo"
    assert config.steps == QUICK["steps"]


def test_flags_win_over_the_file_and_the_file_over_quick(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("quick: true\nsteps: 7\nquantizer: rtn\nbudget: 0.02\n")
    config = parse([str(path), "--budget", "0.005", "--zero-byte", "norms"])
    assert (config.steps, config.quantizer, config.budget) == (7, "rtn", 0.005)
    assert config.zero_byte == ("norms",)
    assert config.sequences == QUICK["sequences"]
    assert parse([str(path), "--steps", "9"]).train_config.steps == 9


def test_a_file_may_name_what_is_the_default_without_quick(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"steps: {CalibrateConfig().steps}\n")
    assert parse([str(path), "--quick"]).steps == CalibrateConfig().steps != QUICK["steps"]


def test_training_takes_its_settings():
    config = parse(["--steps", "9", "--patience", "2", "--save-every", "7", "--norm-rate", "0.5", "--zero-steps", "5"])
    assert config.train_config == TrainConfig(
        steps=9, patience=2, evaluate_every=7, norm_rate=0.5, batch_size=config.batch_size,
        factor_rate=config.factor_rate, gate_rate=config.gate_rate,
    )  # fmt: skip
    assert config.zero_config == dataclasses.replace(config.train_config, steps=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quantizer", "magic"], "quantizer"),
        (["--gate", "revolving"], "gate"),
        (["--placement", "nowhere"], "placement"),
        (["--group-size", "48"], "group-size"),
        (["--symmetric", "--asymmetric"], "symmetric"),
        (["--budget", "-0.1"], "budget is a share"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--factor-rate", "0"], "factor_rate must be positive"),
        (["--ema", "1.5"], "ema"),
        (["--patience", "-1"], "patience must be at least 0, got -1"),
        (["--local-steps", "-1"], "local_steps must be at least 0, got -1"),
        (["--initial", "zero", "--local-steps", "5"], "local_steps train: expected 0, got 5"),
        (["--gate-hidden", "0"], "hidden >= 1"),
        (["--damage-sequences", "0"], "damage_sequences"),
        (["--joint", "scales", "scales"], "twice"),
        (["--frobnicate"], "frobnicate"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse(arguments)


def test_an_unknown_key_of_a_file_is_named(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("stpes: 3\n")
    with pytest.raises(ValueError, match="stpes"):
        parse([str(path)])


def test_settings_are_json_values():
    values = parse(["--eval-text", "a.txt"]).as_json()
    assert values["eval_text"] == ["a.txt"]
    assert values["zero_byte"] == ["scales", "norms"]


def test_the_plan_lists_the_stages_that_will_run_and_their_bytes():
    def planned(*arguments: str) -> Plan:
        return make_plan(parse(["--quick", *arguments]), tiny_config(), eval_tokens=6144, speed=1e9)

    def names(plan: Plan) -> list[str]:
        return [stage.name for stage in plan.stages]

    usual = planned()
    assert names(usual) == [
        "load", "text", "quantize", "train zero-byte", "diagnose", "place and initialise", "train", "evaluate", "write",
    ]  # fmt: skip
    assert usual.budget_bytes == int(0.01 * usual.w4_bytes)
    local = planned("--local-steps", "100")
    assert names(local)[5:7] == ["place and initialise", "train locally"]
    assert local.seconds > usual.seconds
    assert "latency" in names(planned("--latency-aware"))
    assert names(planned("--budget", "0")) == ["load", "text", "quantize", "train zero-byte", "evaluate", "write"]
    assert "in all" in usual.lines()[-1]
