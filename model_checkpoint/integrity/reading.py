"""Reading a checkpoint's files: in parallel, into fresh memory, and compared with what was saved in the same pass."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import stat
from collections.abc import Callable, Iterable
from functools import partial
from io import FileIO

from model_checkpoint.errors import IntegrityError, StorageError
from model_checkpoint.integrity.manifest import FileEntry
from model_checkpoint.integrity.sha256 import CHUNK, Sha256, can_resume
from model_checkpoint.utils.kernel import fresh_memory
from model_checkpoint.utils.parallel import run

_HEADER = 256 << 10  # bytes
_AT_ONCE = 8  # chunks that a thread reads before it takes others


class FileReader:
    """Reads one file of a checkpoint in parts; a part counts as read when it has proved to be what was saved.

    Args:
        path: the file; a symbolic link is refused.
        entry: what the manifest says of it; without a digest, only its length is compared.

    Attributes:
        path, size: as given, and its length in bytes.
        content: the whole file's length of memory, writable and zero where nothing was read yet; the caller owns it.

    Raises:
        IntegrityError: it is missing, of another length, or no file.
        StorageError: the file system refuses.
    """

    def __init__(self, path: str, entry: FileEntry) -> None:
        self.path = path
        self._file = _open_checked(path, entry.size)
        self.size = entry.size
        self.content = fresh_memory(entry.size)
        self._digest = entry.sha256
        self._states = entry.states
        whole = entry.sha256 is not None and not (entry.chunk_size and can_resume())
        self._chunk = max(entry.size, 1) if whole else entry.chunk_size or CHUNK
        self._read: set[int] = set()  # chunks
        self._verified: set[int] = set()  # those that were not kept

    def parts(self, spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return what ``read`` must still be called with so that the bytes of ``spans`` (begin, end) are there."""
        wanted: set[int] = set()
        for begin, end in spans:
            wanted.update(range(begin // self._chunk, -(-end // self._chunk)))
        found: list[tuple[int, int]] = []
        for chunk in sorted(wanted - self._read):
            first, last = chunk * self._chunk, min(self.size, (chunk + 1) * self._chunk)
            if found and found[-1][1] == first and first - found[-1][0] < _AT_ONCE * self._chunk:
                found[-1] = (found[-1][0], last)
            else:
                found.append((first, last))
        return found

    def read(self, begin: int, end: int) -> None:
        """Read and verify one of ``parts``. Any thread may, for parts that do not overlap.

        Raises:
            IntegrityError: the bytes are not those that were saved; the text names both digests.
            StorageError: the disk cannot read them.
        """
        self._compare(begin, end, self.content[begin:end])
        self._read.update(range(begin // self._chunk, -(-end // self._chunk)))

    def check(self, begin: int, end: int) -> None:
        """Verify one of ``parts`` without keeping it, in memory of one chunk; raises what ``read`` raises."""
        if self._digest is not None:
            self._compare(begin, end, None)

    def verify(self, begin: int, end: int) -> None:
        """Verify the chunks that hold the bytes from ``begin`` to ``end``, each once, as ``check`` does."""
        for chunk in range(begin // self._chunk, -(-end // self._chunk)):
            if chunk not in self._verified and chunk not in self._read:
                self.check(chunk * self._chunk, min(self.size, (chunk + 1) * self._chunk))
                self._verified.add(chunk)

    def let_go(self) -> None:
        """Give up the content; what was verified counts as such."""
        self.content = memoryview(b"")
        self._verified |= self._read

    def _compare(self, begin: int, end: int, memory: memoryview | None) -> None:
        first, last = begin // self._chunk, -(-end // self._chunk)
        digest = None
        if self._digest is not None:
            digest = Sha256(self._states[first - 1], begin) if first else Sha256()
        scratch = memoryview(bytearray(min(CHUNK, end - begin))) if memory is None else memory
        for position in range(begin, end, CHUNK):
            start = 0 if memory is None else position - begin
            piece = scratch[start : start + min(CHUNK, end - position)]
            self.read_into(position, piece)
            if digest is not None:
                digest.update(piece)
        if digest is not None:
            at_end = end == self.size
            expected = self._digest if at_end else self._states[last - 1]
            if (digest.hexdigest() if at_end else digest.state()) != expected:
                self._refuse()

    def read_into(self, position: int, memory: memoryview) -> None:
        """Fill ``memory`` with what lies at ``position``, unverified.

        Raises:
            IntegrityError: the file is not as long any more.
            StorageError: the disk cannot read it.
        """
        while memory.nbytes:
            try:
                count = os.preadv(self._file.fileno(), [memory], position)
            except OSError as error:
                raise StorageError(
                    "read a checkpoint file", self.path, error, "check the disk and try again"
                ) from error
            if not count:
                raise IntegrityError(self.path, "the file shrank while it was read", self.size, position)
            position, memory = position + count, memory[count:]

    def _refuse(self) -> None:
        found = digest_file(self.path)
        problem = "its SHA-256 is not the one recorded when it was saved"
        if found == self._digest:
            problem += ", or the states between its chunks are not"
        raise IntegrityError(self.path, problem, self._digest, found)

    def close(self) -> None:
        """Close the file; its content stays."""
        self._file.close()


def read_parts(parts: Iterable[tuple[FileReader, int, int]], threads: int) -> None:
    """Read and verify parts of files, several at once.

    Raises:
        IntegrityError, StorageError: see ``FileReader.read``; one of them, when several parts are bad.
    """
    run([partial(reader.read, begin, end) for reader, begin, end in parts], threads)


def map_file(path: str, size: int) -> memoryview:
    """Map a file without reading it, as private memory: writing to it changes neither the file nor other maps.

    Raises:
        IntegrityError: it is missing or of another length than ``size`` bytes.
    """
    with _open_checked(path, size) as file:  # the mapping outlives it
        if hasattr(os, "posix_fadvise"):
            # Headers are read next. A first touch of the mapping would read as far ahead as the device is told to.
            os.posix_fadvise(file.fileno(), 0, _HEADER, os.POSIX_FADV_WILLNEED)
        return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) if size else bytearray())


def digest_file(path: str, on_bytes: Callable[[int], object] | None = None) -> str:
    """Return the SHA-256 of a file in hex, what ``sha256sum`` prints, reading ``CHUNK`` bytes at a time.

    Args:
        path: the file.
        on_bytes: called with the size of each part as it has been read, for progress bars.

    Raises:
        OSError: it cannot be read.
    """
    found = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            found.update(buffer[:count])
            if on_bytes:
                on_bytes(count)
    return found.hexdigest()


def _open_checked(path: str, size: int) -> FileIO:
    try:
        file = open(path, "rb", buffering=0, opener=open_to_read)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
            problem = "the file is missing" if error.errno == errno.ENOENT else "a link stands where the file was"
            raise IntegrityError(path, problem) from error
        if error.errno == errno.EISDIR:
            raise IntegrityError(path, "it is no file") from error
        raise StorageError("open a checkpoint file", path, error, "check its permissions") from error
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode) or found.st_size != size:
        file.close()
        problem = "its length in bytes is not the one recorded" if stat.S_ISREG(found.st_mode) else "it is no file"
        raise IntegrityError(path, problem, size, found.st_size)
    return file


def open_to_read(path: str, flags: int = os.O_RDONLY) -> int:
    """Open a file without following a symbolic link at its end, and without waiting should it be a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
