"""Optional packages: imported on use, with an error that says what to install."""

from __future__ import annotations

import logging
import sys
from typing import Any

from model_checkpoint.errors import MissingDependencyError

log = logging.getLogger(__name__)


def require(package: str, extra: str, purpose: str) -> Any:
    """Import and return ``package``.

    Args:
        package: the module to import.
        extra: the pip extra of this project that brings it.
        purpose: what needs it, the beginning of the error's sentence ("loading a torch tensor").

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        __import__(package)  # as the import statement does: 20 times as fast as import_module when it is there
        return sys.modules[package]
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package.partition(".")[0]:
            raise  # the package is there, something that it needs is not: its own message is the better one
        raise MissingDependencyError(package, extra, purpose) from error


def find(package: str) -> Any:
    """Import and return ``package``, or None where it cannot be imported: for what is nice to have."""
    try:
        __import__(package)
        return sys.modules[package]
    except Exception as error:  # noqa: BLE001 - a package that is broken fails in any way, an OSError of its library
        log.debug("%s cannot be imported, it counts as not installed: %r", package, error)
        return None
