"""Objects that must start afresh in a forked child, such as those that own connections, locks or threads."""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet


class Forkable(Protocol):
    """An object that knows how to start afresh."""

    def after_fork(self) -> None:
        """Called in the child; locks that other threads of the parent held must be replaced, not waited for."""


_objects: WeakSet[Forkable] = WeakSet()


def watch(forkable: Forkable) -> None:
    """Call ``forkable.after_fork()`` in every child forked from now on, for as long as the object lives."""
    _objects.add(forkable)


def _after_fork() -> None:
    for forkable in list(_objects):
        forkable.after_fork()


os.register_at_fork(after_in_child=_after_fork)
