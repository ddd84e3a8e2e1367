"""Reports of one experiment. Everything that a user named is escaped; the page has no script and loads nothing."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from model_checkpoint.database.columns import Columns
from model_checkpoint.database.models import CheckpointRecord, ExperimentRecord
from model_checkpoint.utils.jsonable import escape

Checkpoints = Sequence[CheckpointRecord]
MAX_POINTS = 2000  # a chart's line; more cannot be seen and only makes the file large

_WIDTH, _HEIGHT = 640, 200  # of a chart, in CSS pixels

_STYLE = """
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem}
h1{line-height:1.2}h2{margin-top:2.5rem}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{text-align:left;padding:.35rem .75rem .35rem 0;border-bottom:1px solid #8884}
td{vertical-align:top;overflow-wrap:anywhere}
.tag{border:1px solid #8888;border-radius:1rem;padding:.1rem .6rem;margin-right:.4rem;font-size:.85rem}
figure{margin:1.5rem 0}figcaption{font-weight:600}small{font-weight:400;opacity:.7;margin-left:.5rem}
svg{width:100%;height:auto}
.line{fill:none;stroke:#3273dc;stroke-width:2;vector-effect:non-scaling-stroke}
.axis{stroke:#8886;stroke-width:1}text{font-size:12px;fill:currentColor}
"""


@dataclasses.dataclass(frozen=True)
class Chart:
    """One metric as it is drawn.

    Attributes:
        name: the metric.
        curve: ``MAX_POINTS`` of its points at most, the first and the last one and its peaks among them.
        summary: of all its points, as ``ExperimentTracker.metric_summaries`` returns it.
    """

    name: str
    curve: Columns
    summary: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a report is made of; a format asks for what it needs of the metrics.

    Attributes:
        experiment: whose report it is.
        checkpoints: its checkpoints, oldest first.
        points: returns every point in the order logged, as ``ExperimentTracker.get_metrics`` does.
        charts: returns its metrics in the order in which they were first logged.
    """

    experiment: ExperimentRecord
    checkpoints: Checkpoints
    points: Callable[[], Sequence[Mapping[str, Any]]]
    charts: Callable[[], Iterable[Chart]]


def render(format_type: str, contents: Contents) -> str:
    """Return the report's text; ``format_type`` is a name of ``FORMATS``."""
    return FORMATS[format_type](contents)


def _json(contents: Contents) -> str:
    content = {
        "experiment": dataclasses.asdict(contents.experiment),
        "metrics": list(contents.points()),
        "checkpoints": [{**vars(c), "best": sorted(c.best)} for c in contents.checkpoints],
    }
    return json.dumps(escape(content), indent=1, allow_nan=False)


def _html(contents: Contents) -> str:
    experiment = contents.experiment
    name = html.escape(experiment.name)
    facts = {
        "Project": experiment.project,
        "Status": experiment.status,
        "Started": _time(experiment.created_at),
        "Ended": _time(experiment.ended_at),
        "Experiment id": experiment.id,
    }
    tags = "".join(f'<span class="tag">{html.escape(_short(tag))}</span>' for tag in experiment.tags)
    parts = [
        f"<h1>{name}</h1><p>{tags}</p>",
        _table(["", ""], [[key, value] for key, value in facts.items() if value is not None]),
        _section("Config", _table(["Name", "Value"], [[k, _short(v)] for k, v in experiment.config.items()])),
        _section("Metrics", "".join(map(_chart, contents.charts()))),
        _section("Checkpoints", _checkpoint_table(contents.checkpoints)),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<h2>{title}</h2>{content or '<p>None.</p>'}"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    if not rows:
        return ""
    top = "<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>" if any(head) else ""
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{top}{body}</table>"


def _checkpoint_table(checkpoints: Checkpoints) -> str:
    head = ["Checkpoint", "Epoch", "Step", "Loss", "Val loss", "Best", "Size", "Notes"]
    rows = [
        [
            c.id,
            c.epoch,
            c.step,
            _number(c.loss),
            _number(c.val_loss),
            ", ".join(sorted(c.best)),
            f"{c.size:,} bytes",
            c.notes or "",
        ]
        for c in checkpoints
    ]
    return _table(head, rows)


def _chart(chart: Chart) -> str:
    name, curve, steps = html.escape(chart.name), chart.curve, chart.curve.all_steps()
    # Without steps it is drawn over its places among all points of the run.
    places = [float(place if step is None else step) for place, step in zip(curve.positions, steps)]
    finite = [(x, y) for x, y in zip(places, curve.values) if y - y == 0]
    facts = f"last {_number(curve.values[-1])}, {chart.summary['points']:,} points"
    if not finite:
        return f"<figure><figcaption>{name}</figcaption><p>No finite value: {facts}.</p></figure>"
    (low_x, high_x), (low_y, high_y) = [(min(values), max(values)) for values in zip(*finite)]
    facts = f"{facts}, from {_number(chart.summary['min'])} to {_number(chart.summary['max'])}"
    wide, high = (high_x - low_x) or 1.0, (high_y / 2 - low_y / 2) or 1.0  # halves: the difference may overflow
    line = " ".join(
        f"{(x - low_x) / wide * _WIDTH:.1f},{_HEIGHT - (y / 2 - low_y / 2) / high * _HEIGHT:.1f}" for x, y in finite
    )
    if len(finite) == 1:
        line = f"0,{_HEIGHT} {_WIDTH},{_HEIGHT}"
    unit = "point" if steps[0] is None else "step"
    return (
        f"<figure><figcaption>{name} <small>{facts}</small></figcaption>"
        f'<svg viewBox="-4 -4 {_WIDTH + 8} {_HEIGHT + 24}" role="img" aria-label="{name}">'
        f'<line class="axis" x1="0" y1="{_HEIGHT}" x2="{_WIDTH}" y2="{_HEIGHT}"/>'
        f'<polyline class="line" points="{line}"/>'
        f'<text x="0" y="{_HEIGHT + 16}">{unit} {low_x:g}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT + 16}" text-anchor="end">{unit} {high_x:g}</text></svg></figure>'
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(escape(value))


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


FORMATS: dict[str, Callable[[Contents], str]] = {"html": _html, "json": _json}
