"""A Hugging Face folder: a model's tensors in one file or in shards with an index, and its ``config.json``.

Of a folder that the Trainer or Accelerate wrote, optimizer, scheduler and ``trainer_state.json`` come along.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from model_checkpoint.arrays import HostArray
from model_checkpoint.checkpoint.foreign.files import linked, member, read_json, read_whole
from model_checkpoint.checkpoint.foreign.parts import Foreign, Source
from model_checkpoint.checkpoint.foreign.pickles import load
from model_checkpoint.checkpoint.foreign.tensors import library, model_of
from model_checkpoint.checkpoint.storage import LinkedFile, PlannedFile
from model_checkpoint.checkpoint.storage.safetensors_backend import build_header, read_file, split, write_tensors
from model_checkpoint.errors import ConfigurationError, FormatError
from model_checkpoint.integrity.reading import map_file
from model_checkpoint.integrity.writing import write_bytes, write_file

_SHARD = 5 * 10**9  # bytes; what Hugging Face's own tools take
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_STATES = {  # of the Trainer, and of Accelerate
    "optimizer": ("optimizer.pt", "optimizer.bin"),
    "scheduler": ("scheduler.pt", "scheduler.bin"),
}
_MAY_HOLD_STATE = (".safetensors", ".bin", ".pt", ".pth", ".pkl")


def read(source: Source) -> Foreign:
    """Read the folder; with ``copy=False`` only the headers of its files."""
    folder = source.path
    config = read_json(member(folder, "config.json")) if _has(folder, "config.json") else None
    names, weight_map = _names(folder)
    paths = [member(folder, name) for name in names]
    pickled = names[0].endswith(".bin")
    if not source.copy and (pickled or _states(folder)):
        raise ConfigurationError(f"{folder} has files of torch.save, which must be converted; use copy=True")
    if pickled:
        return _with_states(source, names, Foreign(_unpickled(paths, folder, source.trust), config=config))
    files = [] if source.copy else _files(paths, names, weight_map)  # as they are before they are looked at
    sizes = [os.path.getsize(path) for path in paths]
    contents = [read_whole(path) if source.copy else map_file(path, size) for path, size in zip(paths, sizes)]
    model, _ = model_of(contents, folder)
    if weight_map is not None:
        _compare(folder, weight_map, dict(zip(names, contents)))
    return _with_states(source, names, Foreign(model, config=config, backend="safetensors", files=files))


def _has(folder: str, name: str) -> bool:
    return os.path.lexists(os.path.join(folder, name))


def _names(folder: str) -> tuple[list[str], dict[str, str] | None]:
    """Return the files that hold the model, and of shards what the index says: tensor -> file."""
    found = next(name for whole in _WHOLE for name in (whole, f"{whole}.index.json") if _has(folder, name))
    if found in _WHOLE:
        return [found], None
    content = read_json(member(folder, found))
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        raise FormatError(f"{folder}/{found} has no weight_map of tensors and files")
    names = sorted(set(weight_map.values()))
    if len({name.endswith(".bin") for name in names}) > 1:
        raise FormatError(f"{folder}/{found} names files of several formats: {names[:10]}")
    return names, weight_map


def _compare(folder: str, weight_map: dict[str, str], contents: dict[str, memoryview]) -> None:
    held = {key: name for name, content in contents.items() for key in read_file(content)[0]}
    wrong = sorted(key for key, _ in weight_map.items() ^ held.items())
    if wrong:
        raise FormatError(f"{folder}: the index and the files disagree about {', '.join(wrong[:5])}")


def _files(paths: list[str], names: list[str], weight_map: dict[str, str] | None) -> list[PlannedFile | LinkedFile]:
    """Return the files as our own backend names them, with an index of these names."""
    if weight_map is None:
        return [linked("model.safetensors", "model", paths[0])]
    ours = {name: f"model-{i:05}-of-{len(names):05}.safetensors" for i, name in enumerate(names, 1)}
    files: list[PlannedFile | LinkedFile] = [linked(ours[n], "model", path) for n, path in zip(names, paths)]
    text = json.dumps({"metadata": {}, "weight_map": {key: ours[name] for key, name in weight_map.items()}}).encode()
    index = PlannedFile("model.safetensors.index.json", "model", len(text), lambda sink: sink.write(text))
    return [*files, index]


def _unpickled(paths: list[str], folder: str, trust: bool) -> dict[str, object]:
    model: dict[str, object] = {}
    for path in paths:
        part = load(path, trust)
        if not isinstance(part, dict) or part.keys() & model.keys():
            raise FormatError(f"{path} is no part of a model's state, or holds what another part of {folder} holds")
        model |= part
    return model


def _states(folder: str) -> dict[str, str]:
    """Return the files of the parts besides the model: ``optimizer`` or ``scheduler`` -> name."""
    return {part: name for part, names in _STATES.items() for name in names if _has(folder, name)}


def _with_states(source: Source, names: list[str], found: Foreign) -> Foreign:
    """Add what else a trainer put into the folder, and note what is left there."""
    files = _states(source.path)
    states = {part: load(member(source.path, name), source.trust) for part, name in files.items()}
    unread = {name for name in os.listdir(source.path) if name.endswith(_MAY_HOLD_STATE)} - {*names, *files.values()}
    found = found._replace(**states, left_out=tuple(sorted(unread)))
    if not _has(source.path, "trainer_state.json"):
        return found
    told = read_json(member(source.path, "trainer_state.json"))
    epoch, step = (told.get("epoch"), told.get("global_step")) if isinstance(told, dict) else (None, None)
    return found._replace(
        extra={"trainer_state": told},
        epoch=int(epoch) if isinstance(epoch, (int, float)) and abs(epoch) < 2**63 else 0,
        step=step if isinstance(step, int) and abs(step) < 2**63 else 0,
    )


def write(target: str, tensors: Mapping[str, HostArray], ties: Mapping[str, str], state: Mapping[str, Any]) -> None:
    """Write a folder that ``from_pretrained`` reads, durable but for the folders.

    Args:
        target: a new folder.
        tensors: name -> array.
        ties: name of a further tensor -> name of the one in ``tensors`` that it is.
        state: its ``config`` becomes ``config.json`` where it is a dict.
    """
    os.mkdir(target)
    size = sum(array.data.nbytes for array in tensors.values())
    shards = [dict(tensors)] if size <= _SHARD else split(dict(tensors), size, _SHARD)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        weight_map = {key: name for name, shard in zip(names, shards) for key in shard}
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_bytes(os.path.join(target, "model.safetensors.index.json"), json.dumps(index, indent=2).encode())
    for name, shard in zip(names, shards):
        held = {other: kept for other, kept in ties.items() if kept in shard}
        header, ordered, length = build_header(shard, {**held, "format": library(tensors)})
        write_file(os.path.join(target, name), partial(write_tensors, header, ordered), hashed=False, size=length)
    if isinstance(state["config"], dict):
        write_bytes(os.path.join(target, "config.json"), json.dumps(state["config"], indent=2).encode())
