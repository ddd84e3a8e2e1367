"""Files of ``torch.save``: a bare state_dict, a dict of parts as people make them, or a ``.ckpt`` of Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model_checkpoint.arrays import HostArray
from model_checkpoint.checkpoint.foreign import take_apart
from model_checkpoint.checkpoint.foreign.files import is_archive, linked, open_file
from model_checkpoint.checkpoint.foreign.parts import Foreign, Source
from model_checkpoint.checkpoint.foreign.pickles import load
from model_checkpoint.checkpoint.state import encode
from model_checkpoint.checkpoint.storage.pytorch_backend import FOREIGN_NAME, content_of, save_content
from model_checkpoint.errors import ConfigurationError
from model_checkpoint.integrity.writing import write_file


def read(source: Source) -> Foreign:
    """Load the file and take it apart."""
    with open_file(source.path) as file:
        archive = is_archive(file.read(4))
    if not source.copy and not archive:
        raise ConfigurationError(f"{source.path} has the form that torch.save had before 1.6; use copy=True")
    file_ = linked(FOREIGN_NAME, None, source.path)
    content = load(source.path, source.trust and source.copy, mapped=not source.copy)
    return take_apart(content)._replace(backend="pytorch", files=[file_])


def write(target: str, tensors: Mapping[str, HostArray], ties: Mapping[str, str], state: Mapping[str, Any]) -> None:
    """Write a file that ``torch.load(weights_only=True)`` reads, durable but for the folder.

    Args:
        target: a new file.
        tensors, ties: not looked at; torch keeps the model's own nesting and ties.
        state: ``components`` and whatever else ``load_checkpoint`` returned.
    """
    content = content_of(encode(state["components"]))
    content["extra_state"] = content.pop("extra_state_dict", None)
    for part in ("optimizer", "scheduler"):
        content.setdefault(f"{part}_state_dict", None)
    content |= {name: state[name] for name in ("epoch", "step", "loss", "val_loss", "metrics", "config")}
    write_file(target, lambda sink: save_content(content, sink), hashed=False)
