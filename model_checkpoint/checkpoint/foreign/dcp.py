"""PyTorch's distributed checkpoints (DCP): ``.metadata``, a pickle of plain records, and ``*.distcp`` with the tensors.

Of the metadata nothing is made but records of our own in place of torch's: so a pickle cannot call or change anything.
"""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from model_checkpoint.checkpoint.foreign import take_apart
from model_checkpoint.checkpoint.foreign.files import member, read_whole
from model_checkpoint.checkpoint.foreign.parts import Foreign, Source
from model_checkpoint.checkpoint.foreign.pickles import load, load_item
from model_checkpoint.errors import ConfigurationError, FormatError, ModelCheckpointError
from model_checkpoint.utils.optional import require

_MODULES = {
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed._shard.sharded_tensor.metadata",  # of TensorProperties, before torch 2.4
}
_RECORDS = {
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "_StorageInfo",
}
_FORMATS = ("TORCH_CONTIGUOUS_FORMAT", "TORCH_CHANNELS_LAST", "TORCH_PRESERVE_FORMAT")  # of _MEM_FORMAT_ENCODING


def _memory_format(encoding: object, name: object) -> int:
    """Stand in for ``getattr``, with which Python 3.11.2 and the like pickle members of an Enum."""
    if encoding is not int or name not in _FORMATS:
        raise FormatError(
            f"the metadata of a DCP checkpoint ask for {name!r} of {encoding!r}, which has no place there"
        )
    return _FORMATS.index(name)


_VALUES: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): str,
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): int,
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"): int,
    ("builtins", "getattr"): _memory_format,
    ("collections", "OrderedDict"): OrderedDict,
}
_OPTIMIZERS = ("optimizer", "optim")
_REST = "meta.pt"  # where Lightning puts what is not sharded
_PARTS = ("model", *_OPTIMIZERS, "lr_scheduler", "scheduler")


def read(source: Source) -> Foreign:
    """Read the parts of all ranks into whole tensors."""
    if not source.copy:
        raise ConfigurationError(f"{source.path} is a DCP checkpoint, which must be converted; use copy=True")
    torch = require("torch", "torch", "importing a DCP checkpoint")
    try:
        metadata = _Unpickler(torch, bytes(read_whole(member(source.path, ".metadata")))).load()
        items = _Items(torch, source, metadata.storage_data)
        flat = {name: items.read(name, kind) for name, kind in metadata.state_dict_metadata.items()}
        return take_apart(_with_rest(source, _nested(flat, metadata.planner_data)))
    except (ModelCheckpointError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - records of any form raise whatever they like
        raise FormatError(f"{source.path} is a damaged DCP checkpoint: {error!r:.1000}") from None


def _with_rest(source: Source, content: dict[Any, Any]) -> dict[Any, Any]:
    """Return the content as Lightning's Trainer had it, where that has put a part of it beside the shards."""
    if not os.path.lexists(os.path.join(source.path, _REST)):
        return content
    rest = load(member(source.path, _REST), source.trust)
    states = [content.pop(name) for name in [f"optimizer_{i}" for i in range(len(content))] if name in content]
    model = {"state_dict": content.pop("model")} if "model" in content else {}
    return {**rest, **content, **model, "optimizer_states": states}


class _Record:
    """Stands in for any of torch's classes; has the attributes that the pickle gives it."""

    def __init__(self, *arguments: object) -> None:
        """Take what torch's class would; only paths are made so, and nobody asks for them."""

    def __setstate__(self, state: Any) -> None:
        vars(self).update(state if isinstance(state, dict) else {"values": state})


class _Unpickler(pickle.Unpickler):
    """Makes what DCP's metadata are made of, and nothing else."""

    def __init__(self, torch: Any, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self._torch = torch
        self._record = type("_Record", (_Record,), {})  # of this pickle only, which could set attributes of it

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _VALUES:
            return _VALUES[module, name]
        if (module in _MODULES and name in _RECORDS) or (module.startswith("pathlib") and name.endswith("Path")):
            return self._record
        dtype = getattr(self._torch, name, None) if module == "torch" else None
        if isinstance(dtype, self._torch.dtype):
            return dtype
        raise FormatError(f"the metadata of a DCP checkpoint asks for {module}.{name}, which has no place there")


class _Items:
    """Reads the items of a checkpoint."""

    def __init__(self, torch: Any, source: Source, storage: Mapping[Any, Any]) -> None:
        self._torch = torch
        self._source = source
        self._stored: dict[str, list[tuple[tuple[int, ...], Any]]] = {}
        for index, info in storage.items():
            self._stored.setdefault(index.fqn, []).append((tuple(vars(index).get("offset") or ()), info))

    def read(self, name: str, kind: Any) -> Any:
        """Return the item ``name``; a tensor is put together from its parts, which must make it exactly."""
        parts = {offset: self._load(name, info) for offset, info in self._stored.get(name, [])}
        if not hasattr(kind, "chunks"):
            if len(parts) != 1:
                raise self._damaged(name, f"is there {len(parts)} times")
            return parts[()]
        shape, dtype = tuple(kind.size), kind.properties.values[0]
        if parts.keys() != {tuple(chunk.offsets) for chunk in kind.chunks}:
            raise self._damaged(name, "lacks a part")
        for offset, part in parts.items():
            fits = len(offset) == len(shape) == part.dim()
            fits = fits and all(0 <= begin <= begin + n <= end for begin, n, end in zip(offset, part.shape, shape))
            if part.dtype != dtype or not fits:
                raise self._damaged(name, f"has a part {part.dtype}{list(part.shape)} at {list(offset)}")
        if sum(part.numel() for part in parts.values()) != self._torch.Size(shape).numel():
            raise self._damaged(name, f"has parts that do not make {list(shape)}")
        return next(iter(parts.values())) if len(parts) == 1 else self._joined(name, shape, dtype, parts)

    def _joined(self, name: str, shape: tuple[int, ...], dtype: Any, parts: dict[tuple[int, ...], Any]) -> Any:
        whole = self._torch.empty(shape, dtype=dtype)
        covered = self._torch.zeros(shape, dtype=self._torch.bool)
        for offset, part in parts.items():
            place = tuple(slice(begin, begin + n) for begin, n in zip(offset, part.shape))
            if covered[place].any():  # of parts that make the whole, no two overlap if and only if none is left out
                raise self._damaged(name, "has parts that overlap")
            whole[place], covered[place] = part, True
        return whole

    def _load(self, name: str, info: Any) -> Any:
        if vars(info).get("transform_descriptors"):
            raise self._damaged(name, f"was stored with {info.transform_descriptors}, which is not known here")
        path = member(self._source.path, info.relative_path)
        with open(path, "rb") as file:
            if not 0 <= info.offset <= info.offset + info.length <= os.fstat(file.fileno()).st_size:
                raise self._damaged(name, f"reaches beyond the end of {info.relative_path}")
            file.seek(info.offset)
            content = io.BytesIO(file.read(info.length))
        return load_item(content, f"{path} ({name})", self._source.trust)

    def _damaged(self, name: str, problem: str) -> FormatError:
        return FormatError(f"{self._source.path}: the item {name!r} {problem}; get a whole copy, then import again")


def _nested(flat: dict[str, Any], paths: Mapping[str, tuple[Any, ...]] | None) -> Any:
    """Undo the flattening of the planner; without its notes, a name that begins like a part of a checkpoint is one's.

    So it is where there is an optimizer: ``model.`` alone may be how the names of a model begin.
    """
    if paths is None:
        begin = {name: name.partition(".")[0] for name in flat}
        split = any(part in _OPTIMIZERS for part in begin.values())
        paths = {
            name: tuple(name.split(".", 1)) if split and part in _PARTS else (name,) for name, part in begin.items()
        }
    root: dict[Any, Any] = {}
    for name, value in flat.items():
        path = paths.get(name, (name,))
        place = root
        for step in path[:-1]:
            place = place.setdefault(step, {})
        place[path[-1]] = value
    made = _listed(root)
    return {key: _numbered(value) if str(key).startswith(_OPTIMIZERS) else value for key, value in made.items()}


def _listed(tree: Any) -> Any:
    """Return a tree with lists where a dict has integers for keys: DCP makes text of the keys of dicts."""
    if type(tree) is not dict:
        return tree
    made = {key: _listed(value) for key, value in tree.items()}
    if not made or not all(type(key) is int for key in made):
        return made
    if sorted(made) != [*range(len(made))]:
        raise FormatError(f"a list of a DCP checkpoint has only the items {sorted(made)[:10]}")
    return [made[index] for index in range(len(made))]


def _numbered(optimizer: Any) -> Any:
    """Return an optimizer's state with its parameters by number again, where its groups call them so."""
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("state"), dict):
        return optimizer
    groups = optimizer.get("param_groups", [])
    numbers = {str(number): number for group in groups for number in group["params"] if type(number) is int}
    return {**optimizer, "state": {numbers.get(key, key): value for key, value in optimizer["state"].items()}}
