"""Objects that own connections, locks or threads, which rest while a process forks and start afresh in the child."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import count
from threading import Lock
from typing import Protocol
from weakref import ReferenceType, ref


class Forkable(Protocol):
    """An object that survives ``os.fork`` in both processes."""

    def before_fork(self) -> None:
        """Come to rest: finish what a copy of the memory must not catch half done, and let nothing new begin."""

    def after_fork_in_parent(self) -> None:
        """Undo what ``before_fork`` did, all of it or the part that it came to."""

    def after_fork_in_child(self) -> None:
        """Start afresh; threads of the parent do not exist here."""


_objects: dict[int, ReferenceType[Forkable]] = {}  # in the order of their creation
_numbers = count()
_resting: list[Forkable] = []
_forking = Lock()  # one fork at a time


def watch(forkable: Forkable) -> None:
    """Tell ``forkable`` of every fork from now on, for as long as it lives.

    The newest rest first: an object that uses another is made after it, so locks are taken in the order of their use.
    """
    number = next(_numbers)
    _objects[number] = ref(forkable, lambda _: _objects.pop(number, None))


_locks: dict[int, tuple[ReferenceType[object], str, Callable[[], object]]] = {}


def renew_in_child(owner: object, attribute: str, make: Callable[[], object]) -> None:
    """Set ``attribute`` of ``owner`` to ``make()`` in forked children: a thread that held that lock is not there."""
    number = next(_numbers)
    _locks[number] = (ref(owner, lambda _: _locks.pop(number, None)), attribute, make)


def _before() -> None:
    _forking.acquire()
    for _, reference in sorted(_objects.copy().items(), reverse=True):
        forkable = reference()
        if forkable is not None:
            _resting.append(forkable)  # first: what an interrupt stops half way is undone, too
            forkable.before_fork()


def _after_in_parent() -> None:
    while _resting:
        _resting.pop().after_fork_in_parent()
    _forking.release()


def _after_in_child() -> None:
    global _forking
    _forking = Lock()
    _resting.clear()
    for owner, attribute, make in list(_locks.values()):
        if owner() is not None:
            setattr(owner(), attribute, make())
    for reference in list(_objects.values()):  # also one that an interrupt kept from coming to rest
        forkable = reference()
        if forkable is not None:
            forkable.after_fork_in_child()


os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
