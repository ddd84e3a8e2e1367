"""Copies of a state's arrays in host memory of our own, which training cannot change any more."""

from __future__ import annotations

import ctypes
from functools import partial
from threading import Event

from model_checkpoint.arrays import HostArray
from model_checkpoint.checkpoint.state import EncodedState
from model_checkpoint.utils.kernel import fresh_memory
from model_checkpoint.utils.parallel import run

_ALIGNMENT = 64  # bytes; a cache line, and a multiple of every element's size
_PIECE = 16 << 20  # 16 MiB: large arrays are copied by several threads


class SnapshotBuffer:
    """Memory for one snapshot at a time, kept for the next: its pages are warm then, and copying runs at full speed."""

    def __init__(self) -> None:
        self._memory = memoryview(b"")

    def take(self, state: EncodedState, threads: int) -> EncodedState:
        """Return ``state`` with arrays that nobody else can change; the tree is shared.

        Args:
            state: as ``encode`` made it, its arrays borrowed.
            threads: how many copy at once.

        Returns:
            The copy. Its arrays lie in this buffer and are overwritten by the next ``take``; arrays of immutable
            objects are not copied but borrowed on.
        """
        offset = 0
        places: dict[tuple[str, str], int] = {}
        for component, named in state.arrays.items():
            for key, array in named.items():
                if not array.immutable:
                    places[component, key] = offset
                    offset += -(-array.data.nbytes // _ALIGNMENT) * _ALIGNMENT
        if self._memory.nbytes < offset:
            self._memory = memoryview(b"")  # the old one goes first
            self._memory = fresh_memory(offset)
        copies: list[partial[None]] = []
        arrays: dict[str, dict[str, HostArray]] = {}
        for component, named in state.arrays.items():
            arrays[component] = {}
            for key, array in named.items():
                if (component, key) in places:
                    start = places[component, key]
                    target = self._memory[start : start + array.data.nbytes]
                    copies += _copies(array.data, target)
                    array = array._replace(data=target, source=None)
                arrays[component][key] = array
        run(_batches(copies), threads if offset > _PIECE else 1, Event())
        return EncodedState(state.tree, arrays)


def _copies(source: memoryview, target: memoryview) -> list[partial[None]]:
    return [
        partial(_copy, source[start : start + _PIECE], target[start : start + _PIECE])
        for start in range(0, source.nbytes, _PIECE)
    ]


def _batches(copies: list[partial[None]]) -> list[partial[None]]:
    """Return the copies as tasks of some size: taking a task costs as much as copying 10 KB."""
    tasks: list[partial[None]] = []
    batch: list[partial[None]] = []
    size = 0
    for copy in copies:
        batch.append(copy)
        size += copy.args[0].nbytes
        if size >= _PIECE:
            tasks.append(partial(_all, batch))
            batch, size = [], 0
    return [*tasks, partial(_all, batch)]


def _all(copies: list[partial[None]]) -> None:
    for copy in copies:
        copy()


def _copy(source: memoryview, target: memoryview) -> None:
    if source.readonly:
        target[:] = source
    else:  # without the GIL, so that threads copy at once
        first, to = ctypes.c_char.from_buffer(source), ctypes.c_char.from_buffer(target)
        ctypes.memmove(ctypes.addressof(to), ctypes.addressof(first), source.nbytes)
