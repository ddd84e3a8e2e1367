"""What users pass to a tracker, checked once at the edge."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from model_checkpoint.database import EnhancedDatabaseConnection
from model_checkpoint.database.models import ExperimentRecord
from model_checkpoint.errors import ConfigurationError
from model_checkpoint.utils.jsonable import dumps, short_text, text, to_jsonable


def described(
    name: str, project: str | None, tags: Any, config: Mapping[str, Any] | None, metadata: Mapping[str, Any] | None
) -> ExperimentRecord:
    """Return the record of a new experiment; raises UnsupportedValueError or ConfigurationError for what cannot be."""
    return ExperimentRecord(
        id=str(uuid.uuid4()),
        name=text(name, "experiment_name"),
        project=None if project is None else text(project, "project_name"),
        created_at=time.time(),
        config=plain_mapping(config, "config"),
        metadata=plain_mapping(metadata, "metadata"),
        tags=plain_tags(tags),
    )


def plain_mapping(value: Mapping[str, Any] | None, path: str) -> dict[str, Any]:
    """Return ``value`` as plain JSON types; None is nothing."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{path} must be a dict of names and values, not {type(value).__name__}")
    made: dict[str, Any] = to_jsonable(value, path)
    return made


def plain_tags(tags: Any) -> tuple[Any, ...]:
    """Return tags as plain JSON types; a single one may stand for itself."""
    if tags is None:
        return ()
    many = isinstance(tags, (list, tuple, set, frozenset))
    return tuple(to_jsonable(list(tags) if many else [tags], "tags"))


def check_lengths(database: EnhancedDatabaseConnection, tags: Iterable[Any], project: str | None = None) -> None:
    """Refuse what is too long to be a key in this database."""
    for place, tag in enumerate(tags):
        short_text(dumps(tag), f"tags[{place}]", database.max_name)
    if project is not None:
        short_text(project, "project_name", database.max_name)
