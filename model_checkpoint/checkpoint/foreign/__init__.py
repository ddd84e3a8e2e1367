"""Checkpoints of other tools: what a path holds is decided by its content, and read by one module for each format."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

from model_checkpoint.checkpoint.foreign.files import is_torch_file, open_file
from model_checkpoint.checkpoint.foreign.parts import Foreign, Source, sort_parts
from model_checkpoint.errors import ConfigurationError, FormatError, ModelCheckpointError, StorageError
from model_checkpoint.integrity.manifest import FILE_NAME

__all__ = ["WRITERS", "Foreign", "Source", "read", "take_apart", "writer"]

_READERS = {
    "torch": "model_checkpoint.checkpoint.foreign.torch_file:read",
    "safetensors": "model_checkpoint.checkpoint.foreign.safetensors_file:read",
    "huggingface": "model_checkpoint.checkpoint.foreign.huggingface:read",
    "orbax": "model_checkpoint.checkpoint.foreign.orbax:read",
    "dcp": "model_checkpoint.checkpoint.foreign.dcp:read",
}
WRITERS = {
    "safetensors": "model_checkpoint.checkpoint.foreign.safetensors_file:write",
    "huggingface": "model_checkpoint.checkpoint.foreign.huggingface:write",
    "pt": "model_checkpoint.checkpoint.foreign.torch_file:write",
}
_TAKERS = {"pytorch-lightning_version": "model_checkpoint.checkpoint.foreign.lightning:take_apart"}

# The first of these names that a folder has says what it is; orbax comes last, as its names differ with its versions.
_MARKS = {
    ".metadata": "dcp",
    "model.safetensors": "huggingface",
    "model.safetensors.index.json": "huggingface",
    "pytorch_model.bin": "huggingface",
    "pytorch_model.bin.index.json": "huggingface",
    "_METADATA": "orbax",
    "_CHECKPOINT_METADATA": "orbax",
    "manifest.ocdbt": "orbax",
    "default": "orbax",
    "state": "orbax",
}


def read(source: Source) -> Foreign:
    """Read a checkpoint of another tool; nothing there is changed.

    Raises:
        ConfigurationError: nothing is there, it is of no known format, or it needs ``trust``.
        FormatError: it is damaged, or breaks the rules of its format.
        MissingDependencyError: its format needs a package.
        StorageError: it cannot be read.
    """
    try:
        function: Callable[[Source], Foreign] = _load(_READERS[_format_of(source.path)])
        return function(source)
    except ModelCheckpointError:
        raise
    except OSError as error:
        raise StorageError("read a checkpoint to import", source.path, error, "check its permissions") from error


def writer(format: str) -> Callable[..., None]:
    """Return the function that writes a checkpoint as ``format``, one of ``WRITERS``."""
    return _load(WRITERS[format])  # type: ignore[no-any-return]


def take_apart(content: object) -> Foreign:
    """Return the parts of what ``torch.load`` returned."""
    if isinstance(content, dict):
        for mark, target in _TAKERS.items():
            if mark in content:
                return _load(target)(content)  # type: ignore[no-any-return]
    return sort_parts(content)


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def _format_of(path: str) -> str:
    if os.path.isdir(path):
        if os.path.lexists(os.path.join(path, FILE_NAME)):
            raise ConfigurationError(
                f"{path} is a checkpoint of this engine; open the directory that it lies in as checkpoint_dir, of "
                "which a copy is as good, or export it there"
            )
        found = next((format for mark, format in _MARKS.items() if os.path.lexists(os.path.join(path, mark))), None)
        if found is None and not os.access(path, os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if found is None:
            raise ConfigurationError(
                f"{path} is no folder of Hugging Face, Orbax or PyTorch DCP: none of {', '.join(_MARKS)} is there"
            )
        return found
    with open_file(path) as file:
        start = file.read(16)
        if is_torch_file(start):
            return "torch"
    if start[8:9] == b"{":
        return "safetensors"
    raise FormatError(f"{path} is neither a file of torch.save nor SafeTensors: it begins with {start!r}")
