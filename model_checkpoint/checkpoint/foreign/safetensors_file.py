"""One SafeTensors file: the tensors of a model by name, and what they are tied to in the metadata."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from model_checkpoint.arrays import HostArray
from model_checkpoint.checkpoint.foreign.files import linked, read_whole
from model_checkpoint.checkpoint.foreign.parts import Foreign, Source
from model_checkpoint.checkpoint.foreign.tensors import library, model_of
from model_checkpoint.checkpoint.storage.safetensors_backend import build_header, write_tensors
from model_checkpoint.integrity.reading import map_file
from model_checkpoint.integrity.writing import write_file


def read(source: Source) -> Foreign:
    """Read the file; with ``copy=False`` only its header."""
    file = linked("model.safetensors", "model", source.path)
    content = read_whole(source.path) if source.copy else map_file(source.path, file.size)
    model, metadata = model_of([content], source.path)
    return Foreign(model, config=metadata or None, backend="safetensors", files=[file])


def write(target: str, tensors: Mapping[str, HostArray], ties: Mapping[str, str], state: Mapping[str, Any]) -> None:
    """Write the model's tensors, durable but for the folder.

    Args:
        target: a new file.
        tensors: name -> array.
        ties: name of a further tensor -> name of the one in ``tensors`` that it is.
        state: not looked at; there is no place for it.
    """
    header, ordered, size = build_header(tensors, {**ties, "format": library(tensors)})
    write_file(target, partial(write_tensors, header, ordered), hashed=False, size=size)
