"""What the kernel can do for large files and memory and Python does not offer; elsewhere the next best, or nothing."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Callable
from typing import Any

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # this file system, this kernel
_SYNC_FILE_RANGE_WRITE = 2  # <linux/fs.h>: begin to write the dirty pages of the range, wait for nothing
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>
_HUGE = 4 << 20  # bytes from which memory is worth whole huge pages (2 MiB on most machines)


def _find(name: str, *arguments: Any) -> Callable[..., int] | None:
    if not sys.platform.startswith("linux") or sys.maxsize < 2**32:
        return None  # offsets are 64 bits wide below
    try:
        function: Any = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError):
        return None
    function.argtypes = arguments
    return function  # type: ignore[no-any-return]


_fallocate = _find("fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_renameat2 = _find("renameat2", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
_sync_file_range = _find("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def reserve(descriptor: int, size: int) -> None:
    """Give an empty file ``size`` bytes of disk, so that a full disk is found before anything is written.

    Python's ``os.posix_fallocate`` is not used: where the file system cannot, it writes every block instead.

    Raises:
        OSError: there is no room.
    """
    if _fallocate is not None and size:
        _call(_fallocate, descriptor, 0, 0, size)


def start_writeback(descriptor: int, offset: int, size: int) -> None:
    """Let the disk begin with a part that was just written, instead of with everything at the ``fsync``.

    Raises:
        OSError: an earlier write-back failed; the file is lost.
    """
    if _sync_file_range is not None:
        _call(_sync_file_range, descriptor, offset, size, _SYNC_FILE_RANGE_WRITE)
    elif hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)


def exchange(one: str, other: str) -> bool:
    """Let two files or folders of one file system change their names, at once; returns False where that cannot be.

    Raises:
        OSError: the file system refuses.
    """
    arguments = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return _renameat2 is not None and _call(_renameat2, *arguments)


def _call(function: Callable[..., int], *arguments: int | bytes) -> bool:
    """Return whether it is done; False where it is unsupported."""
    while function(*arguments):
        error = ctypes.get_errno()
        if error in _UNSUPPORTED:
            return False
        if error != errno.EINTR:
            raise OSError(error, os.strerror(error))
    return True


def fresh_memory(size: int) -> memoryview:
    """Return ``size`` zero bytes of new memory, writable and page-aligned; the caller owns it.

    Unlike a ``bytearray``'s, its pages come into being when they are first touched, by whatever thread that is.
    """
    if size < _HUGE:
        return memoryview(bytearray(size))
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared, which is the default, is slow
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)  # a fault for every 2 MiB instead of every 4 KiB
        except OSError:
            pass  # this kernel has none
    return memoryview(memory)
