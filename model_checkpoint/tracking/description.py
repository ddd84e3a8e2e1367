"""What an experiment says of itself besides its metrics: config, tags, metadata, its project."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model_checkpoint.errors import ConfigurationError
from model_checkpoint.tracking.arguments import check_lengths, plain_mapping, plain_tags
from model_checkpoint.tracking.experiment_reader import ExperimentReader


class ExperimentDescription(ExperimentReader):
    """The part of ``ExperimentTracker`` that describes the run."""

    project_name: str | None
    version: int

    def log_hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Merge ``values`` into the config; names that exist are replaced.

        Raises:
            UnsupportedValueError: a part that cannot be stored; the text names its path.
        """
        self.database.experiments.update_config(self.experiment_id, plain_mapping(values, "config"))
        self.version += 1

    def add_tags(self, tags: Any) -> None:
        """Add tags, a list of JSON values or a single one; those that are there already stay where they are."""
        new = plain_tags(tags)
        check_lengths(self.database, new)
        self.database.experiments.add_tags(self.experiment_id, new)
        self.version += 1

    def update_metadata(self, values: Mapping[str, Any]) -> None:
        """Merge ``values`` into the metadata; names that exist are replaced.

        Raises:
            UnsupportedValueError: a part that cannot be stored; the text names its path.
        """
        self.database.experiments.update_metadata(self.experiment_id, plain_mapping(values, "metadata"))

    def describe_project(self, tags: Any = None, metadata: Mapping[str, Any] | None = None) -> None:
        """Add tags to the project of this experiment and merge into its metadata; see ``Queries.projects``.

        Raises:
            ConfigurationError: the experiment is in no project.
            UnsupportedValueError: a part that cannot be stored; the text names its path.
        """
        if self.project_name is None:
            raise ConfigurationError(f"{self!r} is in no project; give it a project_name when it is made")
        new, merged = plain_tags(tags), plain_mapping(metadata, "metadata")
        self.database.experiments.describe_project(self.project_name, new, merged)
