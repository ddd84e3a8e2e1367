"""Lossless compression of checkpoint files, streaming both ways: zstd where installed, else gzip.

The files are what ``zstd -d`` and ``gunzip`` read. Memory is one chunk when writing, the content when reading, and that
may not grow beyond the size that the manifest names.
"""

from __future__ import annotations

import zlib
from importlib.util import find_spec
from typing import Any

from model_checkpoint.checkpoint.storage.base_backend import Sink
from model_checkpoint.errors import FormatError
from model_checkpoint.utils.optional import require

SUFFIX = {"zlib": ".gz", "zstd": ".zst"}
_GZIP = 31  # zlib's window bits for a gzip header and trailer
_CHUNK = 4 << 20  # 4 MiB


def best_codec() -> str:
    """Return the codec that new checkpoints are compressed with here: ``zstd`` if installed, else ``zlib``."""
    return "zstd" if find_spec("zstandard") else "zlib"


class CompressingSink:
    """A sink that compresses into another.

    Args:
        sink: takes the compressed bytes.
        codec: ``zlib`` or ``zstd``.

    Attributes:
        raw_size: bytes taken so far, before compression.
    """

    def __init__(self, sink: Sink, codec: str) -> None:
        self.raw_size = 0
        self._sink = sink
        self._compressor: Any
        if codec == "zstd":
            self._compressor = require("zstandard", "zstd", "zstd compression").ZstdCompressor(level=3).compressobj()
        else:
            self._compressor = zlib.compressobj(1, wbits=_GZIP)  # level 1: weights hardly shrink more at 9, 4x slower

    def write(self, data: bytes | bytearray | memoryview) -> int:
        view = memoryview(data)
        if view.format != "B" or view.ndim != 1:
            view = view.cast("B")
        for start in range(0, view.nbytes, _CHUNK):
            self._sink.write(self._compressor.compress(view[start : start + _CHUNK]))
        self.raw_size += view.nbytes
        return view.nbytes

    def finish(self) -> None:
        """Write what the compressor still holds; the sink stays open."""
        self._sink.write(self._compressor.flush())


def decompress(data: memoryview, codec: str, raw_size: int) -> memoryview:
    """Return the content of a compressed file.

    Args:
        data: the whole file.
        codec: what it was compressed with.
        raw_size: bytes that it must have; not one more is produced.

    Raises:
        FormatError: it is damaged, or not ``raw_size`` bytes.
        MissingDependencyError: it needs a codec that is not installed.
    """
    if codec not in SUFFIX:
        raise FormatError(f"compression {codec!r} is not known to this version; upgrade model-checkpoint")
    try:
        content = memoryview(bytearray(raw_size))  # untouched pages cost nothing, should the size be a lie
    except (MemoryError, OverflowError):
        raise FormatError(f"a compressed file claims {raw_size} bytes, more than this machine can hold") from None
    written = _unzstd(data, content) if codec == "zstd" else _gunzip(data, content)
    if written != raw_size:
        raise FormatError(f"decompressed to {written} bytes or more, {raw_size} were saved")
    return content


def _unzstd(data: memoryview, content: memoryview) -> int:
    zstandard = require("zstandard", "zstd", "loading this compressed checkpoint")
    written = 0
    try:
        with zstandard.ZstdDecompressor().stream_reader(data) as reader:
            while written < content.nbytes:
                count = reader.readinto(content[written : written + _CHUNK])
                if not count:
                    return written
                written += count
            return written + len(reader.read(1))
    except zstandard.ZstdError as error:
        raise FormatError(f"compressed data is damaged: {error}") from error


def _gunzip(data: memoryview, content: memoryview) -> int:
    decompressor = zlib.decompressobj(wbits=_GZIP)
    written = 0
    pending: bytes | memoryview = data
    try:
        while not decompressor.eof:
            part = decompressor.decompress(pending, _CHUNK)
            if not part and not decompressor.unconsumed_tail and not decompressor.eof:
                raise FormatError("compressed data is cut off")
            if written + len(part) > content.nbytes:
                return written + len(part)
            content[written : written + len(part)] = part
            written += len(part)
            pending = decompressor.unconsumed_tail
    except zlib.error as error:
        raise FormatError(f"compressed data is damaged: {error}") from error
    return written
