"""The report of a calibration: one HTML page that needs nothing else, and the same as JSON."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from calibrate.charts import Bar, Line, escape, grouped_columns, heat_map, horizontal_bars, lines, number
from calibrate.results import DECILES, CalibrationResult, Gap
from spear_jax.atomic import writing_file

HTML, JSON = "report.html", "report.json"

_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b1f27; --soft: #5d6675; --rule: #e3e6eb;
  --back: #eef0f4; --heat: #c2410c; --on-heat: #fff; --reference: #8a93a3; --w4: #d1495b; --rtn: #a63a4a;
  --zero: #d99a2b; --static: #2a9d8f; --gated: #3a6fd8; }
@media (prefers-color-scheme: dark) { :root { --page: #12151b; --card: #1b1f27; --ink: #e8ebf0; --soft: #9aa4b5;
  --rule: #2c323d; --back: #242a34; --heat: #fb923c; --on-heat: #1b1f27; --reference: #7d8799; --w4: #e8707f;
  --rtn: #c25a68; --zero: #e5b052; --static: #45bdae; --gated: #7aa2f7; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 4px; }
h3 { font-size: 14px; margin: 18px 0 4px; }
p { margin: 0 0 12px; }
.soft { color: var(--soft); fill: var(--soft); }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 20px 24px;
  margin-top: 18px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; margin-top: 18px; }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 14px 18px; }
.tile b { display: block; font-size: 24px; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
svg { display: block; max-width: 100%; height: auto; font: 12.5px system-ui, sans-serif;
  font-variant-numeric: tabular-nums; }
.scroll svg { max-width: none; }
svg text { fill: var(--ink); }
svg .soft { fill: var(--soft); }
.grid { stroke: var(--rule); }
.line { fill: none !important; stroke-width: 2; stroke-linejoin: round; }
.ghost { opacity: 0; } .ghost:hover { opacity: 1; }
.back { fill: var(--back); } .heat { fill: var(--heat); }
.dark-cell { fill: var(--on-heat) !important; font-weight: 600; }
.reference { fill: var(--reference); } .w4 { fill: var(--w4); } .rtn { fill: var(--rtn); }
.zero_byte { fill: var(--zero); } .static { fill: var(--static); } .gated { fill: var(--gated); }
.line.w4 { stroke: var(--w4); } .line.gated { stroke: var(--gated); } .line.zero_byte { stroke: var(--zero); }
.key { display: inline-block; margin: 0 18px 8px 0; color: var(--soft); }
.key i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px; }
i.w4 { background: var(--w4); } i.gated { background: var(--gated); } i.zero_byte { background: var(--zero); }
.ramp { display: inline-block; width: 120px; height: 11px; border-radius: 3px; margin: 0 6px;
  background: linear-gradient(90deg, var(--back), var(--heat)); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 10px 5px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { color: var(--soft); font-weight: 500; }
td.n, th.n { text-align: right; }
tr.total td { font-weight: 600; }
pre { background: var(--back); border-radius: 6px; padding: 10px 12px; overflow-x: auto; margin: 0 0 12px; }
summary { cursor: pointer; font-weight: 600; }
"""


def write_report(result: CalibrationResult, directory: str | Path) -> tuple[Path, Path]:
    """Write `report.html` and `report.json` into a directory and give their paths."""
    directory = Path(directory)
    page, data = directory / HTML, directory / JSON
    for path, text in ((data, result.to_json()), (page, render_html(result))):
        with writing_file(path) as stream:
            stream.write(text.encode())
    return page, data


def render_html(result: CalibrationResult) -> str:
    """Render the page: charts are inline SVG, and a content policy forbids it to load anything."""
    sections = (
        *(_gap(gap) for gap in result.gaps),
        _placement(result),
        _curves(result),
        _deciles(result),
        _budget(result),
        _tasks(result),
        _timings(result),
        _run(result),
    )
    body = "\n".join(filter(None, sections))
    where = " · ".join(filter(None, (result.quantizer, result.device, result.date)))
    notes = "".join(f"<p>{escape(note)}</p>" for note in result.notes)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Calibration of {escape(result.model)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>Calibration of {escape(result.model)}</h1>
<p class="soft">{escape(where)}</p>
{notes}
{_tiles(result)}
{body}
</main>
</body>
</html>
"""


def _tiles(result: CalibrationResult) -> str:
    tiles = []
    if result.gaps:
        gap = result.gaps[0]
        best = min((arm for arm in gap.arms if arm.kind != "reference"), key=lambda arm: arm.perplexity, default=None)
        reference, w4 = gap.arm("reference"), gap.arm("w4")
        if best is not None and best.kind not in ("w4", "rtn"):
            share = gap.recovered(best)
            tiles.append(("gap recovered", "none" if share is None else f"{share:.1%}", f"{best.label}, {gap.text}"))
            others = " → ".join(number(arm.perplexity) for arm in (reference, w4) if arm is not None)
            tiles.append(("perplexity", number(best.perplexity), f"reference → W4: {others}" if others else gap.text))
    budget = result.budget
    if budget.total("compensators"):
        limit = "" if budget.limit is None else f", {budget.limit:.2%} allowed"
        tiles.append(("overhead", f"{budget.overhead_of_model:.2%}", f"of the whole W4 model{limit}"))
        tiles.append(("overhead", f"{budget.overhead_of_linears:.2%}", "of the int4 linears alone"))
    if result.timings:
        tiles.append(("time", _duration(sum(t.seconds for t in result.timings)), f"{len(result.timings)} stages"))
    cells = "".join(
        f'<div class="tile"><span class="soft">{escape(name)}</span><b>{escape(value)}</b>'
        f'<span class="soft">{escape(note)}</span></div>'
        for name, value, note in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _gap(gap: Gap) -> str:
    def note(kind: str, share: float | None) -> str:
        return f"{share:.1%} of the gap" if share is not None and kind not in ("reference", "w4") else ""

    bars = [
        Bar(label=arm.label, value=arm.perplexity, kind=arm.kind, note=note(arm.kind, gap.recovered(arm)))
        for arm in gap.arms
    ]
    chart = horizontal_bars(bars, title=f"Perplexity on {gap.text} by arm")
    about = f"Perplexity, lower is better; {gap.tokens:,} tokens in windows of {gap.window:,}."
    return _section(f"The gap on {gap.text}", about, chart)


def _placement(result: CalibrationResult) -> str:
    if not result.num_layers:
        return ""
    modules = list(dict.fromkeys((*result.damage, *result.ranks)))
    layers = range(result.num_layers)
    ranks = {module: result.ranks.get(module, (0,) * result.num_layers) for module in modules}
    # Without a diagnosis the colour shows the ranks themselves.
    coloured: dict[str, Sequence[float]] = dict(result.damage or ranks)
    values = [coloured.get(module, (0.0,) * result.num_layers) for module in modules]

    def hover(module: str, layer: int) -> str:
        damage = f", damage {number(result.damage[module][layer])}" if module in result.damage else ""
        return f"layer {layer}, {module}: rank {ranks[module][layer]}{damage}"

    chart = heat_map(
        modules,
        values,
        [[str(rank) if rank else "" for rank in ranks[module]] for module in modules],
        [[hover(module, layer) for layer in layers] for module in modules],
        title="Damage of each module of each layer, with the rank it got",
    )
    largest = max((value for row in values for value in row), default=0)
    measure = "damage, 1 - CKA of the final hidden state with this module alone quantized" if result.damage else "rank"
    about = f"Figures are ranks of the compensators (none: no figure); colour is {measure}."
    if result.coverage is not None:
        about += f" Coverage, the effective number of damaged modules: {number(result.coverage)}."
    legend = f'<p class="soft">0<span class="ramp"></span>{number(largest)} (colour follows the square root)</p>'

    def counts(name: str, values: Sequence[int]) -> tuple[object, ...]:
        return name, sum(1 for rank in values if rank), sum(values), max(values, default=0)

    rows = [counts(module, ranks[module]) for module in modules]
    rows.append(counts("all", [rank for module in modules for rank in ranks[module]]))
    table = _table(("module", "layers with one", "ranks in all", "largest rank"), rows, total=True)
    return _section("Damage and placement", about, f'<div class="scroll">{chart}</div>{legend}{table}')


def _curves(result: CalibrationResult) -> str:
    parts = []
    for stage in dict.fromkeys(point.stage for point in result.curve):
        points = [point for point in result.curve if point.stage == stage]
        held_out = [(point.step, point.held_out_loss) for point in points if point.held_out_loss is not None]
        losses = [Line(label="loss", points=[(p.step, p.loss) for p in points], kind="w4")]
        if held_out:
            losses.append(Line(label="held-out loss", points=held_out, kind="gated", dots=True))
        keys = "".join(f'<span class="key"><i class="{line.kind}"></i>{line.label}</span>' for line in losses)
        rate = Line(label="learning rate", points=[(p.step, p.learning_rate) for p in points], kind="zero_byte")
        parts.append(
            f"<h3>{escape(stage)}</h3>{keys}{lines(losses, title=f'Loss by step, {stage}')}"
            f'<span class="key"><i class="zero_byte"></i>learning rate</span>'
            f"{lines([rate], title=f'Learning rate by step, {stage}', height=120)}"
        )
    return _section("Training", "", "".join(parts)) if parts else ""


def _deciles(result: CalibrationResult) -> str:
    if result.deciles is None:
        return ""
    names = [f"{i + 1}" for i in range(DECILES)]
    series = {"W4": result.deciles.before, "with compensators": result.deciles.after}
    kinds = ("w4", "gated")
    keys = "".join(f'<span class="key"><i class="{k}"></i>{n}</span>' for n, k in zip(series, kinds, strict=True))
    chart = grouped_columns(names, series, kinds=kinds, title="Error per token by decile of difficulty")
    about = f"Tokens in tenths by their error before, easiest first. {result.deciles.measure}."
    rows = [
        (name, number(before), number(after), f"{after / before - 1:+.1%}" if before else "")
        for name, before, after in zip(names, *series.values(), strict=True)
    ]
    table = _table(("decile", "before", "after", "change"), rows)
    return _section("Error per token", about, f"{keys}{chart}<details><summary>Figures</summary>{table}</details>")


def _budget(result: CalibrationResult) -> str:
    budget = result.budget
    linears, whole = budget.total("int4_linears"), budget.w4_bytes

    def row(name: str, size: int) -> tuple[str, ...]:
        return name, f"{size:,}", f"{size / whole:.2%}" if whole else "", f"{size / linears:.2%}" if linears else ""

    rows = [row(entry.component, entry.nbytes) for entry in budget.entries]
    rows += [
        row("int4 linears", linears),
        row("whole W4 model", whole),
        row("compensators", budget.total("compensators")),
    ]
    head = ("component", "bytes", "of the whole W4 model as stored", "of the int4 linears alone")
    limit = "" if budget.limit is None else f"Compensators may take {budget.limit:.2%} of the whole W4 model."
    return _section("Byte budget", limit, _table(head, rows, total=3))


def _tasks(result: CalibrationResult) -> str:
    if not result.tasks:
        return ""
    rows = [
        (t.task, "" if t.reference is None else f"{t.reference:.1%}", f"{t.before:.1%}", f"{t.after:.1%}")
        for t in result.tasks
    ]
    return _section("Tasks", "Zero-shot accuracy.", _table(("task", "reference", "W4", "with compensators"), rows))


def _timings(result: CalibrationResult) -> str:
    if not result.timings:
        return ""
    bars = [
        Bar(label=t.stage, value=t.seconds, kind="reference", note=_duration(t.seconds) if t.seconds >= 90 else "s")
        for t in result.timings
    ]
    return _section("Time", "Seconds of each stage.", horizontal_bars(bars, title="Seconds by stage"))


def _run(result: CalibrationResult) -> str:
    command = f"<pre>{escape(result.command)}</pre>" if result.command else ""
    config = _table(("setting", "value"), _flatten(result.config)) if result.config else ""
    versions = _table(("package", "version"), result.versions.items()) if result.versions else ""
    parts = [
        f"<details open><summary>{name}</summary>{table}</details>"
        for name, table in (("Configuration", config), ("Versions", versions))
        if table
    ]
    return _section("How it was run", "", command + "".join(parts)) if command or parts else ""


def _section(title: str, about: str, body: str) -> str:
    text = f'<p class="soft">{escape(about)}</p>' if about else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{text}\n{body}\n</section>"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], *, total: int = 0) -> str:
    """Write a table, first column as text and the others as figures; the last `total` rows are sums."""
    rows = list(rows)
    names = "".join(f"<th{' class=n' if i else ''}>{escape(name)}</th>" for i, name in enumerate(head))
    body = []
    for i, row in enumerate(rows):
        cells = "".join(f"<td{' class=n' if j else ''}>{escape(value)}</td>" for j, value in enumerate(row))
        body.append(f"<tr{' class=total' if i >= len(rows) - total else ''}>{cells}</tr>")
    return f"<table><thead><tr>{names}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += _flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", "none" if value is None else str(value)))
    return rows


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
