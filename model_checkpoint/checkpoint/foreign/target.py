"""Where an export goes: written beside, then renamed, so that what is there is whole."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import uuid
from collections.abc import Callable

from model_checkpoint.errors import ConfigurationError, StorageError
from model_checkpoint.utils.folders import remove_folder

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

    Raises:
        ConfigurationError: ``target`` exists and ``overwrite`` is False, or it is nothing that an export may replace.
        StorageError: the file system refused; what was there is there still.
    """
    _check(target, is_folder, overwrite)
    folder, name = os.path.split(target)
    mark = uuid.uuid4()
    made, old = (os.path.join(folder, f".{name}.{mark}.{part}") for part in ("new", "old"))
    try:
        write(made)
        if is_folder:
            _sync(made)
        _check(target, is_folder, overwrite)  # it took a while
        if is_folder and os.path.lexists(target):
            os.rename(target, old)
            try:
                os.rename(made, target)
            except BaseException:
                os.rename(old, target)
                raise
            remove_folder(old)
        else:
            os.replace(made, target)
        _sync(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            remove_folder(made) if os.path.isdir(made) else os.unlink(made)
        if isinstance(error, OSError) and not isinstance(error, StorageError):
            raise StorageError("export a checkpoint", target, error, "the checkpoint itself is untouched") from error
        raise


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


def _sync(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
