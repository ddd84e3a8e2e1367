"""Folders of the engine's own, and what may stand in their place."""

from __future__ import annotations

import errno
import os
import shutil

from model_checkpoint.errors import StorageError
from model_checkpoint.utils.names import is_id


def refuse_links(*folders: str) -> None:
    """Raise StorageError if a link stands in the place of a folder of ours: what lies behind it is not ours."""
    for folder in folders:
        if os.path.islink(folder):
            cause = OSError(errno.ELOOP, "a link stands in its place")
            raise StorageError(
                "use a folder of the checkpoint directory", folder, cause, "move the folder itself there"
            )


def make_again(*folders: str) -> None:
    """Make folders of ours that are missing: somebody may have removed them to gain space.

    Raises:
        StorageError: one cannot be made.
    """
    for folder in folders:
        if not os.path.isdir(folder):
            try:
                os.mkdir(folder)
            except OSError as error:
                advice = "move away what stands in its place, and check permissions"
                raise StorageError("make a folder of the checkpoint directory", folder, error, advice) from error


def remove_folder(path: str) -> None:
    """Remove a folder that holds files; raises OSError for what cannot be removed.

    ``shutil.rmtree`` closes a descriptor twice when a Ctrl-C comes just after the first time, be it another thread's by
    then. It is left to folders within, which are not ours.
    """
    if os.path.islink(path):
        os.unlink(path)
        return
    with os.scandir(path) as entries:
        found = list(entries)
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)
    os.rmdir(path)


def id_folders(path: str) -> list[str]:
    """Return the names of the real folders in ``path`` that are ids; links and everything else are not ours."""
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if is_id(entry.name) and entry.is_dir(follow_symlinks=False))
