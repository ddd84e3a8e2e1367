"""Loading what ``torch.save`` wrote, without running code of it unless that is asked for by name."""

from __future__ import annotations

import os
import pickle
import re
from typing import Any

from model_checkpoint.checkpoint.foreign.files import is_archive, open_file
from model_checkpoint.checkpoint.storage.pytorch_backend import check_archive
from model_checkpoint.errors import ConfigurationError, FormatError, ModelCheckpointError
from model_checkpoint.utils.optional import require

_ASKED = re.compile(r"(?:GLOBAL|class|function|global:?) ['`]?([A-Za-z_][\w.]*\.\w+)")
_SHOWN = 1000  # characters of torch's message


def load(path: str, trust: bool, mapped: bool = False) -> Any:
    """Return what a file of ``torch.save`` holds, in host memory.

    Args:
        path: the file.
        trust: unpickle anything, which runs the code that the file asks for.
        mapped: leave the tensors in the file.

    Raises:
        ConfigurationError: it needs ``trust``; the text names what it asks for.
        FormatError: it is damaged.
        MissingDependencyError: torch is not installed.
    """
    torch = require("torch", "torch", "importing a file of torch.save")
    try:
        with open_file(path) as file:
            if is_archive(file.read(4)):
                check_archive(file, os.fstat(file.fileno()).st_size)
            file.seek(0)
            what = path if mapped else file
            return torch.load(what, map_location="cpu", weights_only=not trust, mmap=mapped)
    except FormatError as error:
        raise FormatError(f"{path} is damaged: {error}") from None
    except ModelCheckpointError:
        raise
    except Exception as error:  # noqa: BLE001 - torch and what it calls raise whatever they like
        asked = [] if trust else _asked_for(torch, path, error)
        if asked:
            raise ConfigurationError(
                f"{path} cannot be loaded without running code: it asks for {', '.join(asked)}. If you trust whoever "
                "made it, import it with trust=True and copy=True, which unpickles it fully"
            ) from None
        raise FormatError(f"{path} does not load: {str(error)[:_SHOWN]}") from None


def _asked_for(torch: Any, path: str, error: Exception) -> list[str]:
    """Return the names of what a pickle wants that ``weights_only=True`` refuses."""
    if not isinstance(error, pickle.UnpicklingError):
        return []
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # noqa: BLE001 - of files of the old form, or damaged ones
        names = []
    return sorted(names) or sorted(set(_ASKED.findall(str(error))))
