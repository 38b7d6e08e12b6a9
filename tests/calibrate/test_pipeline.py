import dataclasses
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from calibrate import cli, pipeline
from calibrate.config import CalibrateConfig
from calibrate.progress import Stages
from calibrate.results import CalibrationResult
from spear_jax import loading
from spear_jax.checkpoint import inspect_checkpoint, load_checkpoint
from spear_jax.evaluate import EvaluateConfig, evaluate

TOKENS = jnp.asarray(np.random.default_rng(1).integers(3, 256, (2, 16)), jnp.int32)
SMALL = CalibrateConfig(
    quantizer="rtn", sequences=8, length=16, moment_sequences=8, damage_sequences=0, zero_byte=(), steps=3,
    batch_size=4, save_every=2, budget=0.2, gate="static", placement="uniform", eval_window=32, eval_windows=3,
    held_out=0.2,
)  # fmt: skip
FULL = dataclasses.replace(
    SMALL, quantizer="gptq-clip", damage_sequences=1, latency_aware=True, zero_byte=("scales", "norms"), zero_steps=2,
    gate="published", placement="gain", joint=("norms",), static_too=True,
)  # fmt: skip


def run(config: CalibrateConfig) -> pipeline.Outcome:
    with Stages(Console(stderr=True)) as stages:
        return pipeline.calibrate(config, stages=stages, command=("calibrate",))


def check(outcome: pipeline.Outcome, config: CalibrateConfig) -> None:
    """Compare the checkpoint on disk with what the report says of it."""
    assert CalibrationResult.load(outcome.report.with_suffix(".json")).gaps == outcome.result.gaps
    assert "<svg" in outcome.report.read_text()
    assert 0.15 < outcome.result.budget.overhead_of_model <= config.budget
    measured = evaluate(
        EvaluateConfig(
            checkpoint=config.output, compare=True, text=config.eval_text[0], window=32, max_windows=3, batch_size=1
        )
    )
    gap = outcome.result.gaps[0]
    for kind, arm in measured["arms"].items():
        if kind != "w4":  # With a joint group the checkpoint's base is not the one before compensators.
            np.testing.assert_allclose(arm["perplexity"], gap.arm(kind).perplexity, rtol=1e-5)
    assert measured["perplexity"] == measured["arms"][gap.arms[-1].kind]["perplexity"]
    assert measured["overhead_of_model"] == pytest.approx(outcome.result.budget.overhead_of_model)
    assert measured["arms"]["reference"]["recovered_of_rtn"] == 1


def test_a_model_goes_to_a_checkpoint_and_comes_back(tiny_source, words, tmp_path, capsys):
    config = dataclasses.replace(SMALL, model=str(tiny_source), output=tmp_path / "out", eval_text=(words,))
    outcome = run(config)
    check(outcome, config)
    assert [arm.kind for arm in outcome.result.gaps[0].arms] == ["reference", "w4", "static"]
    first = capsys.readouterr().err
    assert "3 steps, static gate" in first
    # The same command again finds every stage, and other settings do not overwrite what is there.
    again = run(config)
    assert "done before" in capsys.readouterr().err
    assert again.result.gaps == outcome.result.gaps
    with pytest.raises(FileExistsError, match="--overwrite"):
        run(dataclasses.replace(config, steps=4))


@pytest.mark.slow
def test_all_stages_with_a_gate_and_its_static_twin(tiny_source, words, tmp_path, capsys):
    config = dataclasses.replace(FULL, model=str(tiny_source), output=tmp_path / "out", eval_text=(words,))
    outcome = run(config)
    check(outcome, config)
    result = outcome.result
    assert [arm.kind for arm in result.gaps[0].arms] == ["reference", "rtn", "w4", "zero_byte", "static", "gated"]
    assert {point.stage for point in result.curve} == {"zero-byte", "static compensators", "compensators"}
    assert result.deciles is not None
    assert result.coverage is not None
    assert np.shape(list(result.damage.values())) == (4, 3)
    assert any("the time a compensator of rank 4 adds" in note for note in result.notes)
    info, _ = inspect_checkpoint(outcome.checkpoint)
    assert info.details["reference"] == str(tiny_source)
    loaded = load_checkpoint(outcome.checkpoint)
    twin = load_checkpoint(outcome.checkpoint / info.details["static"])
    assert all(bank.gate is not None for bank in loaded.model.compensators.values())
    assert all(bank.gate is None for bank in twin.model.compensators.values())
    capsys.readouterr()
    assert run(config).result.gaps == result.gaps
    assert "latency: done before" in capsys.readouterr().err
    served = loading.load(str(config.output))
    np.testing.assert_array_equal(served.model(TOKENS)[0], loaded.model(TOKENS)[0])


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", ["awq", "clip"])
def test_finished_stages_are_as_good_as_new(quantizer, tiny_source, words, tmp_path):
    """With AWQ the float model that errors are against is not the one loaded."""
    base = dataclasses.replace(
        SMALL, model=str(tiny_source), eval_text=(words,), quantizer=quantizer, group_size=32, joint=("codes",)
    )
    whole = run(dataclasses.replace(base, output=tmp_path / "whole"))
    in_parts = dataclasses.replace(base, output=tmp_path / "parts")
    run(dataclasses.replace(in_parts, budget=0.0))
    found = run(dataclasses.replace(in_parts, overwrite=True))
    assert found.result.gaps == whole.result.gaps


@pytest.mark.slow
def test_a_kill_in_training_goes_on_to_the_same_result(tiny_source, words, tmp_path):
    settings = dataclasses.replace(
        SMALL, model=str(tiny_source), eval_text=(words,), steps=120, save_every=5, patience=0
    )
    whole = run(dataclasses.replace(settings, output=tmp_path / "whole"))
    out = tmp_path / "killed"
    (tmp_path / "run.json").write_text(json.dumps(settings.as_json() | {"output": str(out)}))
    command = [sys.executable, "-m", "spear_jax.calibrate", str(tmp_path / "run.json")]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not list(out.glob("work/train-state-*.npz")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "checkpoint").exists()
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert "goes on from step" in done.stderr
    assert "text: done before" in done.stderr
    result = CalibrationResult.load(out / "report.json")
    assert result.gaps == whole.result.gaps
    assert result.curve == whole.result.curve
    models = [load_checkpoint(path).model for path in (out / "checkpoint", whole.checkpoint)]
    np.testing.assert_array_equal(*(model(TOKENS)[0] for model in models))
    assert json.loads(done.stdout)["checkpoint"] == str(out / "checkpoint")


def command(arguments: list[str], capsys, monkeypatch) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["calibrate", *arguments])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    return leaving.value.code, capsys.readouterr().err


def flags(source: Path, words: Path, output: Path) -> list[str]:
    return (
        f"--model {source} --output {output} --eval-text {words} --eval-window 32 --eval-windows 3 --quantizer rtn "
        "--sequences 8 --length 16 --moment-sequences 8 --zero-byte --damage-sequences 0 --placement uniform "
        "--gate static --steps 3 --batch-size 4 --budget 0.2 --held-out 0.2"
    ).split()


def test_mistakes_give_one_line_and_status_2(tiny_source, words, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("w5 w6 w7")
    common = flags(tiny_source, words, tmp_path / "out")
    cases = [
        (["--text", str(tmp_path / "empty.txt")], "the calibration text is empty"),
        (["--text", str(tmp_path / "short.txt")], "has 3 tokens, expected at least 32"),
        (["--text", str(tmp_path / "none.txt")], "no such file"),
        (["--text", str(words), "--budget", "1e-5"], "too small: rank 1 of the cheapest module"),
        (["--length", "4096"], "the model has 512 positions"),
        (["--eval-window", "512"], "fewer than one window of 512"),
        (["--quantizer", "magic"], "magic"),
        (["--model", str(tmp_path / "nowhere")], "no such file"),
    ]
    for extra, message in cases:
        status, err = command([*common, *extra], capsys, monkeypatch)
        last = err.strip().splitlines()[-1]
        assert status == 2, err
        assert last.startswith("error: "), err
        assert message in last
        assert "Traceback" not in err


def test_too_little_memory_says_what_to_lower_and_loses_nothing(tiny_source, words, tmp_path, capsys, monkeypatch):
    arguments = flags(tiny_source, words, tmp_path)
    # A petabyte: the error is XLA's own.
    monkeypatch.setattr("calibrate.stages.second_moments", lambda *_, **__: jnp.zeros((1 << 50,), jnp.int8))
    status, err = command(arguments, capsys, monkeypatch)
    assert status == 2, err
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: the device is out of memory: lower --batch-size (4), --length (16) or --sequences")
    monkeypatch.undo()
    status, err = command(arguments, capsys, monkeypatch)
    assert status == 0, err
    assert "text: done before" in err


def test_a_full_disk_stops_with_one_line_and_loses_nothing(tiny_source, words, tmp_path, capsys, monkeypatch):
    arguments = flags(tiny_source, words, tmp_path)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Room for the text's tokens, not for weights. The system refuses the rest, as it does on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, most))
    try:
        status, err = command(arguments, capsys, monkeypatch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert status == 2, err
    last = err.strip().splitlines()[-1]
    work = tmp_path / "work"
    file = re.escape(str(work / "quantize-"))
    assert re.fullmatch(rf"error: {file}\w+\.npz: cannot be written: File too large", last)
    assert [path.name.partition("-")[0] for path in work.iterdir()] == ["text"]
    status, err = command(arguments, capsys, monkeypatch)
    assert status == 0, err
    assert "text: done before" in err


def test_text_may_be_a_dataset_and_training_stops_early(tiny_source, words, tmp_path, capsys, monkeypatch):
    (tmp_path / "org/name").mkdir(parents=True)
    text = " ".join(f"w{3 + i % 20}" for i in range(200))
    (tmp_path / "org/name/train.jsonl").write_text(json.dumps({"text": text}) + "\n")
    monkeypatch.chdir(tmp_path)
    # Steps of twice a factor's size do harm.
    config = dataclasses.replace(
        SMALL, model=str(tiny_source), eval_text=(words,), text=("org/name",), output=tmp_path / "out", steps=60,
        save_every=1, patience=2, factor_rate=2.0, local_steps=3,
    )  # fmt: skip
    outcome = run(config)
    (tokens,) = (np.load(path)["array.tokens"] for path in (tmp_path / "out/work").glob("text-*"))
    assert 3 <= tokens.min() < tokens.max() < 23
    assert len(outcome.result.curve) < 60
    losses = [point.held_out_loss for point in outcome.result.curve]
    assert losses.index(min(losses)) == len(losses) - 3
    first = capsys.readouterr().err
    assert "train: stopped early, the last 2 evaluations were no better" in first
    assert "train locally" in first
    assert run(dataclasses.replace(config, overwrite=True, patience=3)).result.gaps
    again = capsys.readouterr().err
    assert "train locally: done before" in again


def test_a_weight_that_is_not_a_number_is_named(tiny_source, words, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in Path(tiny_source).iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(tiny_source / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = np.nan
    save_file(weights, broken / "model.safetensors")
    config = dataclasses.replace(SMALL, model=str(broken), output=tmp_path / "out", eval_text=(words,))
    with pytest.raises(ValueError, match=r"layers\.down\.weight in layer 1 holds NaN"):
        run(config)
