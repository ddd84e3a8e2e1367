"""What an experiment tells of itself: its record, its metrics over time, reports."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model_checkpoint.database import EnhancedDatabaseConnection
from model_checkpoint.database.attempts import Attempt
from model_checkpoint.database.models import ExperimentRecord
from model_checkpoint.errors import ConfigurationError, ExperimentNotFoundError
from model_checkpoint.tracking.history import MetricHistory, history_of
from model_checkpoint.tracking.queries import Queries
from model_checkpoint.tracking.report import FORMATS, MAX_POINTS, Chart, Contents, render


class ExperimentReader:
    """The half of ``ExperimentTracker`` that reads."""

    experiment_id: str
    database: EnhancedDatabaseConnection

    def flush(self) -> None:
        """Write what is buffered, so that it can be read."""
        raise NotImplementedError

    @property
    def queries(self) -> Queries:
        """Questions about all experiments and checkpoints of this database."""
        return Queries(self.database)

    @property
    def record(self) -> ExperimentRecord:
        """The experiment as the database has it now: name, project, status, times, config, metadata and tags."""
        found = self.database.experiments.get(self.experiment_id)
        if found is None:
            raise ExperimentNotFoundError(f"experiment {self.experiment_id} is no longer in {self.database!r}")
        return found

    @property
    def captured(self) -> dict[str, Any] | None:
        """What the run needs to be repeated, as far as it was captured; None where ``capture`` forbade it.

        ``captured_at`` (Unix seconds), ``git``, ``command``, ``packages``, ``host`` and ``environment``, see
        ``Capture``; a part that could not be found out is None. ``resumed`` is a list of the command and the host of
        each time when the run was gone on with.
        """
        return self.database.experiments.captured(self.experiment_id)

    def get_metrics(self, metric_name: str | None = None) -> list[dict[str, Any]]:
        """Return what was logged, by any process, in the order logged.

        Args:
            metric_name: only this metric. Without it the system metrics, ``system/...``, are left out.

        Returns:
            Dicts with ``metric_name``, ``metric_value`` (float), ``step`` and ``timestamp`` (Unix seconds).
        """
        self.flush()
        return [
            {"metric_name": name, "metric_value": value, "step": step, "timestamp": at}
            for name, value, step, at in self.database.metrics.points(self.experiment_id, metric_name)
        ]

    def metric_history(self, name: str, max_points: int | None = 2000, *, attempt: int = 0) -> MetricHistory:
        """Return one metric over time, short enough to be drawn: its peaks are all there.

        Args:
            name: the metric.
            max_points: points at most, at least 4. A longer series is cut into stretches, of each of which the lowest
                and the highest point are returned; the database has them ready. None: every point.
            attempt: the number of an earlier attempt, see ``resume``; 0 is the run itself.

        Raises:
            KeyError: nothing was logged under this name.
            ConfigurationError: ``max_points`` is below 4.
        """
        if max_points is not None and max_points < 4:
            raise ConfigurationError(f"max_points must be at least 4 or None, not {max_points}")
        self.flush()
        metrics = self.database.metrics
        series = metrics.names(self.experiment_id, attempt)
        if name not in series:
            raise KeyError(f"no metric {name!r} was logged; there are {', '.join(series) or 'none'}")
        columns = metrics.columns(series[name]) if max_points is None else metrics.curve(series[name], max_points)
        return history_of(name, columns, metrics.summaries(self.experiment_id, attempt, system=True)[name].points)

    def metric_summaries(self) -> dict[str, dict[str, Any]]:
        """Return what is known of every metric but the system metrics, without reading its points.

        Returns:
            name -> ``points``, ``last``, ``last_step``, ``min``, ``min_step``, ``max``, ``max_step`` (the step of the
            first point that has it) and ``mean``. NaN counts for ``points`` and ``last`` only, where it is None.
        """
        self.flush()
        return {name: found.told() for name, found in self.database.metrics.summaries(self.experiment_id).items()}

    def generate_report(self, format_type: str = "html", output_dir: str = ".") -> str:
        """Write a report of the run: config, tags, a chart of every metric, checkpoints.

        Args:
            format_type: ``html`` (one file, no script, nothing from the network) or ``json``.
            output_dir: made when it does not exist.

        Returns:
            The path of the file, named after the experiment's id.

        Raises:
            ConfigurationError: the format is unknown.
            OSError: it cannot be written.
        """
        if format_type not in FORMATS:
            raise ConfigurationError(f"report format {format_type!r} is unknown; use one of {', '.join(FORMATS)}")
        path = Path(output_dir) / f"report_{self.experiment_id}.{format_type}"
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoints = self.database.checkpoints.of_experiment(self.experiment_id)
        text = render(format_type, Contents(self.record, checkpoints, self.get_metrics, self._charts))
        unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            unfinished.write_text(text, encoding="utf-8")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        return str(path)

    def _charts(self) -> Iterator[Chart]:
        self.flush()
        metrics = self.database.metrics
        summaries = metrics.summaries(self.experiment_id)
        series = metrics.names(self.experiment_id)  # read second: it has every name of the first
        for name, summary in summaries.items():
            if summary.points:
                yield Chart(name, metrics.curve(series[name], MAX_POINTS), summary.told())

    @property
    def attempts(self) -> list[Attempt]:
        """What was logged after checkpoints to which the run went back, the first one first; see ``resume``."""
        return self.database.attempts.of(self.experiment_id)
