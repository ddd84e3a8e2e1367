"""Checking what lies on disk against what was promised, and recording the outcome."""

from __future__ import annotations

import errno
import hashlib
import hmac
import os
import stat
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from model_checkpoint.errors import CheckpointNotFoundError, FormatVersionError, IntegrityError, StorageError
from model_checkpoint.integrity.manifest import FILE_NAME, FileEntry, Manifest, parse_manifest
from model_checkpoint.integrity.reading import digest_file, open_to_read


class ChecksumCalculator:
    """SHA-256 of files and of data in memory, as lower-case hex."""

    def calculate_file_checksum(self, path: str | os.PathLike[str]) -> str:
        """Return what ``sha256sum path`` prints.

        Raises:
            OSError: the file cannot be read.
        """
        return digest_file(os.fspath(path))

    def calculate_data_checksum(self, data: bytes | bytearray | memoryview | str) -> str:
        """Return the digest of ``data``: any contiguous buffer, or text, taken as UTF-8."""
        return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()

    def verify_file_checksum(self, path: str | os.PathLike[str], expected: str) -> bool:
        """Return whether the file has the digest ``expected`` (hex, in either case).

        Raises:
            OSError: the file cannot be read.
        """
        return hmac.compare_digest(self.calculate_file_checksum(path), expected.strip().lower())


def read_manifest(folder: str, expected_digest: str | None = None) -> tuple[Manifest, str]:
    """Return the manifest in ``folder`` and its digest.

    Args:
        folder: a checkpoint's folder.
        expected_digest: the digest that the database has for it; None when there is no row to compare with.

    Raises:
        IntegrityError: missing, changed, or not the manifest of the checkpoint whose folder this is.
        FormatVersionError: a newer version of this package wrote it.
        StorageError: the file system refuses to tell.
    """
    path = os.path.join(folder, FILE_NAME)
    try:
        with open(path, "rb", opener=open_to_read) as file:
            manifest, digest = parse_manifest(file.read(), path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EISDIR):
            raise IntegrityError(path, f"the manifest is missing ({error.strerror})") from error
        raise StorageError("read a manifest", path, error, "try again when the cause is mended") from error
    if expected_digest is not None and digest != expected_digest:
        raise IntegrityError(path, "the manifest is not the one in the database", expected_digest, digest)
    if os.path.basename(folder) != manifest.checkpoint_id:
        raise IntegrityError(path, "the manifest belongs to another checkpoint", None, manifest.checkpoint_id)
    return manifest, digest


def verify_folder(
    folder: str, expected_digest: str | None = None, on_bytes: Callable[[int], object] | None = None
) -> dict[str, Any]:
    """Hash every file of a checkpoint and compare.

    Returns:
        ``verified`` (all is as it was saved), ``error`` (the first problem, or None), ``size`` (bytes that should be
        there) and ``files``: a list of dicts with ``name``, ``ok``, ``expected``, ``actual`` (SHA-256 hex, or None)
        and ``problem``.
    """
    try:
        manifest, digest = read_manifest(folder, expected_digest)
    except (IntegrityError, FormatVersionError) as error:
        check = {"name": FILE_NAME, "ok": False, "expected": expected_digest, "actual": None, "problem": str(error)}
        return {"verified": False, "error": str(error), "size": 0, "files": [check]}
    checks = [{"name": FILE_NAME, "ok": True, "expected": digest, "actual": digest, "problem": None}]
    checks += [_check_file(os.path.join(folder, file.name), file, on_bytes) for file in manifest.files]
    problems = [check["problem"] for check in checks if not check["ok"]]
    return {
        "verified": not problems,
        "error": problems[0] if problems else None,
        "size": manifest.size,
        "files": checks,
    }


def _check_file(path: str, file: FileEntry, on_bytes: Callable[[int], object] | None) -> dict[str, Any]:
    actual, problem = None, None
    try:
        found = os.stat(path, follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode):
            problem = f"{path} is no file"
        else:
            actual = digest_file(path, on_bytes)
            if found.st_size != file.size:
                problem = f"{path} has {found.st_size} bytes, {file.size} were saved"
            elif file.sha256 is not None and actual != file.sha256:
                problem = f"{path} has SHA-256 {actual}, {file.sha256} was saved"
    except OSError as error:
        problem = f"{path} cannot be read: {error.strerror}"
    return {
        "name": file.name,
        "ok": problem is None,
        "expected": file.sha256,
        "actual": actual,
        "problem": problem,
    }


class CheckpointRows(Protocol):
    """What verification asks of the database; ``database.checkpoints.CheckpointTable`` has it."""

    def locate(self, checkpoint_id: str) -> tuple[str, str | None] | None:
        """Return the folder and the manifest digest of a checkpoint, or None when there is none."""

    def ids(self, experiment_id: str | None) -> list[str]:
        """Return the ids of an experiment's checkpoints (of all experiments for None), oldest first."""


class Verifications(Protocol):
    """Where outcomes are kept; ``database.verifications.VerificationTable`` is one."""

    def record(self, checkpoint_id: str, result: dict[str, Any], verified_at: float) -> None:
        """Store one outcome."""


class _Database(Protocol):
    @property
    def checkpoints(self) -> CheckpointRows: ...

    @property
    def verifications(self) -> Verifications: ...


class CheckpointVerifier:
    """Verifies checkpoints by their rows in the database; every outcome is recorded there.

    Args:
        db: an ``EnhancedDatabaseConnection``.
    """

    def __init__(self, db: _Database) -> None:
        self._rows = db.checkpoints
        self._outcomes = db.verifications

    def verify_checkpoint(self, checkpoint_id: str, on_bytes: Callable[[int], object] | None = None) -> dict[str, Any]:
        """Hash every file of one checkpoint and compare with its manifest and its row.

        Args:
            checkpoint_id: which.
            on_bytes: called with the number of bytes after each part that was hashed, for progress bars.

        Returns:
            ``checkpoint_id``, ``verified_at`` (Unix seconds) and what ``verify_folder`` returns.

        Raises:
            CheckpointNotFoundError: there is no such checkpoint.
        """
        where = self._rows.locate(checkpoint_id)
        if where is None:
            raise CheckpointNotFoundError(checkpoint_id, "list_checkpoints() shows those that there are")
        result = verify_folder(*where, on_bytes=on_bytes)
        verified_at = time.time()
        self._outcomes.record(checkpoint_id, result, verified_at)
        return {"checkpoint_id": checkpoint_id, "verified_at": verified_at, **result}

    def verify_experiment_checkpoints(self, experiment_id: str | None = None) -> dict[str, Any]:
        """Verify every checkpoint of an experiment, or of all experiments.

        Returns:
            ``total_checkpoints``, ``verified``, ``failed`` (counts) and ``checkpoint_results``: checkpoint id -> what
            ``verify_checkpoint`` returns.
        """
        return summarise(map(self.verify_checkpoint, self._rows.ids(experiment_id)))


def summarise(results: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the counts over the results of single checkpoints, and the results by id."""
    by_id = {result["checkpoint_id"]: result for result in results}
    verified = sum(result["verified"] for result in by_id.values())
    return {
        "total_checkpoints": len(by_id),
        "verified": verified,
        "failed": len(by_id) - verified,
        "checkpoint_results": by_id,
    }
