"""The arrays of a checkpoint on disk, read a piece at a time: where each lies, and how to read two side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from model_checkpoint.arrays import DTYPES
from model_checkpoint.checkpoint.reader import Arrays, CheckpointReader, not_stored, span
from model_checkpoint.errors import FormatError
from model_checkpoint.integrity.manifest import FileEntry
from model_checkpoint.integrity.reading import FileReader

_MOST = 2**63 - 1  # elements, as libraries count them


class SavedArray(NamedTuple):
    """An array as a tree tells of it.

    Attributes:
        component, key: of the stored array that has its elements.
        dtype, shape: its own.
        strides, offset: elements of the stored array from one index to the next, and before the first.
        stored: elements of the stored array.
    """

    component: str
    key: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    stored: int

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return DTYPES[self.dtype].bits // 8


def saved_array(node: dict[str, Any]) -> SavedArray:
    """Return what a node of a tree says that refers to an array, be it stored so or a view of one.

    Raises:
        FormatError: no such array can be, or its elements are no whole bytes.
        KeyError, TypeError: the node is damaged.
    """
    base, shape = node.get("base", node), tuple(node["shape"])
    strides = tuple(node.get("strides", (math.prod(shape[i + 1 :]) for i in range(len(shape)))))
    made = SavedArray(
        base["of"], base["$array"], node["dtype"], shape, strides, node.get("offset", 0), math.prod(base["shape"])
    )
    counts = (*base["shape"], *shape, *strides, made.offset, math.prod(shape), made.stored)
    if DTYPES[made.dtype].bits % 8:
        raise FormatError(f"array {made.key!r}: elements of {made.dtype} are no whole bytes; they cannot be compared")
    possible = all(type(count) is int and 0 <= count <= _MOST for count in counts) and len(shape) == len(strides)
    if not possible or base["dtype"] != made.dtype:
        raise FormatError(f"array {made.key!r} has dtype {made.dtype}, shape {shape} and strides {strides}")
    last = made.offset + sum((n - 1) * stride for n, stride in zip(shape, strides))
    if 0 not in shape and last >= made.stored:
        raise FormatError(f"a view of {made.key!r} reaches beyond it, to element {last}")
    return made


class StoredArrays:
    """Reads the stored arrays of one checkpoint, verified, in the memory of a chunk.

    Files that are compressed, or whose backend has to have the whole, are in memory one at a time.

    Args:
        reader: the checkpoint's.
        stack: closes the files.
    """

    def __init__(self, reader: CheckpointReader, stack: ExitStack) -> None:
        self._reader = reader
        self._stack = stack
        self._components: set[str] = set()  # those whose files were opened
        self._files: dict[tuple[str, str], FileEntry] = {}  # (component, key) -> where the array is
        self._spans: dict[tuple[str, str], tuple[FileReader, int, int]] = {}
        self._whole: tuple[str, Arrays] = ("", {})  # the file that is in memory, and what it holds

    def file(self, array: SavedArray) -> FileEntry:
        """Return the file that has an array's elements.

        Raises:
            FormatError: there is none, or it has another number of them.
            IntegrityError, StorageError, MissingDependencyError: a file of its component cannot be read.
        """
        if array.component not in self._components:
            for file in self._reader.files_of(array.component):
                self._open(file)
            self._components.add(array.component)
        place = (array.component, array.key)
        if place not in self._files:
            not_stored(*place)
        return self._files[place]

    def read(self, array: SavedArray, first: int, memory: memoryview) -> None:
        """Fill ``memory`` with elements of what was stored, from number ``first``; raises what ``file`` raises."""
        place, position = (array.component, array.key), first * array.itemsize
        file = self.file(array)
        if place in self._spans:
            opened, begin, end = self._spans[place]
            self._check(array, end - begin)
            self._reader.read_piece(opened, begin + position, memory)
        else:
            if self._whole[0] != file.name:
                self._open(file)
            data = self._whole[1][array.component][array.key].data
            self._check(array, data.nbytes)
            memory[:] = data[position : position + memory.nbytes]

    def _check(self, array: SavedArray, nbytes: int) -> None:
        if nbytes != array.stored * array.itemsize:
            raise FormatError(
                f"array {array.key!r} of {array.component} has {nbytes} bytes in its file, "
                f"but {array.stored} elements of {array.dtype} in state.json"
            )

    def _open(self, file: FileEntry) -> None:
        if self._whole[0] == file.name:
            return
        self._whole = ("", {})  # first: two would be in memory
        opened, arrays = self._reader.open(file, self._stack)
        for component, named in arrays.items():
            for key, array in named.items():
                self._files[component, key] = file
                if opened is not None:
                    self._spans[component, key] = (opened, *span(opened, array))
        if opened is None:
            self._whole = (file.name, arrays)
        else:
            arrays.clear()
            opened.let_go()


def runs(a: SavedArray, b: SavedArray) -> Iterator[tuple[int, int, int]]:
    """Yield how to read two arrays of one shape side by side, each element of one with its counterpart of the other.

    Yields:
        The number of an element of what was stored for ``a``, the same for ``b``, and how many follow one another from
        there in both. They come in the order in which ``a`` lies, so that those of a transposed array follow, too.
    """
    if 0 in a.shape:
        return
    axes = _axes(a, b)
    together = axes.pop()[2] if axes and axes[-1][:2] == (1, 1) else 1
    for first_a, first_b in _starts(axes, a.offset, b.offset):
        yield first_a, first_b, together


class Tile(NamedTuple):
    """Elements of two arrays, of which one is stored by rows and the other by columns.

    Attributes:
        rows, columns: how many.
        a: the number of the first element of each row in what was stored for the first array.
        b: the number of the first element of each column in what was stored for the second.
    """

    rows: int
    columns: int
    a: Sequence[int]
    b: Sequence[int]


def tiles(a: SavedArray, b: SavedArray, side: int) -> Iterator[Tile] | None:
    """Return how to read two arrays of one shape in tiles of at most ``side`` rows and columns, where one is turned.

    None where they lie otherwise, or a row of one follows as a row of the other, which ``runs`` is for.
    """
    axes = [] if 0 in a.shape else _axes(a, b)
    along_a = next((axis for axis in axes if axis[0] == 1), None)
    along_b = next((axis for axis in axes if axis[1] == 1), None)
    if along_a is None or along_b is None or along_a is along_b:
        return None
    others = [axis for axis in axes if axis is not along_a and axis is not along_b]
    return _tiles(_starts(others, a.offset, b.offset), along_a, along_b, side)


def _tiles(
    starts: Iterator[tuple[int, int]], along_a: tuple[int, int, int], along_b: tuple[int, int, int], side: int
) -> Iterator[Tile]:
    (_, step_b, width), (step_a, _, height) = along_a, along_b
    for first_a, first_b in starts:
        for y in range(0, height, side):
            for x in range(0, width, side):
                rows, columns = min(side, height - y), min(side, width - x)
                begin_a, begin_b = first_a + y * step_a + x, first_b + x * step_b + y
                of_a: Sequence[int] = range(begin_a, begin_a + rows * step_a, step_a) if step_a else (begin_a,) * rows
                of_b: Sequence[int] = (
                    range(begin_b, begin_b + columns * step_b, step_b) if step_b else (begin_b,) * columns
                )
                yield Tile(rows, columns, of_a, of_b)


def _axes(a: SavedArray, b: SavedArray) -> list[tuple[int, int, int]]:
    """Return strides in both and length of the axes, from the longest stride of ``a``, as few as can be."""
    axes: list[tuple[int, int, int]] = []
    for of_a, of_b, length in sorted(zip(a.strides, b.strides, a.shape), reverse=True):
        if axes and axes[-1][:2] == (of_a * length, of_b * length):
            axes[-1] = (of_a, of_b, axes[-1][2] * length)
        elif length > 1:
            axes.append((of_a, of_b, length))
    return axes


def _starts(axes: list[tuple[int, int, int]], a: int, b: int) -> Iterator[tuple[int, int]]:
    if not axes:
        yield a, b
        return
    of_a, of_b, length = axes[0]
    for i in range(length):
        yield from _starts(axes[1:], a + i * of_a, b + i * of_b)
