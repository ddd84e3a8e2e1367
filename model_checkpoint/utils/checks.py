"""Arguments that are numbers, checked at the edge."""

from __future__ import annotations

import threading

from model_checkpoint.errors import ConfigurationError


def check_count(**values: object) -> None:
    """Raise ConfigurationError unless each value is an integer from 1."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigurationError(f"{name} must be an integer of at least 1, not {value!r}")


def check_positive(**values: object) -> None:
    """Raise ConfigurationError unless each value is a number above 0, and no more than a thread can wait in seconds."""
    for name, value in values.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 < value <= threading.TIMEOUT_MAX:  # type: ignore[operator]
            raise ConfigurationError(f"{name} must be a number above 0, not {value!r}")
