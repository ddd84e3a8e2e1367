"""Files made to do harm, with digests that fit: hostile SafeTensors headers, pickles and decompression bombs.

Each is loaded by its manifest through a manager in a process of its own, where memory is measured.
"""

from __future__ import annotations

import gzip
import io
import json
import runpy
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from common import (
    DEEP,
    FORMS,
    PLAIN,
    ROOT,
    archive,
    as_tensor,
    gadgets,
    needs_proc,
    rebuilt,
    run_child,
    stored,
    twisted,
)
from helpers_storage import Store, needs_torch, needs_zstandard, replace_file, reseal, torch, zstandard

Tried = Callable[[int], None]
MEGABYTE = 1 << 20

# Loads every checkpoint of a directory, verifying and not, and tells of each the outcome and the growth of memory.
LOADER = """
folder, backend, cap = sys.argv[1:4]
from model_checkpoint import EnhancedCheckpointManager
from model_checkpoint.errors import ModelCheckpointError
if backend == "pytorch":
    import torch
    torch.zeros(2).sum()
url = f"sqlite:///{folder}/rebuilt.db"

def outcome(manager, checkpoint_id, verify):
    try:
        manager.load_checkpoint(checkpoint_id, verify_integrity=verify)
        return "loaded"
    except ModelCheckpointError as error:
        return type(error).__name__
    except BaseException as error:
        return f"untyped {error!r}"[:300]

with EnhancedCheckpointManager(None, f"{folder}/checkpoints", database_url=url) as manager:
    ids = [row["checkpoint_id"] for row in manager.list_checkpoints()]
    outcome(manager, ids[0], True)  # so that what the first load imports is not counted
    if int(cap):
        limit(int(cap))
    for checkpoint_id in ids:
        for verify in (True, False):
            tell(checkpoint_id, verify, *growth(lambda: outcome(manager, checkpoint_id, verify)))
"""


def published(
    folder: Path, files: Mapping[str, bytes], backend: str, name: str, codec: str | None = None
) -> dict[str, str]:
    """Save a checkpoint for each of ``files`` and put that in the place of its file ``name``; returns id -> key."""
    store = Store(folder, backend, enable_compression=codec is not None, max_checkpoints=None)
    model = {"w": torch.ones(4) if backend == "pytorch" else b"abcd"}
    ids = {store.save(model): key for key in ["nothing", *files]}  # the first one stays sound
    folders = {key: store.path(checkpoint_id) for checkpoint_id, key in ids.items()}
    store.close()
    for key, content in files.items():
        replace_file(folders[key], name, content)
    return ids


def loaded(
    folder: Path, ids: Mapping[str, str], backend: str, cap: int = 0, **environment: str
) -> list[tuple[str, Any, int]]:
    """Return (key, outcome, growth of memory in bytes) of every load by a child, without those of the sound one."""
    told = run_child(LOADER, folder, backend, cap, **environment)
    assert len(told) == 2 * len(ids), "each was found by its manifest and loaded twice"
    assert {what for checkpoint_id, _, what, _ in told if ids[checkpoint_id] == "nothing"} == {"loaded"}
    return [(f"{ids[i]}, verify={v}", what, grown) for i, v, what, grown in told if ids[i] != "nothing"]


def violations(told: Iterable[tuple[str, str, int]], most: int) -> list[str]:
    """Return what was not refused by type within ``most`` bytes."""
    return [f"{key}: {what}, {n:,} bytes" for key, what, n in told if what != "IntegrityError" or n > most]


# SafeTensors headers


def header(text: bytes, data: bytes = b"abcd", length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(inner: bytes, name: bytes = b'"w"') -> bytes:
    """Return a file whose only tensor has ``inner`` as its entry."""
    return header(b"{" + name + b":" + inner + b"}")


def entry(dtype: str = '"U8"', shape: str = "[4]", offsets: str = "[0,4]") -> bytes:
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}'.encode()


OPEN = {"lists": (b"[", b"]"), "objects": (b'{"a":', b"}"), "lists in objects": (b'{"a":[', b"]}")}
PLACES: dict[str, Callable[[bytes], bytes]] = {
    "an entry": tensor,
    "a shape": lambda inner: tensor(b'{"dtype":"U8","shape":%b,"data_offsets":[0,4]}' % inner),
    "a dimension": lambda inner: tensor(b'{"dtype":"U8","shape":[%b],"data_offsets":[0,4]}' % inner),
    "a dtype": lambda inner: tensor(b'{"dtype":%b,"shape":[4],"data_offsets":[0,4]}' % inner),
    "offsets": lambda inner: tensor(b'{"dtype":"U8","shape":[4],"data_offsets":%b}' % inner),
    "metadata": lambda inner: header(b'{"__metadata__":%b,"w":%b}' % (inner, entry())),
    "a value of the metadata": lambda inner: header(b'{"__metadata__":{"a":%b},"w":%b}' % (inner, entry())),
}
NUMBERS = [
    "NaN",
    "-Infinity",
    "1e999",
    "-1e999",
    "4.0",
    "1e2",
    "-4",
    "-0",
    "9" * 4000,
    "9" * 400_000,
    "0x4",
    "04",
    "+4",
]
NUMBERS += ["9223372036854775808", "18446744073709551620", '"4"', "true", "null", "4,", "\\u0034", "\uff14"]


def hostile_headers() -> dict[str, bytes]:
    made: dict[str, bytes] = {}
    for place, build in PLACES.items():
        for kind, (begin, end) in OPEN.items():
            made[f"{kind} {DEEP} deep in {place}"] = build(begin * DEEP + b"1" + end * DEEP)
            made[f"{kind} without end in {place}"] = build(begin * DEEP)
        made[f"half a surrogate in {place}"] = build(b'"\\ud800"')
        made[f"an overlong UTF-8 slash in {place}"] = build(b'"\xc0\xaf"')
    for number in NUMBERS:
        made[f"shape [{number[:20]}] of {len(number)}"] = tensor(entry(shape=f"[{number}]"))
        made[f"offset {number[:20]} of {len(number)}"] = tensor(entry(offsets=f"[0,{number}]"))
        made[f"begin {number[:20]} of {len(number)}"] = tensor(entry(shape="[0]", offsets=f"[{number},{number}]"))
    for code in ("F32", "F64", "C64", "F4", "I64"):
        for shape in ([2**32, 2**32], [2**62, 2], [2**31] * 4, [3, 2**63 // 3 + 1], [0, 2**62, 4], [1] * 65 + [2**63]):
            made[f"{code} of shape {shape[-4:]}"] = tensor(entry(f'"{code}"', json.dumps(shape)))
    made["a million dimensions"] = tensor(entry(shape=json.dumps([1] * 1_000_000 + [2])))
    made["a million tensors on the same bytes"] = header(
        b"{" + b",".join(b'"%d":%b' % (i, entry()) for i in range(20_000)) + b"}"
    )
    for key in ("dtype", "shape", "data_offsets"):
        made[f"{key} twice"] = tensor(
            entry()[:-1] + f',"{key}":{json.loads(entry())[key]!r}}}'.replace("'", '"').encode()
        )
    made["a tensor twice"] = header(b'{"w":%b,"w":%b}' % (entry(), entry()))
    made["a tensor twice, escaped"] = header(b'{"w":%b,"\\u0077":%b}' % (entry(), entry()))
    made["metadata twice"] = header(b'{"__metadata__":{},"__metadata__":{},"w":%b}' % entry())
    made["a key of the metadata twice"] = header(b'{"__metadata__":{"a":"","a":""},"w":%b}' % entry())
    for length in (0, 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 99_999_999, 100_000_000, 100_000_001):
        made[f"length {length}"] = header(b'{"w":%b}' % entry(), length=length)
    made["an overlap"] = header(b'{"v":%b,"w":%b}' % (entry(shape="[2]", offsets="[1,3]"), entry()))
    made["a hole"] = tensor(entry(shape="[3]", offsets="[1,4]"))
    made["a trailing byte"] = tensor(entry()) + b"!"
    made["another file behind it"] = tensor(entry()) * 2
    return made


@needs_proc
@pytest.mark.slow
def test_hostile_headers_are_refused_by_type_in_less_than_100_megabytes(tmp_path: Path, tried: Tried) -> None:
    files = hostile_headers()
    known = runpy.run_path(str(ROOT / "tests/checkpoint/test_safetensors_format.py"))["HOSTILE"]
    files.update((f"format: {name}", bytes(content)) for name, content in known.items())
    ids = published(tmp_path, files, "safetensors", "model.safetensors")
    told = loaded(tmp_path, ids, "safetensors")
    tried(len(told))
    assert violations(told, 100 * MEGABYTE) == []


@needs_proc
@pytest.mark.slow
def test_a_file_that_is_all_header_costs_no_more_than_its_own_bytes(tmp_path: Path, tried: Tried) -> None:
    """To compare its digest a file must be read; that its header is above the limit shows before it is decoded."""
    length = 100_000_001
    many = header(b"{" + b" " * (length - 2) + b"}", b"")
    ids = published(tmp_path, {"spaces": many}, "safetensors", "model.safetensors")
    told = loaded(tmp_path, ids, "safetensors")
    tried(len(told))
    assert violations(told, len(many) + 10 * MEGABYTE) == []


# Pickles

CONTROL = """
import pickle
with open(sys.argv[1]) as file:
    for pickled in json.load(file):
        for protocol in (b"\\x80\\x02", b"\\x80\\x04"):  # names that walk need the one, old names the other
            try:
                pickle.loads(protocol + bytes.fromhex(pickled) + b".")
            except Exception:
                pass
"""


@needs_torch
@needs_proc
@pytest.mark.slow
def test_no_gadget_in_a_pickle_runs(tmp_path: Path, tried: Tried) -> None:
    """Each gadget has a canary of its own in every form; read by pickle itself, without care, each one springs."""
    files, canaries = {}, tmp_path / "canaries"
    canaries.mkdir()
    for number_of_form, (form, build) in enumerate(FORMS.items()):
        for number_of_gadget, gadget in enumerate(gadgets("")):
            canary = canaries / f"{number_of_form}-{number_of_gadget}"
            files[f"{gadget}, {form}"] = build(gadgets(str(canary))[gadget])
    ids = published(tmp_path, files, "pytorch", "checkpoint.pt")
    told = loaded(tmp_path, ids, "pytorch", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")  # torch's switch must not reach us
    tried(len(told))
    assert sorted(path.name for path in canaries.iterdir()) == []
    assert violations(told, 100 * MEGABYTE) == []
    control = {gadget: canaries / f"control-{n}" for n, gadget in enumerate(gadgets(""))}
    (tmp_path / "control").write_text(json.dumps([gadgets(str(path))[name].hex() for name, path in control.items()]))
    run_child(CONTROL, tmp_path / "control")
    assert [name for name, path in control.items() if not path.exists()] == [], "no threats, which prove nothing"


@needs_torch
@needs_proc
@pytest.mark.slow
def test_pickles_that_misuse_what_is_allowed_are_refused_by_type_and_crash_nothing(
    tmp_path: Path, tried: Tried
) -> None:
    files = {name: archive(b"\x80\x02" + pickled) for name, pickled in twisted().items()}
    ids = published(tmp_path, files, "pytorch", "checkpoint.pt")
    told = loaded(tmp_path, ids, "pytorch")
    tried(len(told))
    assert violations(told, 100 * MEGABYTE) == []


# Decompression bombs

TEN_GIGABYTES = 10 << 30


def zstd_of_zeros(size: int, window: int | None = None, content_size: int | None = None) -> bytes:
    """Return a zstd frame by hand: blocks of one zero that is repeated 131,072 times, four bytes each."""
    made = b"\x28\xb5\x2f\xfd" + bytes([0xC0 if content_size is not None else 0])
    made += bytes([(17 if window is None else window) - 10 << 3])  # of 2**17 bytes, the most that a block may have
    made += b"" if content_size is None else struct.pack("<Q", content_size)
    block = (1 << 17 << 3) | (1 << 1)  # size, and that it is repeated; the last one has the lowest bit set
    count = size >> 17
    return made + (struct.pack("<I", block)[:3] + b"\0") * (count - 1) + struct.pack("<I", block | 1)[:3] + b"\0"


def gzip_of_zeros(size: int) -> bytes:
    """Return a gzip file of the same megabyte again and again, without the end that would have to be right."""
    packer = zlib.compressobj(9, wbits=-15)
    first = packer.compress(bytes(MEGABYTE)) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08\0\0\0\0\0\0\x03" + first * (size >> 20)


def bombs(codec: str) -> dict[str, bytes]:
    zeros = zstd_of_zeros if codec == "zst" else gzip_of_zeros
    pack = zstandard.ZstdCompressor().compress if codec == "zst" else gzip.compress
    big = zeros(TEN_GIGABYTES)
    found = {
        "10 GB": big,
        "10 GB in less than 100 KB, nested": pack(big),
        "nested again": pack(pack(big)),
        "1 MB": zeros(MEGABYTE),
        "a bomb behind what was saved": pack(b"0" * 100) + big,
    }
    if codec == "zst":
        found["a window of 2 GB"] = zstd_of_zeros(TEN_GIGABYTES, window=31)
        found["a window of 2 TB"] = zstd_of_zeros(MEGABYTE, window=41)
        found["a content of 2**62 bytes"] = zstd_of_zeros(MEGABYTE, content_size=2**62)
        found["10 MB of frames to skip"] = struct.pack("<II", 0x184D2A50, 10 << 20) + bytes(10 << 20)
        found["a million empty blocks"] = zstd_of_zeros(1 << 17)[:6] + b"\0\0\0" * 1_000_000 + b"\1\0\0"
    else:
        found["a name of 10 MB in the header"] = b"\x1f\x8b\x08\x08\0\0\0\0\0\x03" + b"n" * (10 << 20)
        found["a million empty blocks"] = gzip_of_zeros(0) + b"\0\0\0\xff\xff" * 1_000_000
        found["a thousand empty members"] = gzip.compress(b"") * 1000
    return found


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
@pytest.mark.parametrize("codec", ["gz", pytest.param("zst", marks=needs_zstandard)])
def test_bombs_are_refused_by_type_and_memory_stays_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, name: str, tried: Tried
) -> None:
    """Whatever a file unpacks to, and whatever size its manifest claims."""
    found, sizes = {}, [None, 0, 200, 2**33, TEN_GIGABYTES, 2**62]
    for bomb, content in bombs(codec).items():
        for size in sizes if len(content) < MEGABYTE else sizes[:4]:
            found[f"{bomb}, raw_size {size}"] = (content, size)
    with monkeypatch.context() as patched:
        if codec == "gz":
            patched.setitem(sys.modules, "zstandard", None)
        ids = published(
            tmp_path, {k: content for k, (content, _) in found.items()}, "safetensors", f"{name}.{codec}", codec
        )
    for checkpoint_id, key in ids.items():
        if key != "nothing" and found[key][1] is not None:
            (folder,) = tmp_path.glob(f"checkpoints/*/{checkpoint_id}")
            reseal(folder, lambda manifest, key=key: claim(manifest, f"{name}.{codec}", found[key][1]))
    told = loaded(tmp_path, ids, "safetensors", cap=1 << 30)  # 1 GiB, so that a lie about 10 GB is refused at once
    tried(len(told))
    assert violations(told, 64 * MEGABYTE) == []


def claim(manifest: dict[str, Any], name: str, raw_size: int) -> None:
    (entry,) = [entry for entry in manifest["files"] if entry["name"] == name]
    entry["raw_size"] = raw_size


def overlapping(count: int) -> bytes:
    """Return an archive with the numbers of ``count`` tensors of 1 MiB in one and the same place: 1 MiB in all."""
    tensors = {f"w{i}": torch.full((1 << 18,), float(i)) for i in range(count)}
    torch.save({"arrays": {"model": tensors}}, buffer := io.BytesIO())
    first: zipfile.ZipInfo | None = None
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(made := io.BytesIO(), "w") as new:
        for member in old.infolist():
            if "/data/" in member.filename and first is not None:
                again = zipfile.ZipInfo(member.filename)
                again.header_offset, again.CRC = first.header_offset, first.CRC
                again.file_size = again.compress_size = first.file_size
                new.filelist.append(again)  # in the directory at the end alone
            else:
                new.writestr(member.filename, old.read(member))
                first = new.getinfo(member.filename) if "/data/" in member.filename else None
    return made.getvalue()


@needs_torch
@needs_proc
@pytest.mark.slow
def test_bombs_in_torch_archives_are_refused_by_type_and_memory_stays_small(tmp_path: Path, tried: Tried) -> None:
    """Torch itself never compresses the members of its archives, but it would unpack those that are."""
    zeros = bytes(96 << 20)
    good = b"\x80\x02" + as_tensor(rebuilt(stored(), *PLAIN)) + b"."
    files = {
        "numbers of 96 MB": archive(b"", {"data/0": zeros}, zipfile.ZIP_DEFLATED),
        "a pickle of 96 MB": archive(good + zeros, compression=zipfile.ZIP_DEFLATED),
        "a version of 96 MB": archive(good, {"version": b"3" + zeros}, zipfile.ZIP_DEFLATED),
        "a byte order of 96 MB": archive(good, {"byteorder": zeros}, zipfile.ZIP_DEFLATED),
        "96 times the same MB": overlapping(96),
    }
    ids = published(tmp_path, files, "pytorch", "checkpoint.pt")
    told = loaded(tmp_path, ids, "pytorch")
    tried(len(told))
    assert violations(told, 48 * MEGABYTE) == []
