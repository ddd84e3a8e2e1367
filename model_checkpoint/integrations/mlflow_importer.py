"""Runs of MLflow: from its SQLite database, or from an ``mlruns`` folder."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from model_checkpoint.database.columns import Point
from model_checkpoint.errors import ConfigurationError, FormatError
from model_checkpoint.integrations.importing import ImportedRun, OnRun, SQLiteSource, store_runs
from model_checkpoint.utils.jsonable import LARGEST

_NEEDED = {
    "experiments": ("experiment_id", "name", "lifecycle_stage"),
    "runs": ("run_uuid", "name", "status", "start_time", "end_time", "lifecycle_stage", "experiment_id"),
    "params": ("key", "value", "run_uuid"),
    "metrics": ("key", "value", "timestamp", "run_uuid", "step", "is_nan"),
    "tags": ("key", "value", "run_uuid"),
}
_ADVICE = "Name the file of MLflow's sqlite:/// URI; 'mlflow db upgrade' brings one of an old version up to date"
_STATUSES = {"FINISHED": "completed", "FAILED": "failed"}  # any other has not come to its end: interrupted
_CODES = {"1": "RUNNING", "2": "SCHEDULED", "3": "FINISHED", "4": "FAILED"}  # what an mlruns folder has for them
_UNFINISHED = ("RUNNING", "SCHEDULED")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "a": "\a", "b": "\b", "e": "\x1b", "f": "\f", "v": "\v"}
_ESCAPES |= {"N": "\x85", "_": "\xa0", "L": "\u2028", "P": "\u2029"}
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))", re.DOTALL)

log = logging.getLogger(__name__)


def import_mlflow(
    path: str | Path, database_url: str = "sqlite:///experiments.db", *, on_run: OnRun | None = None
) -> list[str]:
    """Import every run of an MLflow store that was not deleted there; a run that was imported before is left alone.

    A run that has not ended is left out, which a warning says: what comes after it was imported would never be. The
    experiment's name becomes the project. Parameters become the config, as numbers where they are written as Python
    writes the number: ``3.10`` stays a text. Tags go to ``metadata["mlflow_tags"]``, nested runs under their parents,
    and every point of every metric keeps its step and time. Artifacts and models are not imported. The store is only
    read.

    Args:
        path: the SQLite file, or an ``mlruns`` folder.
        database_url: where to; see ``EnhancedDatabaseConnection``.
        on_run: called with the name of each run once it is stored.

    Returns:
        The ids of the experiments, one for each run.

    Raises:
        ConfigurationError: there is no such store; nothing was imported.
        FormatError: a file of the store is damaged; runs before that one are imported.
        UnsupportedValueError, DatabaseError: see ``store_runs``.
    """
    path = Path(path)
    if path.is_dir():
        return store_runs(list(_runs_of_folder(path)), database_url, on_run)
    with contextlib.closing(SQLiteSource(path, "MLflow", _NEEDED, _ADVICE)) as source:
        return store_runs(list(_runs_of_database(source, path)), database_url, on_run)


def _runs_of_database(source: SQLiteSource, path: Path) -> Iterator[ImportedRun]:
    sql = (
        "SELECT r.run_uuid, r.name, r.status, CAST(r.start_time AS INTEGER), CAST(r.end_time AS INTEGER), e.name "
        "FROM runs r JOIN experiments e ON e.experiment_id = r.experiment_id "
        "WHERE r.lifecycle_stage = 'active' AND e.lifecycle_stage = 'active' ORDER BY r.start_time, r.run_uuid"
    )
    for run_id, name, status, start, end, project in source.rows(sql):
        if not _has_ended(status, run_id, path):
            continue
        params, tags = (
            {str(key): "" if value is None else str(value) for key, value in source.rows(sql, {"id": run_id})}
            for sql in (f"SELECT key, value FROM {table} WHERE run_uuid = :id" for table in ("params", "tags"))
        )
        fields = (name, status, start, end)
        yield _run(path, run_id, str(project), fields, params, tags, partial(_points, source, run_id))


def _points(source: SQLiteSource, run_id: str) -> Iterator[Point]:
    sql = (
        "SELECT key, CAST(value AS REAL), CAST(step AS INTEGER), CAST(timestamp AS INTEGER) / 1000.0, is_nan "
        "FROM metrics WHERE run_uuid = :id"
    )
    for name, value, step, at, is_nan in source.rows(sql, {"id": run_id}):
        if is_nan:
            value = math.nan
        elif abs(value) >= LARGEST:  # what MLflow's database has for infinity
            value = math.copysign(math.inf, value)
        yield str(name), value, step, at


def _run(
    path: Path,
    run_id: str,
    project: str,
    fields: tuple[Any, Any, Any, Any],
    params: dict[str, str],
    tags: dict[str, str],
    points: Callable[[], Iterator[Point]],
) -> ImportedRun:
    name, status, start, end = fields
    return ImportedRun(
        tool="mlflow",
        source=str(path),
        run_id=run_id,
        name=tags.get("mlflow.runName") or name or run_id,
        project=project,
        points=points,
        parent=tags.get("mlflow.parentRunId"),
        status=_STATUSES.get(status, "interrupted"),
        created_at=None if start is None else start / 1000,  # [ms] -> [s]
        ended_at=None if end is None else end / 1000,
        config={key: _number_or_text(value) for key, value in params.items()},
        metadata={"mlflow_tags": tags},
    )


def _has_ended(status: str, run_id: str, path: Path) -> bool:
    if status in _UNFINISHED:
        log.warning(
            "run %s of %s is %s and was not imported. Import again when it has ended; if its process is gone, end it "
            "with MlflowClient().set_terminated(run_id, 'KILLED')",
            *(run_id, path, status),
        )
    return status not in _UNFINISHED


def _number_or_text(value: str) -> int | float | str:
    # Python reads no integer of more than 4,300 digits; one of more than 300 is no number that anybody compares.
    if len(value) > 300 or not _NUMBER.fullmatch(value):
        return value
    number: int | float = json.loads(value)
    return number if repr(number) == value else value  # 3.10 may be a version


def _runs_of_folder(path: Path) -> Iterator[ImportedRun]:
    experiments = [folder for folder in sorted(path.iterdir()) if (folder / "meta.yaml").is_file()]
    if not experiments:
        raise ConfigurationError(
            f"{path} is no mlruns folder: none of its folders has a meta.yaml. Name the folder of MLflow's file URI, "
            "or the file of its SQLite database"
        )
    for experiment in experiments:
        about = _meta(experiment / "meta.yaml")
        if about.get("lifecycle_stage") == "deleted":
            continue
        for folder in sorted(experiment.iterdir()):
            if (folder / "meta.yaml").is_file():
                run = _meta(folder / "meta.yaml")
                status = _CODES.get(run.get("status", ""), "")
                if run.get("lifecycle_stage") != "deleted" and _has_ended(status, folder.name, path):
                    yield _run_of_folder(path, folder, about.get("name", experiment.name), run)


def _run_of_folder(path: Path, folder: Path, project: str, about: dict[str, str]) -> ImportedRun:
    status = about.get("status", "")
    start, end = (int(about[name]) if about.get(name, "").isdecimal() else None for name in ("start_time", "end_time"))
    params, tags = ({name: _text(file) for name, file in _files(folder / part)} for part in ("params", "tags"))
    fields = (about.get("run_name"), _CODES.get(status, status), start, end)
    return _run(path, folder.name, project, fields, params, tags, partial(_points_of_folder, folder / "metrics"))


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the name and file of every metric, parameter or tag; a name with slashes is a path."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            yield file.relative_to(folder).as_posix(), file


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{file} is no text in UTF-8: {error}; mend it, or remove it, and import again") from error


def _points_of_folder(folder: Path) -> Iterator[Point]:
    for name, file in _files(folder):
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break  # a writer that is not done with it, or was killed
                try:
                    # Behind them MLflow may say which data set the metric is of. Its oldest files have no step.
                    at, value, step = [*line.split(), b"0"][:3]
                    point = name, float(value), int(step), int(at) / 1000
                except ValueError as error:
                    raise FormatError(
                        f"{file}, line {number} is not 'timestamp value step': {error}; this run was not imported. "
                        "Mend the line, or remove it, and import again"
                    ) from error
                yield point


def _meta(file: Path) -> dict[str, str]:
    """Return the flat keys of a meta.yaml that MLflow wrote, all as text: a scalar, plain or quoted, for each."""
    found: dict[str, str] = {}
    # YAML breaks a long text at a space and indents the rest.
    for entry in re.split(r"\n(?=\S)", _text(file)):
        key, colon, value = entry.partition(":")
        if colon:
            found[key] = _scalar(value.strip())
    return found


def _scalar(value: str) -> str:
    quote = value[:1]
    if quote == '"':
        value = re.sub(r"\\\n\s*", "", value)  # broken within a word
    # One line break is a space, and each empty line after it one line break.
    value = re.sub(r" *\n[\s]*", lambda gap: "\n" * (gap[0].count("\n") - 1) or " ", value)
    if quote == '"':
        return _ESCAPE.sub(_unescaped, value[1:-1])
    return value[1:-1].replace("''", "'") if quote == "'" else value


def _unescaped(match: re.Match[str]) -> str:
    code = match[1] or match[2] or match[3]
    return chr(int(code, 16)) if code else _ESCAPES.get(match[4], match[4])
