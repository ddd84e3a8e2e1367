"""Copies of a state's arrays in host memory of our own, which training cannot change any more."""

from __future__ import annotations

import ctypes
from functools import partial
from itertools import accumulate

from model_checkpoint.checkpoint.state import EncodedState
from model_checkpoint.utils.kernel import fresh_memory
from model_checkpoint.utils.parallel import run

_ALIGNMENT = 64  # bytes; a cache line, and a multiple of every element's size
_PIECE = 16 << 20  # 16 MiB: large arrays are copied by several threads
_TINY = 16 << 10  # 16 KiB; copying less takes less time than letting go of the GIL

Copy = tuple[memoryview, memoryview]  # from, to; of one size


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
        arrays = {component: dict(named) for component, named in state.arrays.items()}
        changing = [
            (named, key, array) for named in arrays.values() for key, array in named.items() if not array.immutable
        ]
        ends = list(accumulate(-(-array.data.nbytes // _ALIGNMENT) * _ALIGNMENT for _, _, array in changing))
        size = ends[-1] if ends else 0
        if self._memory.nbytes < size:
            self._memory = memoryview(b"")  # the old one goes first
            self._memory = fresh_memory(size)
        copies: list[Copy] = []
        for (named, key, array), start in zip(changing, [0, *ends]):
            source = array.data
            target = self._memory[start : start + source.nbytes]
            if source.nbytes <= _PIECE:
                copies.append((source, target))
            else:
                copies += _pieces(source, target)
            named[key] = array._replace(data=target, source=None)
        run(_batches(copies), threads if size > _PIECE else 1)
        return EncodedState(state.tree, arrays)


def _pieces(source: memoryview, target: memoryview) -> list[Copy]:
    starts = range(0, source.nbytes, _PIECE)
    return [(source[start : start + _PIECE], target[start : start + _PIECE]) for start in starts]


def _batches(copies: list[Copy]) -> list[partial[None]]:
    """Return the copies as tasks of some size: taking a task costs as much as copying 10 KB."""
    tasks: list[partial[None]] = []
    batch: list[Copy] = []
    size = 0
    for copy in copies:
        batch.append(copy)
        size += copy[0].nbytes
        if size >= _PIECE:
            tasks.append(partial(_copy, batch))
            batch, size = [], 0
    return [*tasks, partial(_copy, batch)]


def _copy(copies: list[Copy]) -> None:
    for source, target in copies:
        if source.readonly or source.nbytes < _TINY:
            target[:] = source
        else:  # without the GIL, so that threads copy at once
            first, to = ctypes.c_char.from_buffer(source), ctypes.c_char.from_buffer(target)
            ctypes.memmove(ctypes.byref(to), ctypes.byref(first), source.nbytes)
