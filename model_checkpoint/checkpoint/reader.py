"""From a published folder to a state: every file opened once, compared with its digest before anything is decoded."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from typing import Any

from model_checkpoint.arrays import HostArray
from model_checkpoint.checkpoint.compression import SUFFIX, decompress
from model_checkpoint.checkpoint.state import Decoder
from model_checkpoint.checkpoint.storage import storage_backend
from model_checkpoint.errors import (
    ConfigurationError,
    FormatError,
    IntegrityError,
    MissingDependencyError,
    UnknownBackendError,
)
from model_checkpoint.integrity.hashing import map_file, read_file
from model_checkpoint.integrity.manifest import FileEntry, Manifest

STATE_FILE = "state.json"


class CheckpointReader:
    """Reads one checkpoint, each component when it is first asked for.

    Args:
        folder: where it lies.
        manifest: what must be there.
        verify: compare digests; False maps the files and checks their lengths only.

    Attributes:
        checks: what was found of each file read, in the form that verification records.
        sound: whether every file read was what was saved: what then fails is the decoding, not the bytes.
    """

    def __init__(self, folder: str, manifest: Manifest, verify: bool) -> None:
        self._folder = folder
        self._manifest = manifest
        self._verify = verify
        self._arrays: dict[str, dict[str, HostArray]] = {}
        self._read: set[str] = set()
        self.checks: list[dict[str, Any]] = []
        self.sound = verify

    def load(self, components: Collection[str], device: object = None) -> dict[str, Any]:
        """Return component -> object, for those of ``components`` that were saved.

        Args:
            components: which; the files of the others are not read.
            device: where arrays of a library with devices go; None leaves them in host memory.

        Raises:
            IntegrityError: a file is missing, changed or cannot be decoded; the text names it.
            MissingDependencyError: the backend or the compression needs a package.
            UnknownBackendError: the backend is not registered here.
            ConfigurationError: the device cannot be used.
        """
        entry = next((f for f in self._manifest.files if _plain_name(f) == STATE_FILE), None)
        if entry is None:
            raise IntegrityError(self._folder, f"the manifest names no {STATE_FILE}")
        try:
            tree = json.loads(bytes(self._content(entry)))
            if not isinstance(tree, dict):
                raise FormatError(f"{STATE_FILE} is no JSON object")
            decoder = Decoder(self._fetch, device)
            return {name: decoder.node(tree[name]) for name in components if name in tree}
        except (IntegrityError, MissingDependencyError, UnknownBackendError, ConfigurationError):
            raise  # about the files as a whole, or about this machine: not about what the files hold
        except (FormatError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise IntegrityError(self._folder, f"a file cannot be decoded: {error}") from error

    def _fetch(self, component: str, key: str) -> HostArray:
        if component not in self._read:
            self._read_component(component)
        try:
            return self._arrays[component][key]
        except KeyError:
            raise FormatError(f"array {key!r} of {component} is in no file") from None

    def _read_component(self, component: str) -> None:
        files = [f for f in self._manifest.files if f.component in (component, None) and _plain_name(f) != STATE_FILE]
        contents = {_plain_name(file): self._content(file) for file in files}
        for name, arrays in storage_backend(self._manifest.backend).read(contents).items():
            self._arrays.setdefault(name, {}).update(arrays)
            self._read.add(name)
        self._read.add(component)

    def _content(self, file: FileEntry) -> memoryview:
        path = os.path.join(self._folder, file.name)
        sound, self.sound = self.sound, False
        content = read_file(path, file.size, file.sha256) if self._verify else map_file(path, file.size)
        self.sound = sound and file.sha256 is not None
        self.checks.append(
            {"name": file.name, "ok": True, "expected": file.sha256, "actual": file.sha256, "problem": None}
        )
        if file.compression is None:
            return content
        try:
            return decompress(content, file.compression, file.raw_size or 0)
        except FormatError as error:
            raise IntegrityError(path, str(error)) from error


def _plain_name(file: FileEntry) -> str:
    return file.name.removesuffix(SUFFIX.get(file.compression or "", ""))
