"""The raw limits: what disk, memory and SHA-256 allow, measured on the bytes of the state beside everything else."""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from disk import CHUNK, remove
from states import State


class Limits:
    """Measures what no save or load of this state can beat with the same means.

    Args:
        state: whose bytes.
        folder: on the disk to measure.
    """

    def __init__(self, state: State, folder: Path) -> None:
        self.path = folder / "raw"
        self._state = state
        self._warm = state.empty()
        self.copy()  # touches every page
        self._buffer = memoryview(bytearray(CHUNK))

    def write(self) -> None:
        """Write the tensors' memory to one file by plain write(), and fsync it."""
        with open(self.path, "wb", buffering=0) as file:
            for buffer in self._state.buffers():
                for start in range(0, buffer.nbytes, CHUNK):
                    file.write(buffer[start : start + CHUNK])
            os.fsync(file.fileno())

    def read(self) -> None:
        """Read that file through one warm buffer of 4 MiB."""
        with open(self.path, "rb", buffering=0) as file:
            while file.readinto(self._buffer):
                pass

    def copy(self) -> None:
        """Copy the state into warm memory, with torch's own threads."""
        for part, tensors in self._state.parts.items():
            for key, tensor in tensors.items():
                self._warm[part][key].copy_(tensor)

    def memmove(self) -> None:
        """Copy the state into warm memory, on one core."""
        for part, tensors in self._state.parts.items():
            for key, tensor in tensors.items():
                ctypes.memmove(self._warm[part][key].data_ptr(), tensor.data_ptr(), tensor.nbytes)

    def sha256(self) -> None:
        """Hash the state in memory on one core."""
        digest = hashlib.sha256()
        for buffer in self._state.buffers():
            digest.update(buffer)

    def sha256_parallel(self) -> None:
        """Hash the state on all cores, each its share of the chunks; a digest of the whole does not come of it."""
        chunks = [
            buffer[start : start + CHUNK]
            for buffer in self._state.buffers()
            for start in range(0, buffer.nbytes, CHUNK)
        ]
        cores = torch.get_num_threads()
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(_hash, [chunks[i::cores] for i in range(cores)]))

    def close(self) -> None:
        """Remove the file."""
        remove(self.path)


def _hash(chunks: list[memoryview]) -> None:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)


def hash_limits(limits: Limits) -> dict[str, Callable[[], None]]:
    """Return row -> measurement of how fast memory is hashed."""
    return {
        "limit: SHA-256 in memory, one core": limits.sha256,
        "limit: SHA-256 in memory, all cores": limits.sha256_parallel,
    }


def copy_limits(limits: Limits) -> dict[str, Callable[[], None]]:
    """Return row -> measurement of how fast memory is copied."""
    return {
        "limit: memcpy to warm memory, one core": limits.memmove,
        "limit: memcpy to warm memory, all cores": limits.copy,
    }
