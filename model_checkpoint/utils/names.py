"""The only names that become paths: ids that the engine made."""

from __future__ import annotations

import uuid


def is_id(name: str) -> bool:
    """Whether ``name`` is a UUID in its canonical form, as every id of an experiment or checkpoint is."""
    try:
        return str(uuid.UUID(name)) == name
    except ValueError:
        return False
