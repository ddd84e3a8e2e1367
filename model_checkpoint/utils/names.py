"""The only names that become paths: ids that the engine made."""

from __future__ import annotations

import uuid
from typing import TypeGuard


def is_id(name: object) -> TypeGuard[str]:
    """Whether ``name`` is a UUID in its canonical form, as every id of an experiment or checkpoint is."""
    if not isinstance(name, str):
        return False
    try:
        return str(uuid.UUID(name)) == name
    except ValueError:
        return False
