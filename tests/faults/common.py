"""What the fault tests share: formats of checkpoints, states that tell what they are, damage, children, pickles."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import zipfile
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers_storage import Store, exact, needs_torch, needs_zstandard, torch

from model_checkpoint.errors import FormatVersionError, IntegrityError

ROOT = Path(__file__).parents[2]
DEEP = 100_000  # levels
DEADLINE = 120.0  # seconds after which a child counts as hung

# Every way to lie on disk: the backend, the suffix that compression adds, and the shards.
FORMATS = [
    "safetensors",
    pytest.param("safetensors.zst", marks=needs_zstandard),
    "safetensors.gz",
    "safetensors, sharded",
    pytest.param("pytorch", marks=needs_torch),
    pytest.param("pytorch.zst", marks=[needs_torch, needs_zstandard]),
    pytest.param("pytorch.gz", marks=needs_torch),
]


def state_of(epoch: int, count: int = 1500, tensors: bool = False) -> dict[str, Any]:
    """Return a state of which every byte tells the epoch: whatever is mixed up or changed shows."""
    numbers = array("d", random.Random(epoch).sample(range(1 << 40), count))
    parts = {"weight": numbers[: count // 2], "bias": numbers[count // 2 :]}
    if tensors:
        parts = {name: torch.tensor(list(part), dtype=torch.float64) for name, part in parts.items()}
    return {"epoch": epoch, **parts}


class Twins:
    """Two checkpoints of the same shape and other content in one store, of which one gets damaged.

    Args:
        folder: where.
        form: one of ``FORMATS``.
        patch: makes gzip the codec for the saves.
    """

    def __init__(self, folder: Path, form: str, patch: pytest.MonkeyPatch) -> None:
        self.form, tensors = form, form.startswith("pytorch")
        with patch.context() as patched:
            if form.endswith(".gz"):
                patched.setitem(sys.modules, "zstandard", None)
            shards = {"max_shard_size": 5000} if "sharded" in form else {}
            compressed = form.endswith((".zst", ".gz"))
            self.store = Store(folder, form.split(".")[0].split(",")[0], enable_compression=compressed, **shards)
            self.states = [(state_of(n, 1500, tensors), state_of(-n, 700, tensors)) for n in (1, 2)]
            # Some flips of the last digit of the one, and of the escapes of the other, mean the same value.
            given = {"loss": 0.1 + 0.2, "notes": "caf\u00e9 \u00ea"}
            self.ids = [self.store.save(*state, epoch=n, **given) for n, state in enumerate(self.states, 1)]
        self.folder, self.other_folder = map(self.store.path, self.ids)

    def whole(self) -> bool:
        """Whether both load as they were saved and verify."""
        loaded = [self.store.load(checkpoint_id) for checkpoint_id in self.ids]
        found = [(each["model_state_dict"], each["optimizer_state_dict"]) for each in loaded]
        return exact(found) == exact(self.states) and self.store.manager.verify_experiment_integrity()["failed"] == 0

    def oversights(self, what: str) -> Iterator[str]:
        """Yield what is wrong with how the damage to the first one is met by a load and by a verification."""
        try:
            self.store.load(self.ids[0])
            yield f"{what}: loaded"
        except (IntegrityError, FormatVersionError):  # a flip in its version makes a manifest one of the future
            pass
        except Exception as error:  # noqa: BLE001 - any other error is a finding, and the next points are still tried
            yield f"{what}: {error!r} when loading"
        try:
            results = self.store.manager.verify_experiment_integrity()["checkpoint_results"]
            if [results[checkpoint_id]["verified"] for checkpoint_id in self.ids] != [False, True]:
                yield f"{what}: not told by the verification"
        except Exception as error:  # noqa: BLE001
            yield f"{what}: {error!r} when verifying"


@contextmanager
def flipped(path: Path, at: int, bit: int) -> Iterator[None]:
    """Turn a bit of a file over, for a ``with`` block."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        byte = os.pread(descriptor, 1, at)
        os.pwrite(descriptor, bytes([byte[0] ^ (1 << bit)]), at)
        yield
        os.pwrite(descriptor, byte, at)
    finally:
        os.close(descriptor)


# Prepended to the programs of children. PEAK is memory that the process itself has touched: the maximum in rusage would
# count the parent's, which it had for a moment between fork and exec.
PRELUDE = """
import json, os, resource, sys

def tell(*words):
    print(json.dumps(words), flush=True)

def forget_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

def memory(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))

def growth(call):
    "Return what the call returns, and by how many bytes the peak of memory exceeded what was in use before."
    forget_peak()
    before = memory("VmRSS")
    returned = call()
    return returned, memory("VmHWM") - before

def limit(more):
    "Let the address space grow by so many bytes and no further."
    most = memory("VmSize") + more
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
"""
needs_proc = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks of memory are reset by Linux's /proc/self/clear_refs"
)


def run_child(program: str, *arguments: object, **environment: str) -> list[Any]:
    """Run a program after ``PRELUDE`` in a process of its own; returns what it told. One that hangs is ended."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stderr}"
    return [json.loads(line) for line in done.stdout.splitlines()]


def points(length: int, count: int, chance: random.Random) -> list[int]:
    """Return ``count`` places below ``length``, or all where there are no more."""
    return sorted(chance.sample(range(length), min(count, length)))


def tree(folder: Path, leave_out: Callable[[Path], bool] = lambda path: False) -> dict[str, Any]:
    """Return all that lies below a folder: the bytes of files, the targets of links, kinds and modes."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if leave_out(path):
            continue
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        elif path.is_dir():
            found[name] = ("folder",)
        else:
            found[name] = ("file", path.stat().st_mode, path.read_bytes())
    return found


# Hostile pickles


def text(value: str) -> bytes:
    """Return what puts a text on the pickle machine's stack; by hand, so that it is not what ``dumps`` would write."""
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def named(dotted: str) -> bytes:
    """Return GLOBAL, the old way to name something: ``module:name``."""
    module, _, name = dotted.partition(":")
    return f"c{module}\n{name}\n".encode()


def stacked(dotted: str) -> bytes:
    """Return STACK_GLOBAL, whose names are values and may walk along dots."""
    module, _, name = dotted.partition(":")
    return text(module) + text(name) + b"\x93"


def called(function: bytes, *arguments: bytes) -> bytes:
    """Return REDUCE: a function called."""
    return function + b"(" + b"".join(arguments) + b"tR"


def gadgets(canary: str) -> dict[str, bytes]:
    """Return pickles (without frame and STOP) each of which makes the file ``canary`` when it is read without care."""
    path, code = text(canary), text(f"open({canary!r}, 'w').close()")
    shell = text(f"touch {canary}")
    touch = pickle.dumps(_Opens(canary), 2)
    modes = text("w")
    found = {
        "os.system": called(named("os:system"), shell),
        "posix.system": called(named("posix:system"), shell),
        "os.mkdir": called(named("os:mkdir"), path),
        "subprocess.check_call": called(named("subprocess:check_call"), b"]" + text("touch") + b"a" + path + b"a"),
        "subprocess.Popen by OBJ": b"(" + named("subprocess:Popen") + b"]" + text("touch") + b"a" + path + b"ao",
        "os.mkdir by INST": b"(" + path + b"ios\nmkdir\n",
        "builtins.eval": called(named("builtins:eval"), code),
        "builtins.exec": called(named("builtins:exec"), code),
        "builtins.open": called(named("builtins:open"), path, modes),
        "the old name of eval": called(named("__builtin__:eval"), code),
        "io.open": called(named("io:open"), path, modes),
        "codecs.open": called(named("codecs:open"), path, modes),
        "pathlib.Path.touch": called(stacked("pathlib:Path.touch"), called(named("pathlib:Path"), path)),
        "getattr of an import": called(
            called(
                named("builtins:getattr"),
                called(named("builtins:__import__"), text("os")),
                text("mkdir"),
            ),
            path,
        ),
        "importlib.import_module": called(
            called(
                named("builtins:getattr"),
                called(named("importlib:import_module"), text("os")),
                text("mkdir"),
            ),
            path,
        ),
        "STACK_GLOBAL": called(stacked("os:mkdir"), path),
        "a dotted walk": called(stacked("os:path.os.mkdir"), path),
        "a walk from torch": called(stacked("torch:os.mkdir"), path),
        "a walk from torch._utils": called(stacked("torch._utils:torch.os.system"), shell),
        "functools.partial": called(called(named("functools:partial"), named("os:mkdir"), path)),
        "operator.methodcaller": called(
            called(named("operator:methodcaller"), text("mkdir"), path),
            called(named("importlib:import_module"), text("os")),
        ),
        "operator.attrgetter": called(
            called(
                called(named("operator:attrgetter"), text("mkdir")),
                called(named("builtins:__import__"), text("os")),
            ),
            path,
        ),
        "a chain of reduces": called(
            named("builtins:list"), called(named("builtins:map"), named("os:mkdir"), b"]" + path + b"a")
        ),
        "BUILD with a state that is called": called(named("builtins:eval"), code) + b"}b",
        "numpy's runstring": called(named("numpy.testing._private.utils:runstring"), code, b"}"),
        "numpy.load of a pickle": called(named("numpy:savetxt"), path, b"]"),
        "numpy.memmap": called(named("numpy:memmap"), path, text("uint8"), text("w+"), b"K\x00", b"(K\x08t"),
        "torch.storage._load_from_bytes": called(
            named("torch.storage:_load_from_bytes"), b"B" + struct.pack("<I", len(touch)) + touch
        ),
        "torch's execWrapper": called(named("torch.jit.unsupported_tensor_ops:execWrapper"), code, b"}", b"}"),
        "torch's collect_env": called(named("torch.utils.collect_env:run"), shell),
        "torch.fx's exec": called(named("torch.fx.graph_module:_exec_with_source"), code, b"}"),
        "torch.save": called(named("torch.serialization:save"), b"}", path),
        "a pickle in a pickle": called(named("pickle:loads"), b"B" + struct.pack("<I", len(touch)) + touch),
        "Parameter with a hostile state": called(
            named("torch._utils:_rebuild_parameter_with_state"),
            called(named("os:mkdir"), path),
            b"\x88",
            b"}",
            b"}",
        ),
    }
    return found


class _Opens:
    """Unpickled, it makes a file."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self._path, "w"))


def archive(pickled: bytes, others: Mapping[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return a file of torch's present format with ``pickled`` as its data, and members replaced or added."""
    torch.save({"arrays": {"model": {"w": torch.ones(4)}}}, buffer := io.BytesIO())
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(made := io.BytesIO(), "w", compression) as new:
        for name in old.namelist():
            plain = name.partition("/")[2]
            content = pickled if plain == "data.pkl" and pickled else old.read(name)
            new.writestr(name, (others or {}).get(plain, content))
    return made.getvalue()


def legacy(pickled: bytes) -> bytes:
    """Return a file of torch before 1.6: magic number, protocol, system and the object, pickled one after the other."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, system)]
    return b"".join(parts) + b"\x80\x02" + pickled + b"." + pickle.dumps([], 2)


def tar(pickled: bytes) -> bytes:
    """Return a file of torch before 0.1.10, which CVE-2025-32434 was about."""
    with tarfile.open(fileobj=(made := io.BytesIO()), mode="w") as file:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            content = b"\x80\x02" + pickled + b"." if name != "sys_info" else pickle.dumps({"little_endian": True}, 2)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return made.getvalue()


def as_tensor(pickled: bytes) -> bytes:
    """Return the pickle of what a checkpoint holds, with ``pickled`` as its tensor."""
    return b"}" + text("arrays") + b"}" + text("model") + b"}" + text("w") + pickled + b"sss"


FORMS: dict[str, Callable[[bytes], bytes]] = {
    "archive": lambda pickled: archive(b"\x80\x02" + pickled + b"."),
    "archive, protocol 4": lambda pickled: archive(b"\x80\x04" + pickled + b"."),
    "as a tensor": lambda pickled: archive(b"\x80\x02" + as_tensor(pickled) + b"."),
    "as a key": lambda pickled: archive(b"\x80\x02}" + pickled + b"K\x01s."),
    "dropped before the end": lambda pickled: archive(b"\x80\x02" + pickled + b"0" + as_tensor(b"K\x01") + b"."),
    "torch 1.5": legacy,
    "torch 0.1": tar,
    "bare": lambda pickled: b"\x80\x04" + pickled + b".",
}


def rebuilt(*arguments: bytes, function: str = "torch._utils:_rebuild_tensor_v2") -> bytes:
    return called(named(function), *arguments)


def stored(count: bytes = b"K\x04", key: str = "0", kind: str = "torch:FloatStorage") -> bytes:
    return b"(" + text("storage") + named(kind) + text(key) + text("cpu") + count + b"tQ"


def integer(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


PLAIN = (b"K\x00", b"(K\x04t", b"(K\x01t", b"\x89", called(named("collections:OrderedDict")))


def twisted() -> dict[str, bytes]:
    """Return pickles that name nothing but what is allowed, in ways that tensors never were saved."""
    offset, size, stride, *rest = PLAIN
    tensors = {
        "an offset beyond the storage": rebuilt(stored(), integer(2**40), size, stride, *rest),
        "a negative offset": rebuilt(stored(), integer(-64), size, stride, *rest),
        "a size beyond the storage": rebuilt(stored(), offset, b"(" + integer(2**40) + b"t", stride, *rest),
        "a size that overflows": rebuilt(
            stored(), offset, b"(" + integer(2**62) + integer(4) + b"t", b"(K\x01K\x01t", *rest
        ),
        "a negative size": rebuilt(stored(), offset, b"(" + integer(-4) + b"t", stride, *rest),
        "a stride beyond the storage": rebuilt(stored(), offset, size, b"(" + integer(2**40) + b"t", *rest),
        "a negative stride": rebuilt(stored(), offset, size, b"(" + integer(-1) + b"t", *rest),
        "more numbers than the storage has": rebuilt(
            stored(integer(2**20)), offset, b"(" + integer(2**20) + b"t", stride, *rest
        ),
        "2**60 numbers": rebuilt(stored(integer(2**60)), offset, size, stride, *rest),
        "-1 numbers": rebuilt(stored(integer(-1)), offset, size, stride, *rest),
        "a storage that is not there": rebuilt(stored(key="9"), *PLAIN),
        "a storage above the archive": rebuilt(stored(key="../../../../etc/passwd"), *PLAIN),
        "a storage of another kind": rebuilt(stored(kind="torch:ComplexDoubleStorage"), *PLAIN),
        "a tensor for a storage": rebuilt(rebuilt(stored(), *PLAIN), *PLAIN),
        "a sparse tensor without bounds": rebuilt(
            named("torch:sparse_coo"),
            b"(" + rebuilt(stored(b"K\x02", kind="torch:LongStorage"), offset, b"(K\x01K\x02t", b"(K\x02K\x01t", *rest),
            rebuilt(stored(), b"K\x00", b"(K\x02t", b"(K\x01t", *rest),
            b"(K\x01tt",
            function="torch._utils:_rebuild_sparse_tensor",
        ),
        "items of a tensor": rebuilt(stored(), *PLAIN) + b"K\x00K\x01s",
        "items of a storage": stored() + integer(2**40) + b"K\x01s",
        "a dict for a tensor": b"}",
        "a state built into a tensor": rebuilt(stored(), *PLAIN) + b"}" + text("__class__") + b"K\x01sb",
    }
    raw = {
        "an EXT code": b"\x82\x01.",
        "a memo at 2**31 - 1": b"}r\xff\xff\xff\x7f.",
        "a text of 2**62 bytes": b"\x8d" + struct.pack("<Q", 2**62) + b"a.",
        "bytes of 2**62": b"\x8e" + struct.pack("<Q", 2**62) + b"a.",
        "a long of 2**31 - 1 bytes": b"\x8b\xff\xff\xff\x7fa.",
        "lists 100,000 deep": b"]" * DEEP + b"a" * (DEEP - 1) + b".",
        "tuples 100,000 deep": b")" + b"\x85" * DEEP + b".",
        "a laugh": b"]K\x01a" + b"2" * 20 + b"\x87" * 2 + b"".join(b"q%c2\x86" % i for i in range(60)) + b".",
        "a dict in itself": b"}q\x00" + text("arrays") + b"h\x00s.",
        "a key that is a list": b"}" + as_tensor(b"]K\x01a") + b"K\x01s.",
    }
    return {name: as_tensor(pickled) + b"." for name, pickled in tensors.items()} | raw
