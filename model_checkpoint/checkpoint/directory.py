"""The checkpoint directory: staging, publication, trash and the lock that keeps saving and removal apart.

<path>/.engine/format.json    format version and the id of this directory (its store id)
<path>/.engine/gc.lock        flock: shared by every save and load, exclusive for removal and recovery
<path>/.engine/staging/<id>/  a checkpoint that is being written
<path>/.engine/trash/<id>/    a removed checkpoint that can still be brought back
<path>/<experiment>/<id>/     a published checkpoint
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from io import FileIO
from operator import attrgetter
from weakref import WeakSet

from model_checkpoint.checkpoint.compression import SUFFIX, CompressingSink
from model_checkpoint.checkpoint.identity import identify, stamp
from model_checkpoint.checkpoint.storage.base_backend import LinkedFile, PlannedFile
from model_checkpoint.errors import ConfigurationError, LockTimeoutError, StorageError
from model_checkpoint.integrity.manifest import FILE_NAME, FileEntry
from model_checkpoint.integrity.sha256 import CHUNK
from model_checkpoint.integrity.writing import FileSink, link_file, write_bytes, write_file
from model_checkpoint.utils.folders import id_folders, make_again, refuse_links, remove_folder
from model_checkpoint.utils.fork import watch
from model_checkpoint.utils.parallel import Stop, run

_COPY_PATIENCE = 10.0  # seconds to wait for the exclusive lock of a directory that turns out to be a copy
_LOCK_POLL = 0.02  # seconds between tries for a lock
_TURN = 1.0  # seconds for which one who wants the lock alone keeps others from beginning
_WORTH_THREADS = 8 << 20  # bytes; starting threads takes longer than writing less
_UNKNOWN = 1 << 62  # for a file whose size is not known ahead: as large as can be

ManifestOf = Callable[[Sequence[FileEntry]], tuple[bytes, str]]  # the manifest's bytes and their digest


class CheckpointDirectory:
    """One checkpoint directory, shared by any number of managers and processes.

    Args:
        path: where it is; made when it does not exist.

    Attributes:
        path: absolute.
        store_id: its UUID, which stays when it is moved.

    Raises:
        StorageError: it cannot be made or written.
        ConfigurationError: a file is in the way.
        FormatVersionError: a newer version of this package wrote it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
            raise ConfigurationError(f"checkpoint_dir must be the path of a directory, not {path!r}")
        self.path = os.path.abspath(os.fspath(path))
        self._engine = os.path.join(self.path, ".engine")
        self._staging = os.path.join(self._engine, "staging")
        self._trash = os.path.join(self._engine, "trash")
        self._synced: set[str] = set()  # experiments whose folder this object has made durable
        self._locks: WeakSet[FileIO] = WeakSet()  # those that are open
        watch(self)
        try:
            lasting = self.path
            while not os.path.exists(lasting):
                lasting = os.path.dirname(lasting)
            refuse_links(self._engine, self._staging, self._trash)
            for folder in (self._staging, self._trash):
                os.makedirs(folder, exist_ok=True)
            self.store_id = identify(self._engine)
            for folder in (self._engine, self.path):
                sync_folder(folder)
            folder = self.path
            while folder != lasting:  # every folder that was made, in the one that it was made in
                folder = os.path.dirname(folder)
                sync_folder(folder)
        except (ConfigurationError, StorageError):
            raise
        except (FileExistsError, NotADirectoryError) as error:
            raise ConfigurationError(
                f"checkpoint_dir {self.path} is a file, or a part of it is; choose another directory or move it away"
            ) from error
        except ValueError as error:  # NUL or half a surrogate pair
            raise ConfigurationError(f"checkpoint_dir {path!r} cannot be a path: {error}") from error
        except OSError as error:
            advice = "choose a checkpoint_dir that you may write to, on a disk with space"
            raise StorageError("open the checkpoint directory", self.path, error, advice) from error

    def be_distinct_from(self, other: str) -> None:
        """Take a new store id if this is a copy of the directory ``other``, which is still there with the same id.

        Otherwise the rows of the one, and its tombstones, would be applied to the other.
        """
        try:
            with open(os.path.join(other, ".engine", "format.json"), "rb") as file:
                copied = json.load(file)["store_id"] == self.store_id
            if not copied or os.path.samefile(other, self.path):
                return
        except (OSError, ValueError, KeyError, TypeError):
            return  # nothing of that name there: this directory was moved
        with self.exclusive(_COPY_PATIENCE):
            if identify(self._engine) == self.store_id:
                mine = os.path.join(self._engine, f"format.json.{uuid.uuid4()}")
                write_bytes(mine, stamp())
                os.replace(mine, os.path.join(self._engine, "format.json"))
                sync_folder(self._engine)
            self.store_id = identify(self._engine)

    def shared(self) -> FileIO:
        """Take the directory's lock shared, for a ``with`` block: nothing is removed or recovered meanwhile.

        The lock is a file of its own that the block closes, from which not even a Ctrl-C can keep it; the kernel drops
        it when the process dies.
        """
        lock = self._open_lock()
        try:
            with self._open_turn() as turn:
                deadline = time.monotonic() + 2 * _TURN  # a process that was stopped may be in the way
                while not _try_lock(turn, fcntl.LOCK_SH) and time.monotonic() < deadline:
                    time.sleep(_LOCK_POLL)
            fcntl.flock(lock, fcntl.LOCK_SH)
            return lock
        except BaseException:
            lock.close()
            raise

    def exclusive(self, timeout: float) -> FileIO:
        """Take the lock alone, for a ``with`` block: no save is under way in any process.

        Raises:
            LockTimeoutError: others held it for ``timeout`` seconds.
            StorageError: a folder of the engine is missing and cannot be made.
        """
        deadline = time.monotonic() + timeout
        lock = self._open_lock()
        try:
            with self._open_turn() as turn:
                began = time.monotonic()
                while not _try_lock(lock, fcntl.LOCK_EX):
                    now = time.monotonic()
                    if now >= deadline:
                        raise LockTimeoutError(
                            f"{self.path} is in use by a save or load elsewhere; try again when it is done"
                        )
                    if (now - began) % (2 * _TURN) < _TURN:  # no new ones begin, so that it comes to be free
                        _try_lock(turn, fcntl.LOCK_EX)
                    else:  # it is a long save: let others begin beside it
                        fcntl.flock(turn, fcntl.LOCK_UN)
                    time.sleep(_LOCK_POLL)
            make_again(self._staging, self._trash)
            return lock
        except BaseException:
            lock.close()
            raise

    def before_fork(self) -> None:
        """Nothing has to rest."""

    def after_fork_in_parent(self) -> None:
        """Nothing rested."""

    def after_fork_in_child(self) -> None:
        """Let go of the parent's locks, which would otherwise last until the child ends."""
        for lock in self._locks:
            lock.close()

    def _open_lock(self) -> FileIO:
        path = os.path.join(self._engine, "gc.lock")
        flags = os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            lock = FileIO(os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o644), "rb+")
        except OSError as error:
            if error.errno in (errno.EROFS, errno.EACCES) and os.path.exists(path):
                lock = FileIO(os.open(path, flags | os.O_RDONLY), "rb")  # an archive: readers can still take turns
            else:
                advice = "check its permissions"
                if error.errno == errno.ENOENT:
                    advice = "it was removed or unmounted; make a new EnhancedCheckpointManager to start it again"
                raise StorageError("lock the checkpoint directory", path, error, advice) from error
        self._locks.add(lock)
        return lock

    def _open_turn(self) -> FileIO:
        """Open what one who waits for the lock alone holds, to let no others begin: it might never be free."""
        name = os.path.join(self._engine, "format.json")  # which is there in archives, too
        try:
            turn = FileIO(name, "rb")
        except OSError as error:
            raise StorageError("lock the checkpoint directory", name, error, "open it again") from error
        self._locks.add(turn)
        return turn

    def folder(self, experiment_id: str, checkpoint_id: str) -> str:
        """Return the path of a published checkpoint; both ids are our own UUIDs, never text from outside."""
        return os.path.join(self.path, experiment_id, checkpoint_id)

    def write(
        self,
        experiment_id: str,
        checkpoint_id: str,
        planned: Sequence[PlannedFile | LinkedFile],
        manifest_of: ManifestOf,
        *,
        codec: str | None,
        hashed: bool,
        threads: int,
    ) -> tuple[list[FileEntry], str]:
        """Write a checkpoint beside the others and publish it whole; the caller holds ``shared()``.

        Everything is on stable storage when this returns. When it raises, nothing was published.

        Args:
            experiment_id, checkpoint_id: where it goes.
            planned: its files.
            manifest_of: makes the manifest from the files as they were written.
            codec: compression of the files, or None.
            hashed: whether to compute digests.
            threads: how many files are written at once.

        Returns:
            The files as they were written, and the manifest's digest.

        Raises:
            StorageError: the file system refused (full, read-only, I/O error); the staging folder is removed.
        """
        staging = os.path.join(self._staging, checkpoint_id)
        target = os.path.join(self.path, experiment_id, checkpoint_id)
        try:
            if os.path.islink(self._staging) or os.path.islink(os.path.dirname(target)):
                refuse_links(self._staging, os.path.dirname(target))
            os.mkdir(staging)
            entries = _write_all(staging, planned, codec, hashed, threads)
            manifest, digest = manifest_of(entries)
            write_bytes(os.path.join(staging, FILE_NAME), manifest)
            sync_folder(staging)
            self._make_durable(experiment_id)
            os.rename(staging, target)  # the id is new, and a folder that has files is never replaced
            sync_folder(os.path.dirname(target))
            return entries, digest
        except BaseException as error:
            for folder in (staging, target):
                with contextlib.suppress(OSError):
                    remove_folder(folder)
            if isinstance(error, OSError) and not isinstance(error, StorageError):
                advice = "earlier checkpoints are untouched; free space or check the disk, then save again"
                raise StorageError("publish a checkpoint", error.filename or staging, error, advice) from error
            raise

    def _make_durable(self, experiment_id: str) -> None:
        """Make the experiment's folder; that it is there does not say that whoever made it has synced it, too."""
        made = True
        try:
            os.mkdir(os.path.join(self.path, experiment_id))
        except FileExistsError:
            made = False
        if made or experiment_id not in self._synced:
            sync_folder(self.path)
            self._synced.add(experiment_id)

    def published(self) -> list[tuple[str, str]]:
        """Return (experiment id, checkpoint id) of every folder that is named and placed like a checkpoint."""
        return [
            (experiment, checkpoint)
            for experiment in id_folders(self.path)
            for checkpoint in id_folders(os.path.join(self.path, experiment))
        ]

    def staged(self) -> list[str]:
        """Return the ids of unfinished checkpoints."""
        return id_folders(self._staging)

    def discard_staged(self, checkpoint_id: str) -> None:
        """Remove an unfinished checkpoint whose writer is dead; the caller holds ``exclusive()``."""
        refuse_links(self._engine, self._staging)
        remove_folder(os.path.join(self._staging, checkpoint_id))

    def trash(self, experiment_id: str, checkpoint_id: str) -> None:
        """Move a published checkpoint to the trash; one that is not there is there no longer, which is as good."""
        self._move(self.folder(experiment_id, checkpoint_id), self.trash_folder(checkpoint_id))

    def restore(self, experiment_id: str, checkpoint_id: str) -> bool:
        """Move a checkpoint from the trash to where it was; returns whether it is there now."""
        target = self.folder(experiment_id, checkpoint_id)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        self._move(self.trash_folder(checkpoint_id), target)
        return os.path.isdir(target)

    def _move(self, source: str, target: str) -> None:
        refuse_links(self._engine, os.path.dirname(source), os.path.dirname(target))
        try:
            with contextlib.suppress(FileNotFoundError):
                os.rename(source, target)
                sync_folder(os.path.dirname(target))
                sync_folder(os.path.dirname(source))
        except OSError as error:
            advice = "opening the directory again settles where it is"
            raise StorageError("move a checkpoint", source, error, advice) from error

    def check_writable(self) -> None:
        """Raise StorageError unless checkpoints can be moved to the trash."""
        if not os.access(self._trash, os.W_OK | os.X_OK):
            cause = OSError(errno.EACCES, "it is read-only, or not yours")
            raise StorageError("write to the checkpoint directory", self.path, cause, "nothing was changed")

    def trash_folder(self, checkpoint_id: str) -> str:
        """Return the path of a removed checkpoint."""
        return os.path.join(self._trash, checkpoint_id)

    def in_trash(self) -> list[str]:
        """Return the ids of what is in the trash."""
        return id_folders(self._trash)

    def unlink_trashed(self, checkpoint_id: str) -> None:
        """Remove a checkpoint in the trash for good."""
        refuse_links(self._engine, self._trash)
        with contextlib.suppress(OSError):
            remove_folder(self.trash_folder(checkpoint_id))


_size_of = attrgetter("size")


def _write_all(
    staging: str, planned: Sequence[PlannedFile | LinkedFile], codec: str | None, hashed: bool, threads: int
) -> list[FileEntry]:
    """Write the files, the largest first, so that the last ones to end are small; returns them in the order given."""
    stop = Stop()
    sizes = list(map(_size_of, planned))
    if None not in sizes and sum(sizes) < _WORTH_THREADS:
        entries = []
        for file in planned:
            entries.append(_write_planned(staging, file, codec, hashed, stop))
        return entries
    sizes = [_UNKNOWN if size is None else size for size in sizes]
    order = sorted(range(len(planned)), key=sizes.__getitem__, reverse=True)
    written = run([partial(_write_planned, staging, planned[i], codec, hashed, stop) for i in order], threads, stop)
    return [entry for _, entry in sorted(zip(order, written))]


def _write_planned(
    staging: str, file: PlannedFile | LinkedFile, codec: str | None, hashed: bool, stop: Stop
) -> FileEntry:
    if isinstance(file, LinkedFile):
        codec = None
    name = file.name if codec is None else file.name + SUFFIX[codec]
    path = os.path.join(staging, name)
    raw_size = None
    if isinstance(file, LinkedFile):
        written = link_file(file.source, file.identity, path, hashed, stop)
    elif codec is None:
        written = write_file(path, file.write, hashed, file.size, stop)
    else:
        compressing: CompressingSink

        def compress(sink: FileSink) -> None:
            nonlocal compressing
            compressing = CompressingSink(sink, codec)
            file.write(compressing)
            compressing.finish()

        written = write_file(path, compress, hashed, stop=stop)
        raw_size = compressing.raw_size
    chunk_size = CHUNK if written.states else None
    return FileEntry(name, file.component, written.size, written.sha256, codec, raw_size, chunk_size, written.states)


def _try_lock(lock: FileIO, kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def sync_folder(path: str) -> None:
    """Make what was made, renamed and removed in a folder last."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
