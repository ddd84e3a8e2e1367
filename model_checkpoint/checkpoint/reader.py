"""From a published folder to a state: every file opened once, compared with its digest before anything is decoded."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any

from model_checkpoint.arrays import HostArray
from model_checkpoint.checkpoint.compression import SUFFIX, decompress
from model_checkpoint.checkpoint.decoding import Decoder
from model_checkpoint.checkpoint.selection import references, select
from model_checkpoint.checkpoint.storage import StorageBackend, storage_backend
from model_checkpoint.errors import (
    ConfigurationError,
    FormatError,
    IntegrityError,
    MissingDependencyError,
    StorageError,
    UnknownBackendError,
)
from model_checkpoint.integrity.manifest import FileEntry, Manifest
from model_checkpoint.integrity.reading import FileReader, map_file, read_parts
from model_checkpoint.utils.parallel import run, start, wait_while

STATE_FILE = "state.json"
_HEAD = 8  # bytes that a backend must see to say how long the head of its file is

Arrays = dict[str, dict[str, HostArray]]  # component -> key -> array
Nodes = dict[tuple[str, str], dict[str, Any]]  # (component, key) -> a node of the tree that refers to it


class CheckpointReader:
    """Reads one checkpoint.

    Args:
        folder: where it lies.
        manifest: what must be there.
        verify: compare digests; False maps the files and checks their lengths only.
        threads: how many read and hash at once.

    Attributes:
        folder, manifest: as given.
        checks: what was found of each file that was read whole, in the form that verification records.
        sound: whether every file read was what was saved: what then fails is the decoding, not the bytes.
        verified: whether every file was compared with its digest.
    """

    def __init__(self, folder: str, manifest: Manifest, verify: bool, threads: int) -> None:
        self.folder = folder
        self.manifest = manifest
        self._verify = verify
        self._threads = threads
        self.checks: list[dict[str, Any]] = []
        self.sound = verify
        self.verified = False

    def load(
        self,
        components: Collection[str],
        device: object = None,
        keys: Sequence[str] | None = None,
        framework: str | None = None,
    ) -> dict[str, Any]:
        """Return component -> object, for those of ``components`` that were saved.

        Args:
            components: which; the files of the others are not read.
            device: where arrays of a library with devices go, file by file while the next one is read; None leaves them
                in host memory.
            keys: patterns of what is wanted (see ``selection.select``); only that is read, where the files allow.
            framework: whose arrays to make; None for those of the library that each was saved from.

        Raises:
            IntegrityError: a file is missing, changed or cannot be decoded; the text names it.
            MissingDependencyError: the backend or the compression needs a package.
            UnknownBackendError: the backend is not registered here.
            ConfigurationError: the device cannot be used, or nothing matches ``keys``.
        """
        with self.decoding():
            tree = self.tree()
            wanted = {name: tree[name] for name in components if name in tree}
            if keys is not None:
                wanted = select(wanted, keys)
            nodes = {(node["of"], node["$array"]): node for node in references(wanted)}
            decoder = Decoder(not_stored, device, framework)
            for arrays in self._arrays(nodes, device is not None, keys is not None and self._verify):
                for component, named in arrays.items():
                    for key, stored in named.items():
                        if (component, key) in nodes:
                            decoder.place(nodes[component, key], stored)
            return {name: decoder.node(node) for name, node in wanted.items()}

    def tree(self) -> dict[str, Any]:
        """Return component -> its JSON tree; raises what ``load`` raises."""
        entry = next((f for f in self.manifest.files if _plain_name(f) == STATE_FILE), None)
        if entry is None:
            raise IntegrityError(self.folder, f"the manifest names no {STATE_FILE}")
        tree = json.loads(bytes(self._contents([entry])[STATE_FILE]))
        if not isinstance(tree, dict):
            raise FormatError(f"{STATE_FILE} is no JSON object")
        return tree

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Within this, what the files hold is the cause of errors: they become IntegrityErrors."""
        try:
            yield
        except (IntegrityError, MissingDependencyError, UnknownBackendError, ConfigurationError, StorageError):
            raise  # about the files as a whole, or about this machine: not about what the files hold
        except (FormatError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise IntegrityError(self.folder, f"a file cannot be decoded: {error}") from error

    def _arrays(self, nodes: Nodes, one_by_one: bool, in_part: bool) -> Iterator[Arrays]:
        """Yield the arrays of the files that hold those of ``nodes``; with ``one_by_one`` a file's at a time."""
        files = self._holding(nodes)
        if not files:
            return
        if in_part:
            with ExitStack() as stack:
                for reader, arrays in self.located(nodes, stack):
                    if reader is not None:
                        spans = [span(reader, arrays[c][k]) for c, k in nodes if k in arrays.get(c, {})]
                        self._read_spans(reader, spans)
                    yield arrays
        elif not one_by_one:
            yield self._backend().read(self._contents(files))
        else:
            contents = self._contents(files[:1])
            for following in [*files[1:], None]:
                ahead = _Ahead(partial(self._contents, [following] if following is not None else []))
                try:
                    yield self._backend().read(contents)
                finally:
                    contents = ahead.result()  # so host memory never holds more than two files

    def located(self, nodes: Nodes, stack: ExitStack) -> Iterator[tuple[FileReader | None, Arrays]]:
        """Yield the arrays of each file that holds some of ``nodes``, without reading what is in them where possible.

        Args:
            nodes: what is wanted.
            stack: closes the files.

        Yields:
            With a reader, only the head of the file was read, and the arrays are views of the reader's empty content:
            ``span`` tells where in the file they are. With None, they are read.
        """
        backend = self._backend()
        for file in self._holding(nodes):
            head = None
            if file.compression is None and (file.chunk_size is not None or not self._verify):
                reader = self._open(file, stack)
                self._read_spans(reader, [(0, min(_HEAD, file.size))])
                head = backend.head(reader.content[:_HEAD])
            if head is None:
                yield None, backend.read(self._contents([file]))
                continue
            self._read_spans(reader, [(0, min(head, file.size))])
            yield reader, backend.read({_plain_name(file): reader.content})

    def _read_spans(self, reader: FileReader, spans: list[tuple[int, int]]) -> None:
        sound, self.sound = self.sound, False
        read_parts([(reader, *part) for part in reader.parts(spans)], self._threads)
        self.sound = sound

    def files_of(self, component: str) -> list[FileEntry]:
        """Return the files that hold arrays of a component; one that holds several is among each one's."""
        return self._holding({(component, ""): {}})

    def open(self, file: FileEntry, stack: ExitStack) -> tuple[FileReader | None, Arrays]:
        """Open a file to read pieces of it, and return what it holds, as ``located`` does of several.

        Unlike there, only the head is kept in memory, and a file without chunks is read in pieces, too.
        """
        backend = self._backend()
        if file.compression is None:
            reader = self._open(file, stack)
            self.read_piece(reader, 0, reader.content[:_HEAD])
            head = backend.head(reader.content[:_HEAD])
            if head is not None:
                self.read_piece(reader, 0, reader.content[:head])
                return reader, backend.read({_plain_name(file): reader.content})
            reader.let_go()
        return None, backend.read(self._contents([file]))

    def look_for(self, files: Sequence[FileEntry]) -> None:
        """Raise IntegrityError unless the files are there in their length; nothing is read."""
        with ExitStack() as stack:
            sound, self.sound = self.sound, False
            for file in files:
                self._open(file, stack)
            self.sound = sound

    def read_piece(self, file: FileReader, begin: int, memory: memoryview) -> None:
        """Fill ``memory`` with verified bytes of a file; a chunk at a time is in memory besides."""
        sound, self.sound = self.sound, False
        file.verify(begin, begin + memory.nbytes)
        file.read_into(begin, memory)
        self.sound = sound

    def verify_all(self) -> None:
        """Compare every file with its digest, in the memory of a chunk for each thread; nothing is verified again."""
        if not self._verify:
            return
        sound, self.sound = self.sound, False
        with ExitStack() as stack:
            readers = [self._open(file, stack) for file in self.manifest.files]
            run(
                [partial(r.check, *part) for r in readers for part in r.parts([(0, r.content.nbytes)])],
                self._threads,
            )
        self.sound = sound and all(file.sha256 is not None for file in self.manifest.files)
        self.checks = [_told(file) for file in self.manifest.files]
        self.verified = self.sound
        self._verify = False

    def _holding(self, nodes: Nodes) -> list[FileEntry]:
        """Return the files that hold the components of ``nodes``."""
        owners = {component for component, _ in nodes}
        files = [f for f in self.manifest.files if f.component in owners or (f.component is None and owners)]
        return [f for f in files if _plain_name(f) != STATE_FILE]

    def _backend(self) -> StorageBackend:
        return storage_backend(self.manifest.backend)

    def _contents(self, files: Sequence[FileEntry]) -> dict[str, memoryview]:
        """Return name -> content of whole files, verified and decompressed."""
        sound, self.sound = self.sound, False
        if self._verify:
            with ExitStack() as stack:
                readers = [self._open(file, stack) for file in files]
                parts = [(r, *part) for r in readers for part in r.parts([(0, r.content.nbytes)])]
                read_parts(parts, self._threads)
            contents = [reader.content for reader in readers]
        else:
            contents = [map_file(os.path.join(self.folder, file.name), file.size) for file in files]
        self.sound = sound and all(file.sha256 is not None for file in files)
        if self._verify:
            self.checks += [told for told in map(_told, files) if told not in self.checks]  # it may be read again
        tasks = [partial(self._decompressed, *pair) for pair in zip(files, contents)]
        return dict(zip(map(_plain_name, files), run(tasks, self._threads if _any_compressed(files) else 1)))

    def _open(self, file: FileEntry, stack: ExitStack) -> FileReader:
        if not self._verify:
            file = file._replace(sha256=None, chunk_size=None, states=())
        reader = FileReader(os.path.join(self.folder, file.name), file)
        stack.callback(reader.close)
        return reader

    def _decompressed(self, file: FileEntry, content: memoryview) -> memoryview:
        if file.compression is None:
            return content
        try:
            return decompress(content, file.compression, file.raw_size or 0)
        except FormatError as error:
            raise IntegrityError(os.path.join(self.folder, file.name), str(error)) from error


class _Ahead:
    """Calls a function in a thread of its own, or in the caller's where none can be started."""

    def __init__(self, function: Callable[[], dict[str, memoryview]]) -> None:
        self._outcome: dict[str, memoryview] | None = None
        self._error: BaseException | None = None
        self._function = function
        self._ended: SimpleQueue[None] = SimpleQueue()
        if not start(Thread(target=self._call, name="checkpoint reader", daemon=True)):
            self._call()

    def _call(self) -> None:
        try:
            self._outcome = self._function()
        except BaseException as error:  # noqa: BLE001 - raised by result()
            self._error = error
        self._ended.put(None)

    def result(self) -> dict[str, memoryview]:
        interrupts = wait_while(lambda: self._outcome is None and self._error is None, self._ended)
        for error in (*interrupts, self._error):
            if error is not None:
                raise error
        return self._outcome or {}


def span(reader: FileReader, array: HostArray) -> tuple[int, int]:
    """Return where in its file an array lies whose data is a view of the reader's content: first byte, and the end."""
    if not array.data.nbytes:
        return 0, 0
    begin = address_of(array.data) - address_of(reader.content)
    return begin, begin + array.data.nbytes


def _told(file: FileEntry) -> dict[str, Any]:
    return {"name": file.name, "ok": True, "expected": file.sha256, "actual": file.sha256, "problem": None}


def not_stored(component: str, key: str) -> HostArray:
    """Stand in for ``fetch`` of a ``Decoder`` whose arrays were placed."""
    raise FormatError(f"array {key!r} of {component} is in no file")


def _any_compressed(files: Sequence[FileEntry]) -> bool:
    return any(file.compression is not None for file in files)


def _plain_name(file: FileEntry) -> str:
    return file.name.removesuffix(SUFFIX.get(file.compression or "", ""))


def address_of(content: memoryview) -> int:
    """Return where in memory a writable buffer begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(content))
