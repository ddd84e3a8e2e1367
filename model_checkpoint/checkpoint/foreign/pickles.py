"""Loading what ``torch.save`` wrote, without running code of it unless that is asked for by name."""

from __future__ import annotations

import os
import pickle
import re
from typing import Any, BinaryIO

from model_checkpoint.checkpoint.foreign.files import check_told, is_archive, open_file
from model_checkpoint.checkpoint.storage.pytorch_backend import check_archive, reason_of
from model_checkpoint.errors import ConfigurationError, FormatError
from model_checkpoint.utils.optional import require

_ASKED = re.compile(r"(?:GLOBAL|class|function|global:?) ['`]?([A-Za-z_][\w.]*\.\w+)")
_VALUES, _REPEATS = 1 << 20, 10  # so many values may anything have, and so often in all may what is there be within it


def load(path: str, trust: bool, mapped: bool = False) -> Any:
    """Return what a file of ``torch.save`` holds, in host memory.

    Args:
        path: the file.
        trust: unpickle anything, which runs the code that the file asks for.
        mapped: leave the tensors in the file.

    Raises:
        ConfigurationError: it needs ``trust``; the text names what it asks for. Or it is not there.
        FormatError: it is damaged, or tells of far more than it has.
        MissingDependencyError: torch is not installed.
    """
    with open_file(path) as file:
        return load_item(file, path, trust, path if mapped else None)


def load_item(file: BinaryIO, name: str, trust: bool, mapped: str | None = None) -> Any:
    """Do what ``load`` does, with an open file that messages call ``name``; with ``mapped``, the file of that path."""
    torch = require("torch", "torch", "importing a file of torch.save")
    try:
        start, size = file.read(4), file.seek(0, os.SEEK_END)
        if is_archive(start):
            check_archive(file, size)
        file.seek(0)
        content = torch.load(mapped or file, map_location="cpu", weights_only=not trust, mmap=mapped is not None)
    except FormatError as error:
        raise FormatError(f"{name} is damaged: {error}") from None
    except Exception as error:  # noqa: BLE001 - torch and what it calls raise whatever they like
        asked = [] if trust else _asked_for(torch, file, error)
        if asked:
            raise ConfigurationError(
                f"{name} cannot be loaded without running code: it asks for {', '.join(asked)}. If you trust whoever "
                "made it, import it with trust=True and copy=True, which unpickles it fully"
            ) from None
        raise FormatError(f"{name} does not load: {reason_of(error)}") from None
    _check_sizes(torch, content, name, size)
    return content


def _check_sizes(torch: Any, content: object, name: str, stored: int) -> None:
    """Refuse what a few bytes tell of and memory does not hold: one element as a large tensor, lists within lists."""
    tensors: dict[int, int] = {}
    lengths: dict[int, int] = {}
    count, left = 0, [content]
    while left:
        value = left.pop()
        if isinstance(value, (dict, list, tuple, set, frozenset)):
            lengths[id(value)] = len(value)
            count += len(value)
            if count > _VALUES and count > _REPEATS * sum(lengths.values()):
                raise FormatError(f"{name} holds lists or dicts that hold themselves, or each other again and again")
            left.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, torch.Tensor) and value.layout == torch.strided:
            tensors[id(value)] = value.numel() * value.element_size()
    check_told(name, sum(tensors.values()), stored)


def _asked_for(torch: Any, file: BinaryIO, error: Exception) -> list[str]:
    """Return the names of what a pickle wants that ``weights_only=True`` refuses."""
    if not isinstance(error, pickle.UnpicklingError):
        return []
    try:
        file.seek(0)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # noqa: BLE001 - of files of the old form, or damaged ones
        names = []
    return sorted(names) or sorted(set(_ASKED.findall(str(error))))
