"""Runs of trackio, from the SQLite file of a project."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from model_checkpoint.database.columns import Point
from model_checkpoint.errors import FormatError
from model_checkpoint.integrations.importing import ImportedRun, OnRun, SQLiteSource, store_runs
from model_checkpoint.utils.jsonable import to_number

_NEEDED = {
    "metrics": ("id", "timestamp", "run_name", "step", "metrics"),
    "configs": ("run_name", "config", "created_at"),
}
_ADVICE = "Name the file of the project, <project>.db in trackio's folder (the variable TRACKIO_DIR)"
_FLOATS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # JSON has none of them
_MEND = "this run was not imported. Mend that row, or delete it, in a copy of the file, and import that"

log = logging.getLogger(__name__)


def import_trackio(
    path: str | Path, database_url: str = "sqlite:///experiments.db", *, on_run: OnRun | None = None
) -> list[str]:
    """Import every run of a trackio project; a run that was imported before is left alone.

    The project is the file's name. What trackio adds to a config itself goes to ``metadata["trackio"]``. Logged values
    that are no numbers (texts, images, tables) are not imported, which a warning says, nor are system metrics; integers
    that are too large for a float become infinite. trackio does not store how a run ended: all count as completed. The
    file is only read.

    Args:
        path: the SQLite file.
        database_url: where to; see ``EnhancedDatabaseConnection``.
        on_run: called with the name of each run once it is stored.

    Returns:
        The ids of the experiments, one for each run.

    Raises:
        ConfigurationError: there is no such database; nothing was imported.
        FormatError: it is damaged; runs before the one that could not be read are imported.
        UnsupportedValueError, DatabaseError: see ``store_runs``.
    """
    path = Path(path)
    with contextlib.closing(SQLiteSource(path, "trackio", _NEEDED, _ADVICE)) as source:
        return store_runs(list(_runs(source, path)), database_url, on_run)


def _runs(source: SQLiteSource, path: Path) -> Iterator[ImportedRun]:
    # Old versions know a run by its name alone.
    has_ids = {"run_id"} <= {*source.columns("metrics")} & {*source.columns("configs")}
    key = "COALESCE(run_id, run_name)" if has_ids else "run_name"
    configs = {
        run: (_json(config, path, run), _seconds(created, path, run))
        for run, config, created in source.rows(f"SELECT {key}, config, created_at FROM configs")
    }
    names = dict(source.rows(f"SELECT {key}, run_name FROM configs"))
    names |= dict(source.rows(f"SELECT {key}, run_name FROM metrics GROUP BY {key} ORDER BY MIN(id)"))
    for run, name in names.items():
        config, created = configs.get(run, ({}, None))
        yield ImportedRun(
            tool="trackio",
            source=str(path),
            run_id=run if run != name else f"{path.stem}/{name}/{_digest(source, key, run)}",
            name=name,
            project=path.stem,
            points=partial(_points, source, path, key, run),
            created_at=created,
            config={name: value for name, value in config.items() if not name.startswith("_")},
            metadata={"trackio": {name: value for name, value in config.items() if name.startswith("_")}},
        )


def _digest(source: SQLiteSource, key: str, run: str) -> str:
    """Return what tells runs of one name in projects of one name apart: their first row, which stays as it is."""
    metrics = f"SELECT timestamp, step, metrics FROM metrics WHERE {key} = :run ORDER BY id LIMIT 1"
    config = f"SELECT created_at, config FROM configs WHERE {key} = :run ORDER BY created_at LIMIT 1"
    first = next((row for sql in (metrics, config) for row in source.rows(sql, {"run": run})), ())
    return hashlib.sha256(repr(first).encode()).hexdigest()[:16]


def _points(source: SQLiteSource, path: Path, key: str, run: str) -> Iterator[Point]:
    sql = f"SELECT timestamp, CAST(step AS INTEGER), metrics FROM metrics WHERE {key} = :run ORDER BY id"
    left_out: dict[str, int] = {}
    for timestamp, step, metrics in source.rows(sql, {"run": run}):
        at = _seconds(timestamp, path, run)
        for name, value in _json(metrics, path, run).items():
            if isinstance(value, (int, float)):
                yield name, to_number(value, f"metrics.{name}"), step, at
            else:
                left_out[name] = left_out.get(name, 0) + 1
    if left_out:
        log.warning(
            "run %s of %s: values that are no numbers were not imported: %s",
            *(run, path, ", ".join(f"{count} of {name}" for name, count in left_out.items())),
        )


def _json(content: str | bytes, path: Path, run: str) -> dict[str, Any]:
    try:
        # Python reads no integer of more than 4,300 digits, and makes no float of one of more than 308.
        found = json.loads(content, parse_int=lambda digits: int(digits) if len(digits) <= 300 else float(digits))
        if not isinstance(found, dict):
            raise ValueError(f"it is no object but {found!r:.50}")
    except (ValueError, TypeError, RecursionError) as error:
        raise FormatError(f"run {run} of {path} has a row that is no JSON of trackio's: {error}; {_MEND}") from error
    return {name: _decoded(value) for name, value in found.items()}


def _decoded(value: Any) -> Any:
    if isinstance(value, str):
        return _FLOATS.get(value, value)
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return {name: _decoded(item) for name, item in value.items()} if isinstance(value, dict) else value


def _seconds(timestamp: Any, path: Path, run: str) -> float:
    """Return Unix seconds of a time as trackio writes it; old versions wrote local time, without a zone."""
    try:
        return datetime.fromisoformat(timestamp.replace("Z", "+00:00")).timestamp()  # Python 3.10 reads no Z
    except (ValueError, AttributeError, OverflowError) as error:
        raise FormatError(f"run {run} of {path} has the time {timestamp!r}: {error}; {_MEND}") from error
