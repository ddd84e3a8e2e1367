"""The manifest, ``checkpoint.json``: everything needed to find, verify and load a checkpoint without the database."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from model_checkpoint.errors import FormatVersionError, IntegrityError

FILE_NAME = "checkpoint.json"
FORMAT_VERSION = 1
_DIGEST = "manifest_sha256"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")  # no separators, no leading dot: never another folder


class FileEntry(NamedTuple):
    """One file of a checkpoint as it lies on disk.

    Attributes:
        name: its name in the checkpoint's folder.
        component: the part of the state that it holds, or None when it holds several.
        size: its length in bytes.
        sha256: its digest in hex, what ``sha256sum`` prints; None when it was saved without.
        compression: ``zlib``, ``zstd`` or None.
        raw_size: its length in bytes before compression; None when it is not compressed.
    """

    name: str
    component: str | None
    size: int
    sha256: str | None
    compression: str | None = None
    raw_size: int | None = None


class Manifest(NamedTuple):
    """What ``checkpoint.json`` says.

    Attributes:
        checkpoint_id, created_at, backend: the checkpoint's id, its time (Unix seconds) and its storage backend.
        intent: its number among the saves of this directory, in the order in which they began.
        experiment: id, name, project and the like of the experiment that it belongs to.
        values: epoch, step, type and what else the user gave, as strict JSON.
        files: every file but the manifest.
    """

    checkpoint_id: str
    created_at: float
    backend: str
    intent: int
    experiment: Mapping[str, Any]
    values: Mapping[str, Any]
    files: tuple[FileEntry, ...]

    @property
    def size(self) -> int:
        """Bytes of all files, the manifest not counted."""
        return sum(file.size for file in self.files)

    def to_bytes(self) -> tuple[bytes, str]:
        """Return the file's bytes, and the digest that they carry of themselves."""
        content = {
            **self._asdict(),
            "format_version": FORMAT_VERSION,
            "files": list(map(FileEntry._asdict, self.files)),
        }
        return _seal(content)


def _seal(content: dict[str, Any]) -> tuple[bytes, str]:
    bare = json.dumps(content, indent=1, sort_keys=True, allow_nan=False).encode()
    digest = hashlib.sha256(bare).hexdigest()
    sealed = json.dumps({**content, _DIGEST: digest}, indent=1, sort_keys=True, allow_nan=False).encode()
    return sealed, digest


def parse_manifest(data: bytes, path: str) -> tuple[Manifest, str]:
    """Read a manifest strictly: every byte must be the one that was written.

    Args:
        data: the file's content.
        path: where it came from, for errors.

    Returns:
        The manifest and its digest.

    Raises:
        IntegrityError: it is no manifest, or was changed after it was written.
        FormatVersionError: a newer version of this package wrote it.
    """
    try:
        content = json.loads(data)
        digest = content.pop(_DIGEST)
        sealed, found = _seal(content)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(path, f"it is not a manifest ({error})") from error
    version = content.pop("format_version", 0)
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise FormatVersionError(path, version, FORMAT_VERSION)
    if digest != found or sealed != data:
        raise IntegrityError(path, "the manifest was changed after it was saved", digest, found)
    try:
        files = tuple(FileEntry(**entry) for entry in content.pop("files"))
        manifest = Manifest(**content, files=files)
    except TypeError as error:
        raise IntegrityError(path, f"the manifest lacks or adds a field ({error})") from error
    for file in files:
        if not _NAME.fullmatch(file.name) or file.name == FILE_NAME:
            raise IntegrityError(path, f"the manifest names a file {file.name!r}, which no checkpoint has")
    return manifest, digest
