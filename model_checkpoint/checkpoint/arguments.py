"""What users pass to the manager, checked once at the edge."""

from __future__ import annotations

import inspect
import operator
import re
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any

from model_checkpoint.errors import CheckpointNotFoundError, ConfigurationError, UnsupportedValueError
from model_checkpoint.utils.jsonable import text, to_number
from model_checkpoint.utils.names import is_id

NAMED_TYPES = ("latest", "best_loss", "best_val_loss", "best_metric", "best:<metric>")
_LABEL = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")


def check_at_least_one(**values: int | None) -> None:
    """Raise ConfigurationError unless each value is an integer from 1, or None where that has a meaning."""
    for name, value in values.items():
        if name in ("max_checkpoints", "io_threads", "max_shard_size") and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigurationError(f"{name} must be an integer of at least 1, not {value!r}")


def check_flags(**values: object) -> None:
    """Raise ConfigurationError unless each value is True or False, NumPy's too; a text ("no") would count as True."""
    for name, value in values.items():  # NumPy's by their type's name: this must not import it
        if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
            raise ConfigurationError(f"{name} must be True or False, not {value!r}")


def check_seconds(**values: object) -> None:
    """Raise ConfigurationError unless each value is a number of seconds that a thread can wait, or None."""
    for name, value in values.items():
        if value is None:
            continue
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= threading.TIMEOUT_MAX:
            raise ConfigurationError(
                f"{name} must be seconds from 0 to {threading.TIMEOUT_MAX:.0f}, or None for no limit, not {value!r}"
            )


def check_id(checkpoint_id: object) -> None:
    """Raise CheckpointNotFoundError for what cannot be the id of a checkpoint."""
    if not is_id(checkpoint_id):
        raise CheckpointNotFoundError(repr(checkpoint_id), "ids are what save_checkpoint() returned, UUIDs as text")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise ConfigurationError unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigurationError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def integers(**values: Any) -> list[int]:
    """Return the values as 64-bit integers; raises UnsupportedValueError or ConfigurationError for one that is none."""
    numbers = []
    for name, value in values.items():
        try:
            number = operator.index(value)
        except TypeError:
            raise UnsupportedValueError(name, value, "it must be an integer") from None
        if not -(2**63) <= number < 2**63:
            raise ConfigurationError(f"{name} {number} does not fit into 64 bits")
        numbers.append(number)
    return numbers


def label(name: str) -> str:
    """Return ``name`` if it can be a checkpoint type to save under, else raise ConfigurationError."""
    if not isinstance(name, str) or not _LABEL.fullmatch(name) or name in NAMED_TYPES:
        raise ConfigurationError(
            f"checkpoint_type {name!r} cannot be a label; use letters, digits, '_', '.' and '-', with a letter first, "
            f"and none of {', '.join(NAMED_TYPES)}"
        )
    return name


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return metrics as floats by name; raises UnsupportedValueError for a name or value that is none."""
    if not isinstance(metrics, Mapping):
        raise UnsupportedValueError("metrics", metrics, "it must be a dict of names and numbers")
    for name in metrics:
        text(name, "metrics name")
    return {name: to_number(value, f"metrics.{name}") for name, value in metrics.items()}


def check_constructor(tracker: object, policy: object, protected_types: object, best_metrics: object) -> None:
    """Raise ConfigurationError unless the arguments of these names are of the kinds that they should be."""
    if tracker is not None and not (hasattr(tracker, "experiment_id") and hasattr(tracker, "database")):
        raise ConfigurationError(f"experiment_tracker must be an ExperimentTracker or None, not {tracker!r}")
    if policy is not None and not callable(getattr(policy, "keeps", None)):
        raise ConfigurationError(f"retention_policy must have keeps(), as KeepLast(3) has; {policy!r} does not")
    if isinstance(protected_types, str) or not isinstance(protected_types, Collection):
        raise ConfigurationError(f"protected_types must be a list of types, not {protected_types!r}")
    if best_metrics is not None and not isinstance(best_metrics, Mapping):
        raise ConfigurationError(f"best_metrics must be a dict such as {{'f1': 'max'}}, not {best_metrics!r}")


def save_arguments(made: Any, save: Callable[..., object]) -> Mapping[str, Any]:
    """Return what a function for ``save_on_signal`` returned, unless ``save`` could not be called with it.

    Raises:
        ConfigurationError: it cannot.
    """
    try:
        inspect.signature(save).bind(**made)
    except TypeError as error:
        raise ConfigurationError(
            f"the function given to save_on_signal() must return a dict of save_checkpoint's arguments, such as "
            f"{{'model': model}}, not {made!r:.200}: {error}; nothing was saved, and the signal is still noted"
        ) from error
    return dict(made)
