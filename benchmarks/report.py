"""How the benchmarks tell what they found: progress, a table, figures to reach, JSON and a picture."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")
RESULTS = Path(__file__).with_name("results")
PACKAGES = ("model-checkpoint", "torch", "safetensors", "orbax-checkpoint", "jax", "tensorstore", "numpy")


@dataclass
class Section:
    """Measurements of one kind; the first of each row, which warms up, counts apart.

    Attributes:
        title: what was measured.
        nbytes: bytes that each row works through, for GB/s; 0 where that says nothing.
        unit: ``s``, ``ms``, ``MiB`` or ``x``; what the values are in.
        rows: what -> values in the order of the rounds.
    """

    title: str
    nbytes: int = 0
    unit: str = "s"
    rows: dict[str, list[float]] = field(default_factory=dict)

    def add(self, row: str, value: float) -> None:
        """Append a value."""
        self.rows.setdefault(row, []).append(value)

    def timed(self, row: str, work: Callable[[], Any]) -> Any:
        """Add the seconds that ``work`` takes; returns what it returns."""
        start = time.perf_counter()
        result = work()
        self.add(row, time.perf_counter() - start)
        return result

    def stopwatch(self) -> Callable[[str], None]:
        """Return a function that adds the seconds since now to the row that it is called with."""
        start = time.perf_counter()
        return lambda row: self.add(row, time.perf_counter() - start)

    def median(self, row: str) -> float:
        """Return the median of all rounds but the first."""
        return statistics.median(self.rows[row][1:])


@dataclass(frozen=True)
class Figure:
    """Something to reach: ``value`` shall be at most ``limit``; None only reports it."""

    name: str
    value: float
    limit: float | None
    unit: str = "x"

    @property
    def reached(self) -> bool:
        return self.limit is None or self.value <= self.limit


def ratio(name: str, section: Section, row: str, other: str, limit: float | None) -> Figure:
    """Return the median of a row as a multiple of another's."""
    return Figure(name, section.median(row) / section.median(other), limit)


def arguments(description: str | None, states: tuple[str, ...]) -> argparse.Namespace:
    """Parse the options that all of the benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each row, after one to warm up")
    parser.add_argument("--state", choices=states, action="append", help="may be given again; all when left out")
    parser.add_argument("--folder", type=Path, help="where to save, to choose the disk; a temporary one when left out")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a figure is missed")
    options = parser.parse_args()
    options.state = options.state or list(states)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


def shuffled(items: list[Item], i: int) -> list[Item]:
    """Return the items in an order that depends on the round ``i``; in their own for the first one, 0."""
    return random.Random(i).sample(items, len(items)) if i else items


def progress(text: str) -> None:
    """Show what is going on, in one line on stderr; an empty text wipes it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def machine(folder: Path, packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return what the numbers depend on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cores": str(len(os.sched_getaffinity(0))),
        "processor": _processor(),
        "memory": f"{memory:.1f} GiB",
        "file system": _file_system(folder),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        **({"torch threads": str(sys.modules["torch"].get_num_threads())} if "torch" in sys.modules else {}),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


def _file_system(folder: Path) -> str:
    """Return the type of the folder's file system and what it lies on."""
    device = folder.stat().st_dev
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == f"{os.major(device)}:{os.minor(device)}":
            return " on ".join(fields[fields.index("-") + 1 :][:2])
    return "unknown"


def tell(name: str, facts: dict[str, str], sections: list[Section], figures: list[Figure]) -> None:
    """Print the table, and write it as JSON and as a picture."""
    progress("")
    print("; ".join(f"{key} {value}" for key, value in facts.items()))
    for section in sections:
        _print_section(section)
    print(f"\n{'figure':60}{'found':>12}{'to reach':>12}")
    for figure in figures:
        limit = "reported" if figure.limit is None else f"≤ {figure.limit:g}"
        verdict = "" if figure.limit is None else "reached" if figure.reached else "MISSED"
        print(f"{figure.name:60}{_shown(figure.value, figure.unit):>12}{limit:>12}  {verdict}")
    RESULTS.mkdir(exist_ok=True)
    found = {
        "machine": facts,
        "sections": [
            {
                **vars(section),
                "first": {row: values[0] for row, values in section.rows.items()},
                "median": {row: section.median(row) for row in section.rows},
            }
            for section in sections
        ],
        "figures": [{**vars(figure), "reached": figure.reached} for figure in figures],
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1))
    _draw(RESULTS / f"{name}.png", sections)
    print(f"\nwritten: {RESULTS / name}.json and .png")


def _print_section(section: Section) -> None:
    ours = next((row for row in section.rows if row.startswith("ours")), None)
    rounds = max(map(len, section.rows.values())) - 1
    print(f"\n{section.title}, {rounds} rounds\n{'':52}" + "".join(f"{name:>10}" for name in _COLUMNS))
    for row, values in section.rows.items():
        middle = section.median(row)
        cells = [_shown(value, section.unit) for value in (values[0], middle, min(values[1:]), max(values[1:]))]
        cells.append(f"{section.nbytes / middle / 1e9:.2f}" if section.nbytes else "")
        cells.append(f"{middle / section.median(ours):.2f}" if ours else "")
        print(f"{row:52}" + "".join(f"{cell:>10}" for cell in cells))


_COLUMNS = ("first", "median", "min", "max", "GB/s", "÷ ours")


def _shown(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value:.3f} s" if value >= 0.1 else f"{value * 1e3:.2f} ms"
    return f"{value:.2f} {unit}"


def _draw(path: Path, sections: list[Section]) -> None:
    """Draw the medians as bars, with whiskers from the least to the greatest value."""
    from matplotlib.figure import Figure as Canvas

    heights = [len(section.rows) + 1.5 for section in sections]
    canvas = Canvas(figsize=(11, 0.28 * sum(heights) + 0.5), layout="constrained")
    axes = canvas.subplots(len(sections), squeeze=False, height_ratios=heights)[:, 0]
    for axis, section in zip(axes, sections):
        rows = list(section.rows)
        middles = [section.median(row) for row in rows]
        least = [middle - min(section.rows[row][1:]) for row, middle in zip(rows, middles)]
        most = [max(section.rows[row][1:]) - middle for row, middle in zip(rows, middles)]
        axis.barh(rows, middles, xerr=[least, most], color=list(map(_color, rows)), error_kw={"elinewidth": 0.8})
        for row, middle, reach in zip(rows, middles, most):
            speed = f" ({section.nbytes / middle / 1e9:.2f} GB/s)" if section.nbytes else ""
            axis.annotate(f" {_shown(middle, section.unit)}{speed}", (middle + reach, row), va="center", fontsize=7)
        axis.invert_yaxis()
        axis.margins(x=0.2)
        axis.set_xlim(left=min(0, *middles))
        axis.set_title(section.title, fontsize=9, loc="left")
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    canvas.savefig(path, dpi=130)


def _color(row: str) -> str:
    return "#d1495b" if row.startswith("ours") else "#c8ccd0" if row.startswith("limit") else "#6c8ebf"
