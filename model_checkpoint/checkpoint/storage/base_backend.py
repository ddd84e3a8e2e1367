"""The interface of storage backends: how named arrays become files, and files become arrays.

A backend never opens, names a folder of, hashes or compresses a file: it says which files there are and writes their
bytes into what it is given. So digests, atomic publication, compression and recovery are the same for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple, Protocol

from model_checkpoint.arrays import HostArray
from model_checkpoint.checkpoint.state import EncodedState


class Sink(Protocol):
    """Where a file's bytes go; every write is taken whole."""

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """Take all of ``data`` (any contiguous buffer) and return its size in bytes; the buffer is not kept."""


class PlannedFile(NamedTuple):
    """One file of a checkpoint, before it is written.

    Attributes:
        name: its name in the checkpoint's folder: letters, digits, ``.``, ``_`` and ``-`` only.
        component: the part of the state that it holds (``model``, ``optimizer``, ...), or None when it holds several.
        size: its length in bytes before compression, or None where that is not known ahead.
        write: called once with a sink; writes the whole file, front to back.
    """

    name: str
    component: str | None
    size: int | None
    write: Callable[[Sink], object]


class LinkedFile(NamedTuple):
    """One file of a checkpoint that there is already: it gets a second name, and its bytes are not copied.

    Attributes:
        name, component, size: as in ``PlannedFile``; it is never compressed.
        source: where it is, with no link on the way, on the file system of the checkpoint directory.
        identity: what ``integrity.writing.identity_of`` said of it when its content was looked at.
    """

    name: str
    component: str | None
    size: int
    source: str
    identity: tuple[int, int, int, int]


class StorageBackend(ABC):
    """A storage format. Implementations have no state: one object serves all threads."""

    name: ClassVar[str]

    @abstractmethod
    def plan(self, state: EncodedState, max_shard_size: int | None) -> list[PlannedFile]:
        """Return the files that hold ``state.arrays``; the engine stores ``state.tree`` itself.

        Args:
            state: the arrays to store. Their memory is borrowed until the last planned file is written.
            max_shard_size: bytes of array data above which a component is split, by backends that split; None lets the
                backend choose. Files are written by several threads, one each.

        Raises:
            MissingDependencyError: the format needs a package that is not installed.
        """

    @abstractmethod
    def read(self, files: Mapping[str, memoryview]) -> dict[str, dict[str, HostArray]]:
        """Return the arrays of ``files``: component -> key -> array, with the keys of ``state.arrays``.

        Args:
            files: name -> content, decompressed and verified; some or all of the files that ``plan`` named. The arrays
                may share this memory: it is theirs.

        Raises:
            FormatError: the content breaks the rules of the format.
        """

    def head(self, start: memoryview) -> int | None:
        """Return how many bytes at the start of a file say where its arrays are, for reading a part of the file.

        Args:
            start: the first bytes of the file, at least 8 of them or all that there are.

        Returns:
            Bytes that ``read`` looks at; all others are data of arrays, which it returns views of. None, as here, when
            ``read`` has to have the whole file.

        Raises:
            FormatError: the content breaks the rules of the format.
        """
        return None
