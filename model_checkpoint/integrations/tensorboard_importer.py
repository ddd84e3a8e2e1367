"""Runs of TensorBoard, from the event files of a log folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from model_checkpoint.database.columns import Point
from model_checkpoint.errors import ConfigurationError, FormatError
from model_checkpoint.integrations.event_files import read_scalars, started_at
from model_checkpoint.integrations.importing import ImportedRun, OnRun, store_runs

_PATTERN = "*.tfevents.*"  # what TensorBoard itself looks for; their names begin with "events.out"

log = logging.getLogger(__name__)


def import_tensorboard(
    folder: str | Path, database_url: str = "sqlite:///experiments.db", *, on_run: OnRun | None = None
) -> list[str]:
    """Import the scalars of every run of a TensorBoard log folder; a run that was imported before is left alone.

    A run is a folder with event files, at any depth; its name is its path below ``folder``, and the project is the
    name of ``folder``. An event file that was cut off, by a writer that was killed or still writes, counts as far as
    it goes. So does a damaged one, which a warning names. Event files do not say how a run ended: all count as
    completed. They are only read.

    Args:
        folder: the log folder.
        database_url: where to; see ``EnhancedDatabaseConnection``.
        on_run: called with the name of each run once it is stored.

    Returns:
        The ids of the experiments, one for each run.

    Raises:
        ConfigurationError: there is no such folder, or no event file in it; nothing was imported.
        UnsupportedValueError, DatabaseError: see ``store_runs``.
        OSError: a file cannot be read; runs before that one are imported.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigurationError(f"there is no folder {folder}; name the log folder that TensorBoard is started with")
    runs = list(_runs(folder))
    if not runs:
        raise ConfigurationError(f"{folder} has no event files (events.out.tfevents.*) in it or below; check the path")
    return store_runs(runs, database_url, on_run)


def _runs(folder: Path) -> Iterator[ImportedRun]:
    root = folder.resolve().name
    for place in sorted({file.parent for file in folder.rglob(_PATTERN) if file.is_file()}):
        files = sorted(file for file in place.glob(_PATTERN) if file.is_file())
        name = place.relative_to(folder).as_posix()
        yield ImportedRun(
            tool="tensorboard",
            source=str(folder),
            # Runs have no id. A file's name holds its second, host and process, which two runs of one name differ in.
            run_id=f"{name}/{files[0].name}",
            name=root if name == "." else name,
            project=root,
            points=partial(_points, files),
            created_at=_started(files[0]),
        )


def _points(files: list[Path]) -> Iterator[Point]:
    for file in files:
        try:
            yield from read_scalars(file)
        except FormatError as error:
            log.warning("%s; what is before it is imported, and the rest of this file is not", error)


def _started(file: Path) -> float:
    try:
        began = started_at(file)
    except FormatError:
        began = None  # it is warned of when it is read for its points
    return file.stat().st_mtime if began is None else began
