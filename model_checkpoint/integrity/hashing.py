"""SHA-256 in the same pass as the bytes: while a file is written, and while it is read."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import stat
from collections.abc import Callable
from io import FileIO

from model_checkpoint.errors import IntegrityError, StorageError

CHUNK = 4 << 20  # 4 MiB: large enough that hashing and writing dwarf the calls, small enough to stay in cache
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class HashingSink:
    """Writes to an open file and hashes in the same pass.

    Args:
        descriptor: of the file; stays open.
        path: its name, for errors.
        hashed: whether to compute the digest.

    Attributes:
        size: bytes written so far.
        hash: of these bytes, or None.
        error: what went wrong, or None.
    """

    def __init__(self, descriptor: int, path: str, hashed: bool) -> None:
        self.size = 0
        self.hash = hashlib.sha256() if hashed else None
        self.error: StorageError | None = None
        self.descriptor = descriptor
        self._path = path

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write and hash all of ``data``, any contiguous buffer; it is not kept. Returns its size in bytes."""
        view = memoryview(data)
        if view.format != "B" or view.ndim != 1:
            view = view.cast("B")
        try:
            for start in range(0, view.nbytes, CHUNK):
                chunk = view[start : start + CHUNK]
                if self.hash is not None:
                    self.hash.update(chunk)
                while chunk.nbytes:  # the kernel may take less than it is given
                    chunk = chunk[os.write(self.descriptor, chunk) :]
        except OSError as error:
            self.error = _failed("write", self._path, error)
            raise self.error from error
        self.size += view.nbytes
        return view.nbytes


def write_file(path: str, write: Callable[[HashingSink], object], hashed: bool = True) -> tuple[int, str | None]:
    """Make a new file, durable when this returns; its folder is not synced.

    Args:
        path: where; nothing may be there yet, and a symbolic link is never followed.
        write: called once with a sink that takes the content.
        hashed: whether to compute the digest while writing.

    Returns:
        Its length in bytes and its SHA-256 in hex, None when ``hashed`` is off.

    Raises:
        StorageError: it cannot be made, written or made durable; an incomplete file may stay behind.
    """
    try:
        file = os.fdopen(os.open(path, _NEW_FILE, 0o644), "wb", buffering=0)
    except OSError as error:
        raise _failed("create", path, error) from error
    with file:
        sink = HashingSink(file.fileno(), path, hashed)
        try:
            write(sink)
        except Exception:
            if sink.error is not None:  # a library that was writing may have buried the cause under its own error
                raise sink.error from sink.error.__cause__
            raise
        try:
            os.fsync(sink.descriptor)  # a failure is final: Linux forgets the error, and a second fsync would lie
        except OSError as error:
            raise _failed("make durable", path, error) from error
    return sink.size, None if sink.hash is None else sink.hash.hexdigest()


def _failed(action: str, path: str, error: OSError) -> StorageError:
    advice = "earlier checkpoints are untouched"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "free some space or lower max_checkpoints; " + advice
    return StorageError(f"{action} a checkpoint file", path, error, advice)


def read_file(path: str, size: int, sha256: str | None) -> memoryview:
    """Read a whole file into memory of its own while hashing it.

    Args:
        path: the file; a symbolic link is refused.
        size: the length in bytes that it must have.
        sha256: the digest that it must have, in hex; None checks the length only.

    Returns:
        Its content, writable; the caller owns it.

    Raises:
        IntegrityError: it is missing, of another length, or of another digest. The text names both.
    """
    with _open_checked(path, size) as file:
        content = memoryview(bytearray(size))
        found = hashlib.sha256()
        position = 0
        while position < size:
            count = file.readinto(content[position : position + CHUNK])
            if not count:
                raise IntegrityError(path, "the file shrank while it was read", size, position)
            if sha256 is not None:
                found.update(content[position : position + count])
            position += count
    if sha256 is not None and found.hexdigest() != sha256:
        raise IntegrityError(path, "its SHA-256 is not the one recorded when it was saved", sha256, found.hexdigest())
    return content


def map_file(path: str, size: int) -> memoryview:
    """Map a file without reading it, as private memory: writing to it changes neither the file nor other maps.

    Raises:
        IntegrityError: it is missing or of another length than ``size`` bytes.
    """
    with _open_checked(path, size) as file:  # the mapping outlives it
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
