"""Writing a file: hashed in the same pass, from the memory where the bytes lie, and durable when it is done."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from io import FileIO
from typing import NamedTuple

from model_checkpoint.errors import ConfigurationError, FormatError, StorageError
from model_checkpoint.integrity.sha256 import CHUNK, Sha256
from model_checkpoint.utils.kernel import reserve, start_writeback
from model_checkpoint.utils.parallel import Stop

_GATHERED = 1 << 20  # 1 MiB of small pieces are written at once
_SMALL = 64 << 10  # 64 KiB, from which a piece is written from where it lies; copying less is quicker than a call
# 1 MiB is written at a time. For more the kernel looks for large blocks of memory, which the host of a virtual machine
# may have taken back: a save of 1.5 GB took up to three times as long. For less, threads wait more for Python's lock.
_AT_ONCE = 1 << 20
_WRITEBACK = 8 << 20  # 8 MiB: the disk begins with a part while the next one is hashed
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Written(NamedTuple):
    """A file as it was written.

    Attributes:
        size: bytes.
        sha256: its digest in hex; None without hashing.
        states: of SHA-256 after each ``CHUNK`` bytes but the last; empty where there are none.
    """

    size: int
    sha256: str | None
    states: tuple[str, ...]


class FileSink:
    """Writes to an open file and hashes in the same pass; small pieces are gathered, large ones never copied.

    Args:
        descriptor: of the file; stays open.
        path: its name, for errors.
        hashed: whether to compute the digest.
        stop: when it is called, the next write raises: what is written will not be wanted.

    Attributes:
        size: bytes taken so far.
        error: what went wrong, or None.
    """

    def __init__(self, descriptor: int, path: str, hashed: bool, stop: Stop | None = None) -> None:
        self.size = 0
        self.error: Exception | None = None
        self._descriptor = descriptor
        self._path = path
        self._hashed = hashed
        self._hash: Sha256 | None = None
        self._stop = stop
        self._gathered = bytearray()
        self._written = 0
        self._begun = 0  # bytes that the disk was told to begin with
        self._states: list[str | None] = []

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Take all of ``data``, any contiguous buffer; it is not kept. Returns its size in bytes."""
        view = memoryview(data)
        if view.format != "B" or view.ndim != 1:
            view = view.cast("B")
        if view.nbytes < _SMALL or view.readonly:  # hashing wants writable memory
            for start in range(0, view.nbytes, _GATHERED):
                self._gathered += view[start : start + _GATHERED]
                if len(self._gathered) >= _GATHERED:
                    self._flush()
        else:
            self._flush()
            self._put(view)
        self.size += view.nbytes
        return view.nbytes

    def finish(self) -> Written:
        """Write what is still gathered, and tell what was written; it is not durable yet."""
        if self._written == 0:  # all of it is small, as most files are: one write, no states
            digest = hashlib.sha256(self._gathered).hexdigest() if self._hashed else None
            self._put_out(memoryview(self._gathered))
            return Written(self.size, digest, ())
        self._flush()
        needed = -(-self.size // CHUNK) - 1
        states = tuple(state for state in self._states[:needed] if state is not None)
        return Written(self.size, None if self._hash is None else self._hash.hexdigest(), states)

    def _flush(self) -> None:
        if self._gathered:
            self._put(memoryview(self._gathered))
            self._gathered = bytearray()

    def _put(self, view: memoryview) -> None:
        if self._hashed and self._hash is None:
            self._hash = Sha256()
        while view.nbytes:
            piece = view[: CHUNK - self._written % CHUNK]
            if self._hash is not None:
                self._hash.update(piece)
            self._put_out(piece)
            self._written += piece.nbytes
            if self._hash is not None and self._written % CHUNK == 0:
                self._states.append(self._hash.state())
            view = view[piece.nbytes :]

    def _put_out(self, piece: memoryview) -> None:
        if self._stop is not None and self._stop.called:
            raise InterruptedError(errno.EINTR, "called off", self._path)
        end = self._written + piece.nbytes
        try:
            while piece.nbytes:  # the kernel may take less than it is given
                piece = piece[os.write(self._descriptor, piece[:_AT_ONCE]) :]
            if end - self._begun >= _WRITEBACK:
                start_writeback(self._descriptor, self._begun, end - self._begun)
                self._begun = end
        except OSError as error:
            self.error = _failed("write", self._path, error)
            raise self.error from error


def write_file(
    path: str,
    write: Callable[[FileSink], object],
    hashed: bool = True,
    size: int | None = None,
    stop: Stop | None = None,
) -> Written:
    """Make a new file, durable when this returns; its folder is not synced.

    Args:
        path: where; nothing may be there yet, and a symbolic link is never followed.
        write: called once with a sink that takes the content.
        hashed: whether to compute the digest while writing.
        size: its length in bytes where that is known, which is then reserved on the disk.
        stop: when it is called, writing ends with an error.

    Raises:
        StorageError: it cannot be made, written or made durable; an incomplete file may stay behind.
        FormatError: ``write`` wrote more or less than ``size`` bytes.
    """
    try:
        file = os.fdopen(os.open(path, _NEW_FILE, 0o644), "wb", buffering=0)
    except OSError as error:
        raise _failed("create", path, error) from error
    with file:
        try:
            if size is not None and size >= CHUNK:
                reserve(file.fileno(), size)
        except OSError as error:
            raise _failed("make room for", path, error) from error
        sink = FileSink(file.fileno(), path, hashed, stop)
        try:
            write(sink)
            written = sink.finish()
        except Exception:
            if sink.error is not None:  # a library that was writing may have buried the cause under its own error
                raise sink.error from sink.error.__cause__
            raise
        if size is not None and written.size != size:
            raise FormatError(f"{path}: the storage backend planned {size} bytes and wrote {written.size}")
        try:
            os.fsync(file.fileno())  # a failure is final: Linux forgets the error, and a second fsync would lie
        except OSError as error:
            raise _failed("make durable", path, error) from error
    return written


def link_file(source: str, identity: tuple[int, int, int, int], path: str, hashed: bool, stop: Stop) -> Written:
    """Give a file a second name, where it is one of a checkpoint; durable when this returns, but for the folder.

    Args:
        source: the file, which is only read.
        identity: what ``identity_of`` said of it when it was looked at.
        path: the new name, on the same file system.
        hashed: whether to compute the digest.
        stop: when it is called, reading ends with an error.

    Raises:
        ConfigurationError: the file system has no second names, or none from there.
        FormatError: it is another file than the one that was looked at, or changed since.
        StorageError: it cannot be read or made durable.
    """
    try:
        os.link(source, path, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EEXIST, errno.ENOSPC, errno.EIO):
            raise _failed("link", source, error) from error
        raise ConfigurationError(
            f"{source} cannot have a second name in the checkpoint directory ({error.strerror}); use copy=True"
        ) from error
    try:
        with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW)) as file:
            written = _hash(file, hashed, stop)
            os.fsync(file.fileno())
            if identity_of(os.fstat(file.fileno())) != identity:
                raise FormatError(f"{source} was changed while it was imported; import it again when it is whole")
    except OSError as error:
        raise _failed("read", source, error) from error
    return written


def identity_of(found: os.stat_result) -> tuple[int, int, int, int]:
    """Return device, inode, length in bytes and time of the last change of a file, which tell it from others."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _hash(file: FileIO, hashed: bool, stop: Stop) -> Written:
    size = os.fstat(file.fileno()).st_size
    if not hashed:
        return Written(size, None, ())
    digest, states, left = Sha256(), [], size
    buffer = memoryview(bytearray(min(CHUNK, size)))
    while left:
        if stop.called:
            raise InterruptedError(errno.EINTR, "called off", file.name)
        piece = buffer[: min(CHUNK, left)]
        filled = 0
        while filled < piece.nbytes:
            count = file.readinto(piece[filled:])
            if not count:
                raise OSError(errno.EIO, "the file shrank while it was read", file.name)
            filled += count
        digest.update(piece)
        left -= filled
        states.append(digest.state())
    needed = max(0, -(-size // CHUNK) - 1)
    return Written(size, digest.hexdigest(), tuple(state for state in states[:needed] if state is not None))


def write_bytes(path: str, data: bytes) -> None:
    """Make a new small file that holds ``data``, durable when this returns; its folder is not synced.

    Raises:
        StorageError: it cannot be made, written or made durable; an incomplete file may stay behind.
    """
    try:
        with os.fdopen(os.open(path, _NEW_FILE, 0o644), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _failed("write", path, error) from error


def _failed(action: str, path: str, error: OSError) -> StorageError:
    advice = "earlier checkpoints are untouched"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "free some space or lower max_checkpoints; " + advice
    return StorageError(f"{action} a checkpoint file", path, error, advice)
