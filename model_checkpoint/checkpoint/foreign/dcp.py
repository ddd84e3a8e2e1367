"""PyTorch's distributed checkpoints (DCP): ``.metadata``, a pickle of plain records, and ``*.distcp`` with the tensors.

Only the records that torch itself puts there are unpickled, and every item is loaded with ``weights_only=True``.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Mapping
from typing import Any

from model_checkpoint.checkpoint.foreign import take_apart
from model_checkpoint.checkpoint.foreign.files import member, read_whole
from model_checkpoint.checkpoint.foreign.parts import Foreign, Source
from model_checkpoint.checkpoint.storage.pytorch_backend import check_archive
from model_checkpoint.errors import ConfigurationError, FormatError, MissingDependencyError, ModelCheckpointError
from model_checkpoint.utils.optional import require

_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((_METADATA, name) for name in ("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")),
    *((_METADATA, name) for name in ("TensorProperties",)),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
}
_PREFIXES = ("model.", "optimizer.", "optim.", "lr_scheduler.", "scheduler.")


def read(source: Source) -> Foreign:
    """Read all ranks' parts of the checkpoint into whole tensors."""
    if not source.copy:
        raise ConfigurationError(f"{source.path} is a DCP checkpoint, which must be converted; use copy=True")
    torch = require("torch", "torch", "importing a DCP checkpoint")
    try:
        metadata = _Unpickler(bytes(read_whole(member(source.path, ".metadata")))).load()
        items = _Items(torch, source.path, metadata.storage_data)
        flat = {name: items.read(name, kind) for name, kind in metadata.state_dict_metadata.items()}
        return take_apart(_nested(flat, metadata.planner_data))
    except (FormatError, ConfigurationError, MissingDependencyError):
        raise
    except (ModelCheckpointError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - records of any form raise whatever they like
        raise FormatError(f"{source.path} is a damaged DCP checkpoint: {error!r:.1000}") from None


class _Unpickler(pickle.Unpickler):
    """Makes the records of DCP's metadata, and nothing else."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))

    def find_class(self, module: str, name: str) -> Any:
        import torch

        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise FormatError(f"the metadata of a DCP checkpoint asks for {module}.{name}, which has no place there")


class _Items:
    """Reads items; every file is opened once for each of them."""

    def __init__(self, torch: Any, folder: str, storage: Mapping[Any, Any]) -> None:
        self._torch = torch
        self._folder = folder
        self._stored: dict[str, list[Any]] = {}
        for index, info in storage.items():
            self._stored.setdefault(index.fqn, []).append((index.offset, info))

    def read(self, name: str, kind: Any) -> Any:
        """Return the item ``name``; a tensor is put together from its chunks, which must cover it exactly."""
        stored = self._stored.get(name, [])
        if not hasattr(kind, "chunks"):
            if len(stored) != 1:
                raise FormatError(f"{self._folder} holds {name!r} {len(stored)} times")
            return self._load(name, stored[0][1])
        offsets = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in kind.chunks}
        parts = {tuple(offset if offset is not None else ()): self._load(name, info) for offset, info in stored}
        shape, dtype = tuple(kind.size), kind.properties.dtype
        if parts.keys() != offsets.keys():
            raise FormatError(f"{self._folder} lacks a part of the tensor {name!r}")
        for offset, part in parts.items():
            fits = len(offset) == len(shape) and all(
                o >= 0 and o + n <= s for o, n, s in zip(offset, part.shape, shape)
            )
            if tuple(part.shape) != offsets[offset] or part.dtype != dtype or not fits:
                raise FormatError(f"{self._folder}: a part of {name!r} is {part.dtype}{list(part.shape)} at {offset}")
        if sum(part.numel() for part in parts.values()) != self._torch.Size(shape).numel():
            raise FormatError(f"{self._folder}: the parts of {name!r} do not make {list(shape)}")
        if len(parts) == 1:
            return next(iter(parts.values()))
        whole = self._torch.zeros(shape, dtype=dtype)
        covered = self._torch.zeros(shape, dtype=self._torch.bool)
        for offset, part in parts.items():
            place = tuple(slice(o, o + n) for o, n in zip(offset, part.shape))
            if covered[place].any():
                raise FormatError(f"{self._folder}: parts of {name!r} overlap")
            whole[place], covered[place] = part, True
        return whole

    def _load(self, name: str, info: Any) -> Any:
        if info.transform_descriptors:
            raise FormatError(f"{name!r} was stored with {info.transform_descriptors}; save it again without")
        path = member(self._folder, info.relative_path)
        with open(path, "rb") as file:
            if not 0 <= info.offset <= info.offset + info.length <= os.fstat(file.fileno()).st_size:
                raise FormatError(f"{path} is shorter than the metadata say; get the whole file, then import again")
            file.seek(info.offset)
            content = io.BytesIO(file.read(info.length))
        check_archive(content, info.length)
        return self._torch.load(content, map_location="cpu", weights_only=True)


def _nested(flat: dict[str, Any], paths: Mapping[str, tuple[Any, ...]] | None) -> Any:
    """Undo the flattening of the planner; without its notes, what is named like a part of a checkpoint is one."""
    if paths is None:
        paths = {name: (name,) for name in flat}
        if any(name.startswith(_PREFIXES[1:3]) for name in flat):
            paths = {name: (*name.partition(".")[::2],) if name.startswith(_PREFIXES) else (name,) for name in flat}
    root: dict[Any, Any] = {}
    for name, value in flat.items():
        path = paths.get(name, (name,))
        place = root
        for step in path[:-1]:
            place = place.setdefault(step, {})
        place[path[-1]] = value
    made = _listed(root)
    for name in ("optimizer", "optim"):
        if isinstance(made.get(name), dict):
            made[name] = _numbered(made[name])
    return made


def _listed(tree: Any) -> Any:
    """Return a tree with lists where dicts have the keys 0, 1, 2 ... as integers, as only lists have them."""
    if type(tree) is not dict:
        return tree
    made = {key: _listed(value) for key, value in tree.items()}
    if made and all(type(key) is int for key in made):
        if sorted(made) != [*range(len(made))]:
            raise FormatError(f"a list of a DCP checkpoint has the items {sorted(made)[:10]}")
        return [made[index] for index in range(len(made))]
    return made


def _numbered(optimizer: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state with parameters by number, where its groups name them so: DCP makes text of keys."""
    state, groups = optimizer.get("state"), optimizer.get("param_groups")
    if not isinstance(state, dict) or not isinstance(groups, list):
        return optimizer
    numbers = {number for group in groups for number in group.get("params", ()) if type(number) is int}
    return {**optimizer, "state": {int(k) if k.isdecimal() and int(k) in numbers else k: v for k, v in state.items()}}
