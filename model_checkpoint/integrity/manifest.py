"""The manifest, ``checkpoint.json``: everything needed to find, verify and load a checkpoint without the database."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from model_checkpoint.errors import FormatVersionError, IntegrityError
from model_checkpoint.utils.jsonable import MAX_DEPTH, is_deep
from model_checkpoint.utils.names import MAX_SEQUENCE, is_id

FILE_NAME = "checkpoint.json"
FORMAT_VERSION = 1
_DIGEST = "manifest_sha256"
_STATE = re.compile(r"[0-9a-f]{64}")
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
        chunk_size: bytes from one of ``states`` to the next, a multiple of 64; None when there are none.
        states: of SHA-256 after each chunk but the last, 64 hex digits each (see ``integrity.sha256``), so that a part
            of the file can be verified alone.
    """

    name: str
    component: str | None
    size: int
    sha256: str | None
    compression: str | None = None
    raw_size: int | None = None
    chunk_size: int | None = None
    states: tuple[str, ...] = ()


class Manifest(NamedTuple):
    """What ``checkpoint.json`` says.

    Attributes:
        checkpoint_id, created_at, backend: the checkpoint's id, its time (Unix seconds) and its storage backend.
        sequence: its place among the saves of the database, in the order in which they began.
        experiment: id, name, project and the like of the experiment that it belongs to.
        values: epoch, step, type and what else the user gave, as strict JSON.
        files: every file but the manifest.
    """

    checkpoint_id: str
    created_at: float
    backend: str
    sequence: int
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


_encode = json.JSONEncoder(allow_nan=False).encode  # with an indent, json works in Python: 0.4 ms more a small save


def _seal(content: dict[str, Any]) -> tuple[bytes, str]:
    """Return the file, a line for each field and each file, and the digest of it without the digest's own line."""
    fields = dict(content)
    files = ",\n  ".join(map(_encode, fields.pop("files")))
    lines = map(": ".join, zip(map(_encode, fields), map(_encode, fields.values())))
    bare = "{\n " + ",\n ".join(lines) + f',\n "files": [\n  {files}\n ]'
    digest = hashlib.sha256(f"{bare}\n}}".encode()).hexdigest()
    return f'{bare},\n "{_DIGEST}": "{digest}"\n}}'.encode(), digest


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
        version = content.get("format_version")
        if type(version) is int and version > FORMAT_VERSION:  # first: it may look like nothing that we know
            raise FormatVersionError(path, version, FORMAT_VERSION)
        digest = content.pop(_DIGEST)
        sealed, found = _seal(content)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(path, f"it is not a manifest ({error})") from error
    if type(version) is not int or content.pop("format_version") < 1:
        raise IntegrityError(path, f"the manifest has no format version ({version!r})")
    if digest != found or sealed != data:
        raise IntegrityError(path, "the manifest was changed after it was saved", digest, found)
    problem = _problem(content)
    if problem is not None:
        raise IntegrityError(path, f"the manifest is not of the form that this package writes ({problem})")
    files = tuple(FileEntry(**{**entry, "states": tuple(entry["states"])}) for entry in content.pop("files"))
    return Manifest(**content, files=files), digest


_INT, _STR, _BOOL = (int,), (str,), (bool,)
_NUMBER = (int, float)
_SCORE = (int, float, str, type(None))
_OPTIONAL_STR, _OPTIONAL_INT = (str, type(None)), (int, type(None))
_ANY = (object,)
_MANIFEST: dict[str, tuple[type, ...]] = {
    "checkpoint_id": _STR,
    "created_at": _NUMBER,
    "backend": _STR,
    "sequence": _INT,
    "experiment": (dict,),
    "values": (dict,),
    "files": (list,),
}
_EXPERIMENT: dict[str, tuple[type, ...]] = {
    "id": _STR,
    "name": _STR,
    "project": _OPTIONAL_STR,
    "parent_id": _OPTIONAL_STR,
    "created_at": _NUMBER,
    "config": (dict,),
    "metadata": (dict,),
    "tags": (list,),
}
_VALUES: dict[str, tuple[type, ...]] = {
    "checkpoint_type": _STR,
    "epoch": _INT,
    "step": _INT,
    "update_best": _BOOL,
    "loss": _SCORE,
    "val_loss": _SCORE,
    "metrics": (dict,),
    "config": _ANY,
    "notes": _OPTIONAL_STR,
    "model_name": _OPTIONAL_STR,
}
_FILE: dict[str, tuple[type, ...]] = {
    "name": _STR,
    "component": _OPTIONAL_STR,
    "size": _INT,
    "sha256": _OPTIONAL_STR,
    "compression": _OPTIONAL_STR,
    "raw_size": _OPTIONAL_INT,
    "chunk_size": _OPTIONAL_INT,
    "states": (list,),
}


def _problem(content: dict[str, Any]) -> str | None:
    """Return what is wrong with a manifest whose seal is right, or None: a seal can be made by anyone."""
    wrong = _mismatch(content, _MANIFEST) or _mismatch(content["experiment"], _EXPERIMENT)
    wrong = wrong or _mismatch(content["values"], _VALUES)
    if wrong:
        return wrong
    if not is_id(content["checkpoint_id"]) or not is_id(content["experiment"]["id"]):
        return "an id is no UUID"
    metrics = content["values"]["metrics"].values()
    scores = [s for s in (content["values"]["loss"], content["values"]["val_loss"]) if s is not None]
    if not all(map(_is_score, [*scores, *metrics])):
        return "a score is no number"
    if not 0 <= content["sequence"] < MAX_SEQUENCE:
        return f"sequence {content['sequence']} is none that a database counts to"
    if is_deep(content, MAX_DEPTH + 3):  # config and the like lie two levels deep, and a float may be an object
        return "it is nested too deeply"
    for file in content["files"]:
        wrong = _mismatch(file, _FILE) if isinstance(file, dict) else "a file is no object"
        if wrong:
            return wrong
        if not _NAME.fullmatch(file["name"]) or file["name"] == FILE_NAME:
            return f"no checkpoint has a file {file['name']!r}"
        if file["size"] < 0 or (file["raw_size"] or 0) < 0:
            return f"file {file['name']!r} has a negative size"
        if not _fit(file["states"], file["chunk_size"], file["size"]):
            return f"file {file['name']!r} has states that do not fit its size"
    if len({file["name"] for file in content["files"]}) != len(content["files"]):
        return "a file stands twice"
    return None


def _is_score(score: object) -> bool:
    if isinstance(score, str):
        return score in ("nan", "inf", "-inf")
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        return False
    return isinstance(score, float) or -(2**63) <= score < 2**63


def _fit(states: list[Any], chunk_size: int | None, size: int) -> bool:
    if chunk_size is None or not states:
        return chunk_size is None and not states
    count = -(-size // chunk_size) - 1 if chunk_size > 0 and chunk_size % 64 == 0 else -1
    return len(states) == count and all(isinstance(state, str) and _STATE.fullmatch(state) for state in states)


def _mismatch(found: dict[str, Any], expected: dict[str, tuple[type, ...]]) -> str | None:
    if found.keys() != expected.keys():
        return f"fields {sorted(found.keys() ^ expected.keys())}"
    for name, types in expected.items():
        value = found[name]
        flag_for_number = isinstance(value, bool) and types not in (_BOOL, _ANY)  # bool is a kind of int
        if flag_for_number or not isinstance(value, types):
            return f"{name} is a {type(value).__name__}"
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            return f"{name} does not fit into 64 bits"
        if isinstance(value, str) and value.encode("utf-8", "ignore").decode() != value:
            return f"{name} is no valid text"
    return None
