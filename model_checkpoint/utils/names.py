"""Ids that the engine gives, the only names that become paths, and the numbers of saves."""

from __future__ import annotations

import uuid
from typing import TypeGuard

MAX_SEQUENCE = 2**62  # saves are numbered below; what somebody else has sealed must not make the next number overflow


def is_id(name: object) -> TypeGuard[str]:
    """Whether ``name`` is a UUID in its canonical form, as every id of an experiment or checkpoint is."""
    if not isinstance(name, str):
        return False
    try:
        return str(uuid.UUID(name)) == name
    except ValueError:
        return False
