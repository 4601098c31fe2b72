"""The page that shows runs side by side: one HTML file that needs no network and runs no code but ours.

Everything that comes from a run is escaped, and the page's Content-Security-Policy allows only the style and the script
of this folder, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distrain.files.escaping import escaped
from distrain.tools.comparison.differences import Difference, describe_runs, find_differences
from distrain.tools.comparison.final_figures import (
    Figure,
    bytes_sent,
    figures_of,
    lower_is_better,
    show_bytes,
    show_number,
)
from distrain.tools.comparison.run import FAILED, FINISHED, Run, shortened

_HERE = Path(__file__).parent
_COLORS, _DASHES = 8, 7
#: Points of all curves together, so that ten long runs make a page of less than 300 kB.
_MOST_POINTS = 8_000
_FEWEST_POINTS_PER_CURVE = 50
_MOST_KNOTS = 48
_MOST_CHARTS = 16
#: Runs from which on the list of runs scrolls by itself.
_MANY_RUNS = 16
_SHARES = (("compute", "s0"), ("communication", "s1"), ("data", "s4"), ("other", "s6"))
_LONGEST_VALUE = 120


def to_html(runs: Sequence[Run], baseline: Run, made: str, version: str) -> str:
    """Makes the page.

    Args:
        runs: With names, in the order in which they are shown.
        baseline: The run that differences refer to, one of ``runs``.
        made: When the page is made, as text.
        version: Of distrain.
    """
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    allowed = f"style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
    differences = find_differences(runs)
    data = _data(runs)
    title = "1 run" if len(runs) == 1 else f"Comparison of {len(runs)} runs"
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="referrer" content="no-referrer">',
        f"<title>{title}: distrain</title>",
        f"<style>{style}</style>",
        "</head>",
        "<body>",
        f"<header><h1>{title}</h1></header>",
        "<main>",
        *_notices(runs),
        *_curves(runs, differences, data),
        *_final_figures(runs, baseline),
        *_differences(runs, differences),
        *_time_shares(runs),
        *_bytes(runs),
        *_origins(runs),
        "</main>",
        f"<footer><p>Made by distrain {_text(version)} on {_text(made)}.</p></footer>",
        f'<script type="application/json" id="data">{_json(data)}</script>',
        f"<script>{script}</script>",
        "</body>",
        "</html>",
        "",
    ]
    return "\n".join(parts)


def _hash(source: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"


def _text(text: object) -> str:
    """Text for HTML; letters that are not printable, also those that turn the direction, are shown as escapes."""
    return html.escape(escaped(str(text)))


def _name(text: str) -> str:
    """A name or a key for HTML, which may be broken between its parts."""
    return re.sub(r"([._,/])(?=\w)", r"\1<wbr>", _text(text))


def _json(content: Any) -> str:
    """JSON that can't end the element that it stands in."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _style(index: int) -> str:
    """Classes of a run's line: eight colours, then the same with other dashes."""
    return f"s{index % _COLORS} d{index // _COLORS % _DASHES}"


def _chart_title(name: str) -> str:
    for prefix, said in (("epoch/val_", "validation "), ("epoch/train_", "training "), ("train/", "training ")):
        if name.startswith(prefix):
            metric = name.removeprefix(prefix).replace("_", " ")
            whole = "" if metric in ("learning rate", "gradient norm") else said
            per_epoch = ", whole epochs" if prefix == "epoch/train_" else ""
            return f"{whole}{metric}{per_epoch}"
    return "images per second" if name == "speed/images_per_second" else name


def _chart_names(runs: Sequence[Run]) -> list[str]:
    """The curves to draw: losses, scores, then the rest; those that more runs have first."""
    counts: dict[str, int] = {}
    for run in runs:
        for name in run.metrics.curves:
            counts[name] = counts.get(name, 0) + 1
    # An epoch's mean of what is also logged during it is worth a chart only where nothing was logged during it.
    for name in list(counts):
        during = f"train/{name.removeprefix('epoch/train_')}"
        if name.startswith("epoch/train_") and counts[name] <= counts.get(during, 0):
            del counts[name]

    def rank(name: str) -> tuple[bool, bool, int, bool]:
        is_metric = name.startswith("epoch/val_") or (name.rpartition("/")[2] in scores)
        return not is_metric, not lower_is_better(name), -counts[name], not name.startswith("train/")

    scores = {name.removeprefix("epoch/val_") for name in counts if name.startswith("epoch/val_")} | {"loss"}
    return sorted(counts, key=rank)


def _data(runs: Sequence[Run]) -> dict[str, Any]:
    """What the script draws."""
    names = _chart_names(runs)[:_MOST_CHARTS]
    count = sum(name in run.metrics.curves for run in runs for name in names)
    most = max(_MOST_POINTS // max(count, 1), _FEWEST_POINTS_PER_CURVE)
    charts = []
    for name in names:
        curves = []
        for index, run in enumerate(runs):
            curve = run.metrics.curves.get(name)
            if curve is None:
                continue
            points = curve.points(most)
            steps = [point.step for point in points]
            # Differences are shorter than steps.
            stored: dict[str, Any] = {"r": index, "s": [b - a for a, b in zip([0, *steps], steps, strict=False)]}
            stored["v"] = [_rounded(point.mean) for point in points]
            if any(point.low != point.high for point in points):
                stored["l"] = [_rounded(point.low) for point in points]
                stored["h"] = [_rounded(point.high) for point in points]
            curves.append(stored)
        charts.append({"title": _chart_title(name), "loss": lower_is_better(name), "curves": curves})
    shown = [
        {"name": run.name, "style": _style(index), "knots": _knots(run.seconds_over_steps())}
        for index, run in enumerate(runs)
    ]
    return {"runs": shown, "charts": charts}


def _rounded(value: float | None) -> float | int | None:
    """Five significant digits, which no screen tells from more."""
    if value is None:
        return None
    rounded = float(f"{value:.5g}")
    return int(rounded) if rounded == int(rounded) and abs(rounded) < 1e9 else rounded


def _knots(knots: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    every = math.ceil(len(knots) / _MOST_KNOTS)
    kept = list(knots[::every]) if every else []
    if knots and kept[-1] != knots[-1]:
        kept.append(knots[-1])
    return [(step, round(seconds, 3)) for step, seconds in kept]


def _notices(runs: Sequence[Run]) -> list[str]:
    """Runs that are not finished, and files that can't be read."""
    lines = []
    for run in runs:
        if run.state != FINISHED:
            state = f'<strong class="state-failed">{run.state}</strong>' if run.state == FAILED else run.state
            lines.append(f"<li>{_text(run.name)}: {state}{': ' if run.reason else ''}{_text(run.reason)}</li>")
        lines += [f"<li>{_text(run.name)}: {_text(problem)}</li>" for problem in run.problems]
    return ["<section><h2>Notices</h2><ul>", *lines, "</ul></section>"] if lines else []


def _curves(runs: Sequence[Run], differences: Sequence[Difference], data: dict[str, Any]) -> list[str]:
    if not data["charts"]:
        return ["<section><h2>Curves</h2><p>No run has logged anything.</p></section>"]
    many = " many" if len(runs) > _MANY_RUNS else ""
    parts = [
        "<section><h2>Curves</h2>",
        "<noscript><p>The curves are drawn by a script in this page, which is switched off.</p></noscript>",
        '<form class="controls" id="controls" hidden>',
        '<fieldset><legend>over</legend><label><input type="radio" name="axis" value="steps" checked>steps</label>',
        '<label><input type="radio" name="axis" value="seconds">seconds</label></fieldset>',
        '<label><input type="checkbox" name="log" checked>logarithmic losses</label>',
        '<fieldset><legend>runs</legend><button type="button" id="all">all</button>',
        '<button type="button" id="none">none</button></fieldset></form>',
        f'<ul class="legend{many}"{" tabindex=0" if many else ""} aria-label="Runs: a click shows or hides one">',
    ]
    for index, (run, described) in enumerate(zip(runs, describe_runs(runs, differences), strict=True)):
        more = f' <span class="dim">{_text(described)}</span>' if described else ""
        button = f'<button type="button" id="run-{index}" aria-pressed="true" title="A double click shows it alone">'
        parts.append(f"<li>{button}<span>{_name(run.name)}{more}</span></button></li>")
    parts.append('</ul><div class="charts" id="charts">')
    for index, chart in enumerate(data["charts"]):
        title = _text(chart["title"])
        parts += [
            f'<figure class="chart" id="chart-{index}"><figcaption>{title}</figcaption>',
            f'<svg class="plot" tabindex="0" role="img" aria-label="{title}; arrow keys read values"></svg>',
            '<div class="readout" aria-live="polite"></div><div class="note"></div></figure>',
        ]
    parts += ["</div>", *_notes_on_curves(runs, data), "</section>"]
    return parts


def _notes_on_curves(runs: Sequence[Run], data: dict[str, Any]) -> list[str]:
    notes = [
        "Seconds are those of training, from the durations of steps: evaluation, saving and pauses before a resume "
        "don't count."
    ]
    without = [run.name for run in runs if run.metrics.curves and not run.seconds_over_steps()]
    if without:
        notes.append(f"Without durations, so only over steps: {', '.join(without)}.")
    longest = max((curve.rows for run in runs for curve in run.metrics.curves.values()), default=0)
    drawn = max((len(curve["s"]) for chart in data["charts"] for curve in chart["curves"]), default=0)
    if longest > drawn:
        notes.append(
            f"The longest curve has {longest:,} rows. One of more than about {drawn:,} rows is drawn in stretches: the "
            "line is the mean of each, and the band reaches from its lowest to its highest value."
        )
    left_out = len(_chart_names(runs)) - len(data["charts"])
    if left_out > 0:
        notes.append(f"{left_out} more curves are in the metrics.jsonl of the runs.")
    return [f'<p class="dim">{_text(note)}</p>' for note in notes]


def _table(caption: str, head: Sequence[str], rows: Sequence[str]) -> list[str]:
    return [
        '<div class="scroll" tabindex="0"><table>',
        f"<thead><tr>{''.join(head)}</tr></thead>",
        f"<tbody>{''.join(rows)}</tbody></table></div>",
        *([f'<p class="dim">{caption}</p>'] if caption else []),
    ]


def _head(text: str, *, number: bool = False) -> str:
    return f'<th scope="col"{" class=number" if number else ""}>{_name(text)}</th>'


def _row_head(run: Run) -> str:
    return f'<th scope="row">{_name(run.name)}</th>'


def _final_figures(runs: Sequence[Run], baseline: Run) -> list[str]:
    figures = figures_of(runs)
    states = any(run.state != FINISHED for run in runs)
    head = [_head("run"), *([_head("state")] if states else []), _head("strategy"), _head("compression")]
    head += [_head("ranks", number=True), *(_head(figure.label, number=True) for figure in figures)]
    best = {figure.label: _best(figure, runs) for figure in figures}
    rows = []
    for run in runs:
        cells = [_row_head(run)]
        if states:
            cells.append(f"<td{' class=state-failed' if run.state == FAILED else ''}>{run.state}</td>")
        for path, key in (("strategy", "strategy.name"), ("compression", "compression.name")):
            cells.append(f"<td>{_text(shortened(run.text(path) or (run.config or {}).get(key) or '–', 40))}</td>")
        ranks = run.number("world_size")
        cells.append(f'<td class="number">{"–" if ranks is None else show_number(ranks)}</td>')
        for figure in figures:
            value = figure.value(run)
            difference = "" if run is baseline else figure.show_difference(value, figure.value(baseline))
            small = f"<small>{_text(difference)}</small>" if difference else ""
            is_best = " best" if figure.show(value) == best[figure.label] else ""
            cells.append(f'<td class="number{is_best}">{_text(figure.show(value))}{small}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    caption = f"Small: the difference to {_text(baseline.name)}. Bold: the best of a metric." if len(runs) > 1 else ""
    return ["<section><h2>Final figures</h2>", *_table(caption, head, rows), "</section>"]


def _best(figure: Figure, runs: Sequence[Run]) -> str | None:
    """The best value of a metric as it is shown; ``None`` for a figure without a best, or if all runs show the same."""
    values = [value for value in map(figure.value, runs) if value is not None]
    if figure.better == 0 or len({figure.show(value) for value in values}) < 2:
        return None
    return figure.show(max(values) if figure.better > 0 else min(values))


def _differences(runs: Sequence[Run], differences: Sequence[Difference]) -> list[str]:
    parts = ["<section><h2>What differs in the configurations</h2>"]
    without = [run.name for run in runs if run.config is None]
    if without:
        parts.append(f"<p>Without a readable config.yaml: {_text(', '.join(without))}.</p>")
    if not differences:
        said = "All keys are equal." if len(runs) - len(without) > 1 else "There is nothing to compare."
        return [*parts, f"<p>{said}</p></section>"]
    caption = "Only keys whose values differ; – : the run has no such key."

    def cell(value: str | None) -> str:
        return f"<td>{'–' if value is None else _text(shortened(value, _LONGEST_VALUE))}</td>"

    # Fewer columns are easier to read.
    if len(runs) <= max(len(differences), 4):
        head = [_head("key"), *(_head(run.name) for run in runs)]
        rows = [
            f'<tr><th scope="row"><code>{_name(shortened(difference.key, _LONGEST_VALUE))}</code></th>'
            f"{''.join(map(cell, difference.values))}</tr>"
            for difference in differences
        ]
    else:
        head = [_head("run"), *(_head(shortened(difference.key, _LONGEST_VALUE)) for difference in differences)]
        rows = [
            f"<tr>{_row_head(run)}{''.join(cell(difference.values[index]) for difference in differences)}</tr>"
            for index, run in enumerate(runs)
        ]
    return [*parts, *_table(caption, head, rows), "</section>"]


def _time_shares(runs: Sequence[Run]) -> list[str]:
    rows = []
    for run in runs:
        shares = [(name, style, run.number(f"time_share.{name}")) for name, style in _SHARES]
        if all(share is None for _, _, share in shares):
            continue
        cells = [_row_head(run), f"<td>{_stack([(style, share or 0.0) for _, style, share in shares])}</td>"]
        cells += [
            f'<td class="number">{"–" if share is None else f"{100 * share:.0f} %"}</td>' for _, _, share in shares
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    if not rows:
        return []
    square = '<svg width="12" height="12" aria-hidden="true"><rect width="12" height="12" class="{}"/></svg>'
    keys = "".join(f'<span class="key">{square.format(style)}{name}</span>' for name, style in _SHARES)
    head = [_head("run"), _head("share of the training's time"), *(_head(name, number=True) for name, _ in _SHARES)]
    caption = "Mean of the ranks, since the last start of the run. Communication that computing hides is not counted."
    return ["<section><h2>Where the time went</h2>", f"<p>{keys}</p>", *_table(caption, head, rows), "</section>"]


def _stack(parts: Sequence[tuple[str, float]]) -> str:
    """A bar of parts, each a share of 1, from left to right."""
    rectangles, start = [], 0.0
    for style, share in parts:
        width = 100 * min(max(share, 0.0), 1.0)
        rectangles.append(f'<rect x="{start:.2f}" y="0" width="{width:.2f}" height="10" class="{style}"/>')
        start += width
    inner = "".join(rectangles)
    return f'<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">{inner}</svg>'


def _bytes(runs: Sequence[Run]) -> list[str]:
    per_step = {run.name: run.number("bytes_sent_per_step") for run in runs}
    largest = max((value for value in per_step.values() if value is not None), default=0.0)
    if not largest:
        return []
    head = [_head("run"), _head("sent per step, all ranks")]
    head += [
        _head(text, number=True) for text in ("per step", "per step and rank", "uncompressed", "ratio", "whole run")
    ]
    rows = []
    for run in runs:
        sent = per_step[run.name]
        if sent is None:
            continue
        ratio = run.number("compression_ratio")
        numbers = [
            show_bytes(sent),
            show_bytes(run.number("bytes_sent_per_step_per_rank")),
            show_bytes(run.number("bytes_uncompressed_per_step")),
            "–" if ratio is None else f"{ratio:.3g}",
            show_bytes(bytes_sent(run)),
        ]
        cells = [_row_head(run), f"<td>{_stack([('s0', sent / largest)])}</td>"]
        cells += [f'<td class="number">{_text(number)}</td>' for number in numbers]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    caption = "Ratio: uncompressed bytes by sent bytes. Whole run: since its last start, all ranks."
    return ["<section><h2>Bytes sent</h2>", *_table(caption, head, rows), "</section>"]


def _origins(runs: Sequence[Run]) -> list[str]:
    rows = []
    for run in runs:
        cells = [_row_head(run), f"<td><code>{_text(shortened(run.text('command') or '–', 400))}</code></td>"]
        cells.append(f"<td>{_text(shortened(run.text('end') or '–', 40))}</td>")
        cells.append(f"<td><code>{_text(shortened(str(run.path), 200))}</code></td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = [_head(text) for text in ("run", "command", "ended", "folder")]
    return ["<section><h2>Where the runs come from</h2>", *_table("", head, rows), "</section>"]
