"""What the benchmarks need of files and memory: durability and digests for peers that have none, and a cold start."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import mmap
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

CHUNK = 4 << 20  # bytes read at a time
COLD = "sync, then posix_fadvise(DONTNEED) on each file (what a host caches for a virtual machine stays there)"


def files(path: Path) -> Iterator[Path]:
    """Yield the file, or every file below the folder."""
    yield from sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else (path,)


def fsync(path: Path) -> None:
    """Make a file, or every file and folder below a folder, durable, and the entry in the folder above."""
    below = [path, *path.rglob("*")] if path.is_dir() else [path]
    for one in (*below, path.parent):
        descriptor = os.open(one, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256(path: Path) -> list[str]:
    """Read back and hash a file, or every file below a folder, on one core."""
    found = []
    buffer = memoryview(bytearray(CHUNK))
    for one in files(path):
        digest = hashlib.sha256()
        with open(one, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
        found.append(digest.hexdigest())
    return found


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there, and let disk and memory come to rest."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    os.sync()
    touch_free_memory()


def evict(path: Path) -> None:
    """Drop the files from the page cache; nothing may have them mapped."""
    os.sync()
    for one in files(path):
        descriptor = os.open(one, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def release_memory() -> None:
    """Give what was freed back to the kernel: malloc keeps much of it, where a load is faster than a first one."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    touch_free_memory()


def touch_free_memory() -> None:
    """Use 4 GiB of free memory once, where there is as much.

    The host of a virtual machine takes free memory back, and whoever is given it first pays for getting it again: a
    save of 1.5 GB took 0.6 s or 2 s, whichever peer's turn it was. Afterwards all find the same.
    """
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    populate = getattr(mmap, "MAP_POPULATE", 0x8000)  # named since Python 3.10, of Linux
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | populate
    mmap.mmap(-1, min(4 << 30, max(available // 2, mmap.PAGESIZE)), flags=flags).close()
