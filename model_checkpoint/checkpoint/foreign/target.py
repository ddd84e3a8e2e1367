"""Where an export goes: written beside, then renamed, so that what is there is whole."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import uuid
from collections.abc import Callable

from model_checkpoint.checkpoint.directory import sync_folder
from model_checkpoint.errors import ConfigurationError, ModelCheckpointError, StorageError
from model_checkpoint.utils.folders import remove_folder
from model_checkpoint.utils.kernel import exchange

log = logging.getLogger(__name__)

_ENDINGS = {".safetensors": "safetensors", ".pt": "pt", ".pth": "pt", "": "huggingface"}
_EXPORTED = re.compile(r"config\.json|model\.safetensors(\.index\.json)?|model-\d{5}-of-\d{5}\.safetensors")


def format_of(path: str) -> str:
    """Return the format that the ending of a path says; a path without one is a Hugging Face folder.

    Raises:
        ConfigurationError: the ending says none.
    """
    ending = os.path.splitext(path)[1]
    if os.path.isdir(path):
        return "huggingface"
    if ending not in _ENDINGS:
        raise ConfigurationError(
            f"nothing is known to end with {ending!r}; end the path with .safetensors or .pt, or say format="
        )
    return _ENDINGS[ending]


def publish(target: str, is_folder: bool, overwrite: bool, write: Callable[[str], None]) -> None:
    """Let ``write`` make a file or folder beside ``target``, and give it that name when it is durable.

    A folder takes the place of another in one step where kernel and file system can exchange two (Linux). Elsewhere
    there are two: killed between them, neither has the name, and the old one is ``.<id>.old`` beside it.

    Raises:
        ConfigurationError: ``target`` exists and ``overwrite`` is False, or it is nothing that an export may replace.
        StorageError: the file system refused; what was there is there still.
    """
    try:
        _check(target, is_folder, overwrite)
        made = os.path.join(os.path.dirname(target), f".{uuid.uuid4()}.new")  # however long the name of the target is
        try:
            write(made)
            if is_folder:
                sync_folder(made)
            _check(target, is_folder, overwrite)  # it took a while
            old = _replace(made, target, is_folder)
        except BaseException as error:
            with contextlib.suppress(OSError):
                remove_folder(made) if os.path.isdir(made) else os.unlink(made)
            if isinstance(error, StorageError) and str(error.filename).startswith(made):
                raise error.__cause__ or error from None  # its advice is about saving
            raise
        sync_folder(os.path.dirname(target))
    except ModelCheckpointError:
        raise
    except OSError as error:
        raise StorageError("export a checkpoint", target, error, "the checkpoint itself is untouched") from error
    if old is not None:
        try:
            remove_folder(old)
        except OSError as error:
            log.warning("%s is exported, and the folder that it replaced is left at %s: %s", target, old, error)


def _replace(made: str, target: str, is_folder: bool) -> str | None:
    """Give what was made the name of the target; returns where the folder is that had it."""
    if not is_folder or not os.path.lexists(target):
        os.replace(made, target)
        return None
    if exchange(made, target):
        return made
    old = f"{made.removesuffix('.new')}.old"
    os.rename(target, old)
    try:
        os.rename(made, target)
    except BaseException:
        os.rename(old, target)
        raise
    return old


def _check(target: str, is_folder: bool, overwrite: bool) -> None:
    if not os.path.isdir(os.path.dirname(target)):
        cause = OSError(errno.ENOENT, "there is no such folder")
        raise StorageError("export a checkpoint", target, cause, "make the folder that it shall be in")
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise ConfigurationError(f"{target} exists; choose another path, or say overwrite=True")
    if is_folder != (os.path.isdir(target) and not os.path.islink(target)):
        raise ConfigurationError(f"{target} is {'no' if is_folder else 'a'} folder; remove it, or choose another path")
    others = [name for name in os.listdir(target) if not _EXPORTED.fullmatch(name)] if is_folder else []
    if others:
        raise ConfigurationError(f"{target} holds {others[0]!r}, which no export wrote; choose another folder")
