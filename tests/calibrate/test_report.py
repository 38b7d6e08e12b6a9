import dataclasses
import html.parser
import json
import math
import re

import pytest

from calibrate.report import render_html, write_report
from calibrate.results import (
    Arm,
    ByteBudget,
    BytesEntry,
    CalibrationResult,
    CurvePoint,
    DecileErrors,
    Gap,
    StageTime,
    TaskScore,
)

VOID, EMPTY_SHAPES = {"meta", "br"}, {"line", "rect", "circle", "polyline"}


def make_result(*, layers: int = 30, steps: int = 400) -> CalibrationResult:
    """Build a result of the size of SmolLM2-135M whose figures are all different."""
    modules = ("qkv", "o", "gate_up", "down")
    damage = {
        m: tuple(round(0.002 + 0.05 * math.exp(-((i - 4 * j) ** 2) / 18) + 0.0001 * i, 6) for i in range(layers))
        for j, m in enumerate(modules)
    }
    damage["down"] = (0.3127, *damage["down"][1:])
    ranks = {m: tuple(max(0, round(120 * d)) for d in row) for m, row in damage.items()}
    arms = (
        Arm(kind="reference", label="reference", perplexity=24.89),
        Arm(kind="w4", label="W4", perplexity=53.66),
        Arm(kind="zero_byte", label="zero-byte", perplexity=38.24),
        Arm(kind="static", label="static", perplexity=31.49, compensator_bytes=612_345),
        Arm(kind="gated", label="gated <best>", perplexity=28.31, compensator_bytes=623_456),
    )
    curve = [
        CurvePoint(
            stage=stage,
            step=step,
            loss=round(start * math.exp(-step / 90) + 0.21 + 0.02 * math.sin(step * 1.7), 5),
            learning_rate=0.002 * min(1, step / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps)),
            held_out_loss=round(start * math.exp(-step / 95) + 0.24, 5) if step % 50 == 0 else None,
        )
        for stage, start in (("local", 9.0), ("end to end", 0.9))
        for step in range(0, steps + 1, 5)
    ]
    return CalibrationResult(
        model="SmolLM2-135M-Instruct",
        quantizer="rtn, symmetric, per channel",
        ranks=ranks,
        damage=damage,
        coverage=57.3,
        curve=tuple(curve),
        gaps=(
            Gap(text="WikiText-2 test", tokens=304_986, window=1024, arms=arms),
            Gap(text="code sample", tokens=20_480, window=1024, arms=arms[:2]),
        ),
        deciles=DecileErrors(
            before=tuple(0.02 * 1.7**i for i in range(10)), after=tuple(0.011 * 1.6**i for i in range(10))
        ),
        budget=ByteBudget(
            entries=(
                BytesEntry(component="int4 codes", nbytes=53_084_160, part="int4_linears"),
                BytesEntry(component="int4 scales", nbytes=737_280, part="int4_linears"),
                BytesEntry(component="embedding", nbytes=56_623_104, part="other"),
                BytesEntry(component="norms", nbytes=70_272, part="other"),
                BytesEntry(component="compensator factors", nbytes=901_120, part="compensators"),
                BytesEntry(component="compensator gates", nbytes=12_288, part="compensators"),
            ),
            limit=0.01,
        ),
        tasks=(TaskScore(task="hellaswag", reference=0.431, before=0.362, after=0.418),),
        timings=(StageTime(stage="quantize", seconds=12.5), StageTime(stage="train", seconds=312.25)),
        config={"budget": 0.01, "train": {"steps": 400, "lr": 0.002, "text": None}},
        command="python -m spear_jax.calibrate demo --budget 0.01",
        versions={"jax": "0.11.2"},
        device="NVIDIA H200",
        date="2026-11-23T16:00:00Z",
        notes=("Damage by one forward a module.",),
    )


def bare_result(**changes) -> CalibrationResult:
    return CalibrationResult(
        **({"model": "m", "quantizer": "rtn", "ranks": {}, "budget": ByteBudget(entries=())} | changes)
    )


class Checker(html.parser.HTMLParser):
    """Fails on tags that do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"attribute twice in {tag}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in EMPTY_SHAPES

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data)


def text_of(page: str) -> str:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert not checker.open
    return " ".join(checker.text)


def test_json_round_trip_and_summary():
    result = make_result()
    assert CalibrationResult.from_json(result.to_json()) == result
    summary = json.loads(result.to_json())["summary"]
    assert summary["recovered"]["WikiText-2 test"]["static"] == pytest.approx((53.66 - 31.49) / (53.66 - 24.89))
    assert summary["overhead_of_model"] == pytest.approx(913_408 / 110_514_816)
    assert summary["overhead_of_linears"] == pytest.approx(913_408 / 53_821_440)


def test_page_holds_the_figures_of_the_json(tmp_path):
    page, data = write_report(make_result(), tmp_path)
    text = text_of(page.read_text())
    values = json.loads(data.read_text())
    for arm in values["gaps"][0]["arms"]:
        assert f"{arm['perplexity']:.4g}" in text
        assert arm["label"] in text
    for entry in values["budget"]["entries"]:
        assert f"{entry['nbytes']:,}" in text
    for module, row in values["damage"].items():
        for layer, damage in enumerate(row):
            assert f"layer {layer}, {module}: rank {values['ranks'][module][layer]}, damage {damage:.4g}" in text
    assert f"{values['summary']['overhead_of_linears']:.2%}" in text
    assert f"{values['summary']['recovered']['WikiText-2 test']['static']:.1%} of the gap" in text
    for figure in ("57.3", "36.2%", "312.2", "train.steps", "NVIDIA H200", "held-out loss"):
        assert figure in text
    assert all(f"{value:.4g}" in text for value in values["deciles"]["after"])


def test_page_loads_nothing_and_escapes():
    page = render_html(make_result())
    assert not re.search(r"https?:|//\w|@import|url\(|<script|<link|\bsrc=|href=", page)
    assert "gated &lt;best&gt;" in page
    assert "default-src 'none'" in page


def test_same_result_gives_the_same_page():
    assert render_html(make_result()) == render_html(make_result())


@pytest.mark.parametrize(
    "changes",
    [
        {
            "gaps": (),
            "curve": (),
            "deciles": None,
            "tasks": (),
            "timings": (),
            "config": {},
            "command": "",
            "versions": {},
        },
        {"damage": {}},
        {"coverage": None, "device": ""},
    ],
    ids=["no figures", "not diagnosed", "little"],
)
def test_parts_may_be_missing(changes):
    text_of(render_html(dataclasses.replace(make_result(), **changes)))


def test_no_gate_and_no_compensators():
    result = make_result()
    gap = dataclasses.replace(
        result.gaps[0], arms=tuple(a for a in result.gaps[0].arms if a.kind in ("reference", "w4"))
    )
    result = dataclasses.replace(result, gaps=(gap,), ranks=dict.fromkeys(result.ranks, (0,) * 30))
    text = text_of(render_html(result))
    assert "gap recovered" not in text
    assert "static" not in text


def test_empty_and_single_layer():
    text_of(render_html(bare_result()))
    one = bare_result(
        ranks={"qkv": (2,)},
        damage={"qkv": (0.0,)},
        curve=(CurvePoint(stage="local", step=1, loss=1.0, learning_rate=0.0),),
        gaps=(Gap(text="t", tokens=1, window=1, arms=(Arm(kind="static", label="static", perplexity=2.0),)),),
        deciles=DecileErrors(before=(0.0,) * 10, after=(0.0,) * 10),
    )
    assert "layer 0, qkv: rank 2, damage 0" in text_of(render_html(one))


def test_no_gap_to_recover():
    arms = (Arm(kind="reference", label="r", perplexity=5.0), Arm(kind="w4", label="w", perplexity=5.0))
    gap = Gap(text="t", tokens=1, window=1, arms=arms)
    assert gap.recovered(arms[1]) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_figures_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match="loss at step 7 of local is"):
        CurvePoint(stage="local", step=7, loss=value, learning_rate=0.1)
    with pytest.raises(ValueError, match="perplexity of W4 is"):
        Arm(kind="w4", label="W4", perplexity=value)
    with pytest.raises(ValueError, match="damage of qkv in layer 1 is"):
        bare_result(damage={"qkv": (0.1, value)})
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        bare_result(config={"x": value}).to_json()


def test_what_is_no_result_is_refused(tmp_path):
    good = make_result().to_json()
    cases = {
        "not valid JSON": good[:-50],
        "no format number": "{}",
        "written in format 9": good.replace('"format": 1', '"format": 9'),
        "unknown key moe": good.replace('"format": 1', '"moe": 1, "format": 1'),
        "unable to parse": good.replace('"coverage": 57.3', '"coverage": "much"'),
    }
    for message, text in cases.items():
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            CalibrationResult.load(tmp_path / "r.json")
        assert str(tmp_path) in str(caught.value)
    with pytest.raises(ValueError, match="10 values, got 3"):
        DecileErrors(before=(1.0, 2.0, 3.0), after=(1.0,) * 10)
    with pytest.raises(ValueError, match="one value per layer"):
        bare_result(ranks={"qkv": (1, 2), "o": (1,)})
