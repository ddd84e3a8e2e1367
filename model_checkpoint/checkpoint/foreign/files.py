"""Files of a foreign checkpoint: opened without waiting, looked for in their own folder only, told apart by content."""

from __future__ import annotations

import json
import os
import stat
from io import BufferedReader
from typing import Any

from model_checkpoint.checkpoint.storage import LinkedFile
from model_checkpoint.errors import ConfigurationError, FormatError, StorageError
from model_checkpoint.integrity.reading import open_to_read
from model_checkpoint.integrity.writing import identity_of
from model_checkpoint.utils.kernel import fresh_memory

_ZIP = b"PK\x03\x04"
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # torch.save before 1.6: a pickle of its magic number
_RATIO, _FLOOR = 1000, 1 << 30  # so much larger than its files may an array be; less than 1 GiB may be anything
_MAX_JSON = 256 << 20  # bytes; an index of a million tensors has 100 MB


def is_torch_file(start: bytes) -> bool:
    """Whether a file that begins so was written by ``torch.save``."""
    return start.startswith((_ZIP, _LEGACY))


def is_archive(start: bytes) -> bool:
    """Whether a file that begins so is of the form that ``torch.save`` has had since 1.6."""
    return start.startswith(_ZIP)


def open_file(path: str) -> BufferedReader:
    """Open a file whose path has no links, to be closed by the caller.

    Raises:
        ConfigurationError: there is none, or it is no file.
        StorageError: the file system refuses.
    """
    try:
        file = open(path, "rb", opener=open_to_read)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigurationError(f"{path} is not there; give the path of a checkpoint's file or folder") from error
    except OSError as error:
        raise StorageError("open a file to import", path, error, "check its permissions") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ConfigurationError(f"{path} is neither a file nor a folder")
    return file


def read_whole(path: str) -> memoryview:
    """Return a file's content in memory that the caller owns; raises what ``open_file`` does, and StorageError."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = fresh_memory(size)
        try:
            count = file.readinto(content)
        except OSError as error:
            raise StorageError("read a file to import", path, error, "check the disk and try again") from error
        if count != size:
            raise FormatError(f"{path} shrank while it was read; import it again when it is whole")
    return content


def can_be_path(name: str) -> bool:
    """Whether a file system could have it: nothing has NUL or half a surrogate pair in its name."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def member(folder: str, name: object) -> str:
    """Return the path, without links, of the file ``name`` of a folder.

    The files of Hugging Face's cache are links to ``blobs`` beside ``snapshots``; no other link may lead elsewhere.

    Raises:
        FormatError: there is no such file, or it is not in the folder.
    """
    if not isinstance(name, str) or not can_be_path(name):
        raise FormatError(f"{folder} names a file {name!r}, which cannot be one")
    path = os.path.realpath(os.path.join(folder, name))
    homes = [folder]
    if os.path.basename(os.path.dirname(folder)) == "snapshots":
        homes.append(os.path.join(os.path.dirname(os.path.dirname(folder)), "blobs"))
    if os.path.dirname(path) not in homes:
        raise FormatError(f"{folder} names a file {name!r} that lies elsewhere; only files of the folder are read")
    if not os.path.isfile(path):
        raise FormatError(f"{folder} has no file {name!r}, which belongs to the checkpoint; get it, then import again")
    return path


def refuse_links(folder: str) -> None:
    """Raise FormatError if ``folder`` has anything but files and folders, for packages that follow what is there."""
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            mode = os.lstat(path).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise FormatError(f"{path} is a link, a pipe or the like; only files of the checkpoint are read")


def check_told(name: str, told: int, stored: int) -> None:
    """Raise FormatError if arrays are said to have many more bytes than the files that they are in."""
    if told > max(_FLOOR, stored * _RATIO):
        raise FormatError(f"{name} has {stored:,} bytes, and says that its arrays have {told:,}")


def read_json(path: str) -> Any:
    """Return the content of a JSON file.

    Raises:
        FormatError: it is none.
        StorageError: it cannot be read.
    """
    if os.path.getsize(path) > _MAX_JSON:
        raise FormatError(f"{path} has more than {_MAX_JSON:,} bytes")
    try:
        return json.loads(bytes(read_whole(path)))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is no JSON: {error}") from None


def linked(name: str, component: str | None, path: str) -> LinkedFile:
    """Return the file at ``path`` as one of a checkpoint, as it is now."""
    with open_file(path) as file:
        identity = identity_of(os.fstat(file.fileno()))
    return LinkedFile(name, component, identity[2], path, identity)
