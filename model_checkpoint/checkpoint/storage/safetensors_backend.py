"""SafeTensors from the standard library: a writer, and a reader that accepts exactly what the format allows.

The format: eight bytes of little-endian header length, a JSON header (name -> dtype, shape, offsets), then the
tensors' bytes without holes. Source: the "Format" section of https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from operator import attrgetter
from typing import Any, ClassVar

from model_checkpoint.arrays import CODES, DTYPES, HostArray
from model_checkpoint.checkpoint.state import EncodedState
from model_checkpoint.checkpoint.storage.base_backend import PlannedFile, Sink, StorageBackend
from model_checkpoint.errors import FormatError

_SHARD = (256 << 20, 5 << 30)  # 256 MiB to 5 GiB: several to a component, so that threads share the work evenly,
_PARTS = 8  # but not many more than this
MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation
_MAX_SIZE = 2**63 - 1
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_ENTRY = {"dtype", "shape", "data_offsets"}
_FILE_NAME = re.compile(r"(?P<component>.+?)(-\d{5}-of-\d{5})?\.safetensors")


class SafeTensorsBackend(StorageBackend):
    """One ``<component>.safetensors`` for each part of the state, sharded the Hugging Face way when it is large."""

    name: ClassVar[str] = "safetensors"

    def plan(self, state: EncodedState, max_shard_size: int | None) -> list[PlannedFile]:
        files: list[PlannedFile] = []
        for component, arrays in state.arrays.items():
            if not arrays:
                continue
            size = sum(map(_nbytes, arrays.values()))
            limit = max_shard_size or max(_SHARD[0], min(size // _PARTS, _SHARD[1]))
            shards = [arrays] if size <= limit else split(arrays, size, limit)
            names = [f"{component}.safetensors"]
            if len(shards) > 1:
                names = [f"{component}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
                files.append(_index(component, names, shards))
            for name, shard in zip(names, shards):
                header, ordered, size = build_header(shard)
                files.append(PlannedFile(name, component, size, partial(write_tensors, header, ordered)))
        return files

    def read(self, files: Mapping[str, memoryview]) -> dict[str, dict[str, HostArray]]:
        found: dict[str, dict[str, HostArray]] = {}
        for name, content in files.items():
            match = _FILE_NAME.fullmatch(name)
            if match:
                found.setdefault(match["component"], {}).update(read_tensors(content))
        return found

    def head(self, start: memoryview) -> int | None:
        return 8 + min(int.from_bytes(start[:8], "little"), MAX_HEADER)


_nbytes = attrgetter("data.nbytes")


def split(arrays: dict[str, HostArray], left: int, limit: int) -> list[dict[str, HostArray]]:
    """Return the arrays in as few parts of at most ``limit`` bytes as can be, of about one size: they are parallel."""
    shards: list[dict[str, HostArray]] = [{}]
    size, fair = 0, left / max(1, -(-left // limit))
    for key, array in arrays.items():
        nbytes = array.data.nbytes
        if shards[-1] and (size + nbytes > limit or size + nbytes / 2 > fair):
            shards.append({})
            left -= size
            size, fair = 0, left / max(1, -(-left // limit))
        shards[-1][key] = array
        size += nbytes
    return shards


def _index(component: str, names: list[str], shards: list[dict[str, HostArray]]) -> PlannedFile:
    total = sum(array.data.nbytes for shard in shards for array in shard.values())
    weight_map = {key: name for name, shard in zip(names, shards) for key in shard}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1).encode()
    return PlannedFile(f"{component}.safetensors.index.json", component, len(text), lambda sink: sink.write(text))


def write_tensors(header: bytes, arrays: list[HostArray], sink: Sink) -> None:
    """Write the file that ``build_header`` planned."""
    sink.write(header)
    for array in arrays:
        if array.data.nbytes:
            sink.write(array.data)


def build_header(
    arrays: Mapping[str, HostArray], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[HostArray], int]:
    """Plan one file.

    Args:
        arrays: key -> array. Wide elements come first, so that every array starts on a multiple of its element size.
        metadata: what the header shall say of itself; None for what Hugging Face needs to read torch's tensors.

    Returns:
        The file's bytes before the data, the arrays in the order in which their data follows, and the file's length.
    """
    by_width: dict[int, list[tuple[str, HostArray]]] = {}
    kinds = set()
    for key, array in arrays.items():
        by_width.setdefault(DTYPES[array.dtype].bits // DTYPES[array.dtype].lanes, []).append((key, array))
        kinds.add(array.kind)
    header: dict[str, Any] = {}
    if metadata is not None:
        header["__metadata__"] = dict(metadata)
    elif kinds == {"torch"}:
        header["__metadata__"] = {"format": "pt"}  # without it, Hugging Face's from_pretrained refuses the file
    position = 0
    ordered: list[HostArray] = []
    for width in sorted(by_width, reverse=True):
        for key, array in by_width[width]:
            dtype = DTYPES[array.dtype]
            shape = [*array.shape, dtype.lanes] if dtype.lanes > 1 else list(array.shape)
            end = position + array.data.nbytes
            header[key] = {"dtype": dtype.code, "shape": shape, "data_offsets": [position, end]}
            position = end
            ordered.append(array)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, ordered, 8 + len(text) + position


def read_tensors(content: memoryview) -> dict[str, HostArray]:
    """Return the arrays of one SafeTensors file, as views of ``content``.

    Args:
        content: the whole file, flat bytes.

    Raises:
        FormatError: anything that the format does not allow: a wrong header length, JSON that is not strict (a key
            twice, NaN, a fraction), an unknown dtype, a negative or overflowing shape, overlaps, holes, trailing bytes.
    """
    return read_file(content)[0]


def read_file(content: memoryview) -> tuple[dict[str, HostArray], dict[str, str]]:
    """Return what ``read_tensors`` returns, and the header's metadata; raises what it raises."""
    header, start = _parse_header(content)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("SafeTensors header: __metadata__ must map strings to strings")
    arrays: dict[str, HostArray] = {}
    spans: list[tuple[int, int]] = []
    for key, entry in header.items():
        code, shape, begin, end = _check_entry(key, entry)
        spans.append((begin, end))
        arrays[key] = HostArray(CODES[code].name, shape, content[start + begin : start + end], "memoryview")
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise FormatError(f"SafeTensors data has {'an overlap' if begin < position else 'a hole'} at byte {begin}")
        position = end
    if start + position != content.nbytes:
        raise FormatError(f"SafeTensors file is {content.nbytes} bytes, its header describes {start + position}")
    return arrays, metadata


def _parse_header(content: memoryview) -> tuple[dict[str, Any], int]:
    if content.nbytes < 8:
        raise FormatError(f"SafeTensors file of {content.nbytes} bytes is shorter than its header length")
    length = int.from_bytes(content[:8], "little")
    if length > MAX_HEADER or length > content.nbytes - 8:
        raise FormatError(f"SafeTensors header of {length} bytes in a file of {content.nbytes} (limit {MAX_HEADER})")
    text = bytes(content[8 : 8 + length])
    if not text.startswith(b"{"):
        raise FormatError("SafeTensors header does not begin with '{'")
    try:
        header = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_number,
            parse_float=_refuse_number,
        )
        if _SURROGATE.search(text) and not _is_text(header):  # only an escape can make half of a pair
            raise FormatError("half of a surrogate pair is no text")
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors, and FormatError itself, are ValueErrors
        raise FormatError(f"SafeTensors header is not valid: {error}") from None
    return header, 8 + length


def _is_text(value: Any) -> bool:
    """Whether all strings in ``value`` are text; JSON's escapes can make some that are not."""
    if isinstance(value, dict):
        return all(_is_text(key) and _is_text(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_text, value))
    return not isinstance(value, str) or value.encode("utf-8", "ignore").decode() == value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise FormatError("a key stands twice in one object")
    return made


def _refuse_number(text: str) -> None:
    raise FormatError(f"the number {text} is no integer")


def _check_entry(key: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or entry.keys() != _ENTRY:
        raise FormatError(f"SafeTensors tensor {key!r}: expected exactly {sorted(_ENTRY)}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in CODES:
        raise FormatError(f"SafeTensors tensor {key!r}: unknown dtype {code!r}")
    if not isinstance(shape, list):
        raise FormatError(f"SafeTensors tensor {key!r}: shape {shape!r} is no list of sizes")
    if not isinstance(offsets, list) or [*map(type, offsets)] != [int, int]:
        raise FormatError(f"SafeTensors tensor {key!r}: data_offsets {offsets!r} are no pair of integers")
    bits, whole = CODES[code].bits, 1
    for length in shape:
        if type(length) is not int or length < 0:
            raise FormatError(f"SafeTensors tensor {key!r}: shape {shape!r} is no list of sizes")
        whole *= max(length, 1)  # zero-sized dimensions must not hide an overflow of the others
        bits *= length
        if whole > _MAX_SIZE:
            raise FormatError(f"SafeTensors tensor {key!r}: shape {shape!r} overflows")
    if not 0 <= offsets[0] <= offsets[1] <= _MAX_SIZE or (offsets[1] - offsets[0]) * 8 != bits:
        raise FormatError(f"SafeTensors tensor {key!r}: data_offsets {offsets!r} do not hold {shape!r} of {code}")
    return code, tuple(shape), offsets[0], offsets[1]
