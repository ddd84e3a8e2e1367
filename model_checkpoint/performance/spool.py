"""A local file that takes what a database could not, in order, until it can."""

from __future__ import annotations

import fcntl
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

_HEAD = struct.Struct("<IIQ")  # bytes of the record, their CRC-32, its number


class Spool:
    """Records in an append-only file, which exists while there are any. One process writes a file: it holds its lock.

    A record that was cut off, by a crash or a full disk, is no record; those before it are whole.

    Args:
        path: the file; its folder is made when it is needed.
        take_over: open an existing file, whose writer is gone.

    Raises:
        BlockingIOError: ``take_over``, and its writer is not gone.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, take_over: bool = False) -> None:
        self.path = path
        self._file: int | None = None
        self._size = 0
        if take_over:
            self._open(os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)

    def __bool__(self) -> bool:
        return self._file is not None

    def append(self, number: int, record: bytes) -> None:
        """Put a record behind those that there are; it is on the disk when this returns.

        Raises:
            OSError: it cannot be; the file has what it had.
        """
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open(os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the name, too
            finally:
                os.close(folder)
        assert self._file is not None
        content = memoryview(_HEAD.pack(len(record), zlib.crc32(record), number) + record)
        try:
            while content:
                content = content[os.write(self._file, content) :]
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, self._size)
            raise
        self._size = os.fstat(self._file).st_size

    def records(self) -> Iterator[tuple[int, bytes]]:
        """Yield number and content of every record, in order."""
        place = 0
        while self._file is not None:
            head = os.pread(self._file, _HEAD.size, place)
            if len(head) < _HEAD.size:
                return
            length, check, number = _HEAD.unpack(head)
            record = os.pread(self._file, length, place + _HEAD.size)
            if len(record) < length or zlib.crc32(record) != check:
                return
            yield number, record
            place += _HEAD.size + length

    def clear(self) -> None:
        """Remove the file: a database has everything that was in it."""
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            self.close()

    def close(self) -> None:
        """Let go of the file, and leave it to whoever takes it over."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _open(self, flags: int) -> None:
        self._file = os.open(self.path, flags, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise
        self._size = os.fstat(self._file).st_size
