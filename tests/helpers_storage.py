"""What the tests of storage share: optional packages, the document's backend, a store in a folder, exact comparison."""

from __future__ import annotations

import ctypes
import hashlib
import json
import re
import struct
from array import array
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker


def optional(name: str) -> Any:
    """Import a package, or return None where it is not installed."""
    try:
        return __import__(name)
    except ModuleNotFoundError:
        return None


torch, np, ml_dtypes, zstandard = (optional(name) for name in ("torch", "numpy", "ml_dtypes", "zstandard"))
needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")
needs_numpy = pytest.mark.skipif(np is None, reason="numpy is not installed")
needs_ml_dtypes = pytest.mark.skipif(ml_dtypes is None, reason="ml_dtypes is not installed")
needs_zstandard = pytest.mark.skipif(zstandard is None, reason="zstandard is not installed")

DOCUMENT = Path(__file__).parents[1] / "docs" / "storage_backends.md"


def documented_block() -> str:
    """Return the first Python block of the guide: the complete third backend."""
    found = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert found, f"{DOCUMENT} has no Python block"
    return found[1]


def documented_class(name: str) -> str:
    """Return the guide's backend as the text of a module, under another name and without its registration."""
    return documented_block().replace('"raw"', f'"{name}"').rpartition("register_storage_backend(")[0]


@cache  # a second class of the same name would be refused
def register_documented_backend() -> dict[str, Any]:
    """Run the guide's block once, which registers ``raw``; returns its names."""
    names: dict[str, Any] = {"__name__": "documented_backend"}
    exec(compile(documented_block(), str(DOCUMENT), "exec"), names)
    return names


class Store:
    """A tracker and a manager in one folder.

    Args:
        folder: where; reopened with what is there.
        backend: storage backend.
        database: name of the database file.
        options: further arguments of the manager.
    """

    def __init__(
        self, folder: Path, backend: str = "safetensors", database: str = "experiments.db", **options: Any
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder / "checkpoints"
        self.url = f"sqlite:///{folder}/{database}"
        self.tracker = ExperimentTracker("storage", database_url=self.url)
        self.manager = EnhancedCheckpointManager(self.tracker, str(self.folder), backend, **options)

    def save(self, *parts: object, **options: Any) -> str:
        return self.manager.save_checkpoint(*parts, **options)

    def load(self, checkpoint_id: str, **options: Any) -> dict[str, Any]:
        return self.manager.load_checkpoint(checkpoint_id, **options)

    def round_trip(self, model: object, **options: Any) -> Any:
        return self.load(self.save(model), **options)["model_state_dict"]

    def row(self, checkpoint_id: str) -> dict[str, Any]:
        (found,) = [row for row in self.manager.list_checkpoints() if row["checkpoint_id"] == checkpoint_id]
        return found

    def path(self, checkpoint_id: str) -> Path:
        return Path(self.row(checkpoint_id)["path"])

    def files(self) -> list[str]:
        """Return every file and folder below the directory, but for what the engine makes when it opens one."""
        everything = {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")}
        return sorted(
            everything - {f".engine{name}" for name in ("", "/format.json", "/gc.lock", "/staging", "/trash")}
        )

    def close(self) -> None:
        self.manager.close()
        self.tracker.close()


def reseal(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and write it with the digest that fits, as one who means harm would."""
    path = folder / "checkpoint.json"
    content = json.loads(path.read_bytes())
    change(content)
    del content["manifest_sha256"]
    listed = content.get("files") if isinstance(content.get("files"), list) else [content.get("files")]
    files = ",\n  ".join(map(json.dumps, listed))
    fields = [f'"{name}": {json.dumps(value)}' for name, value in content.items() if name != "files"]
    bare = "{\n " + ",\n ".join([*fields, f'"files": [\n  {files}\n ]'])
    digest = hashlib.sha256(f"{bare}\n}}".encode()).hexdigest()
    path.write_text(f'{bare},\n "manifest_sha256": "{digest}"\n}}')


def replace_file(folder: Path, name: str, content: bytes) -> None:
    """Replace a file of a checkpoint and everything that its manifest says of it."""
    (folder / name).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()

    def change(manifest: dict[str, Any]) -> None:
        (entry,) = [entry for entry in manifest["files"] if entry["name"] == name]
        entry.update(size=len(content), sha256=digest)

    reseal(folder, change)


def reopen_without_database(folder: Path) -> EnhancedCheckpointManager:
    """Open the checkpoints of a ``Store``'s folder with a new database, which is rebuilt from the manifests."""
    return EnhancedCheckpointManager(None, str(folder / "checkpoints"), database_url=f"sqlite:///{folder}/rebuilt.db")


def raw_bytes(value: Any) -> bytes:
    """Return the bytes of a tensor, an ndarray or a buffer in C order, by means of its own library."""
    if torch is not None and isinstance(value, torch.Tensor):
        dense = value.detach().resolve_conj().resolve_neg().contiguous()
        return ctypes.string_at(dense.data_ptr(), dense.numel() * dense.element_size()) if dense.numel() else b""
    return bytes(value.tobytes())


def exact(value: Any) -> Any:
    """Return ``value`` as something that is equal only for the same types, values and bits, all the way down."""
    kind = type(value)
    if (torch is not None and isinstance(value, torch.Tensor)) or (np is not None and isinstance(value, np.ndarray)):
        return ("array", kind.__module__, str(value.dtype), tuple(value.shape), raw_bytes(value))
    if np is not None and isinstance(value, np.generic):
        return ("scalar", str(value.dtype), value.tobytes())
    if isinstance(value, (bytes, bytearray)):
        return (kind, bytes(value))
    if isinstance(value, array):
        return ("array.array", value.typecode, value.tobytes())
    if isinstance(value, memoryview):
        return ("memoryview", value.format, value.shape, value.tobytes())
    if kind is float:
        return ("float", struct.pack("<d", value) if value == value else "nan")
    if kind is complex:
        return ("complex", exact(value.real), exact(value.imag))
    if isinstance(value, dict):
        return (kind, [(exact(k), exact(v)) for k, v in value.items()], exact(getattr(value, "_metadata", None)))
    if isinstance(value, (list, tuple)):
        return (kind, [exact(item) for item in value])
    if isinstance(value, (set, frozenset)):
        return (kind, sorted(repr(exact(item)) for item in value))
    return (kind, value)
