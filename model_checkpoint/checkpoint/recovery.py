"""Recovery when a directory is opened: what a crash left half done is finished or undone. Running it twice is harmless.

Bytes are published before their row, and removed after it; so what lies on disk and what the database says can differ
in a few known ways only. ``decide`` names what to do about each, ``recover`` does it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from model_checkpoint.checkpoint.best import flags_taken
from model_checkpoint.checkpoint.directory import CheckpointDirectory
from model_checkpoint.database import EnhancedDatabaseConnection
from model_checkpoint.database.checkpoints import decode_details
from model_checkpoint.database.models import CheckpointRecord, ExperimentRecord
from model_checkpoint.errors import FormatVersionError, IntegrityError, LockTimeoutError
from model_checkpoint.integrity.manifest import Manifest
from model_checkpoint.integrity.verification import read_manifest, verify_folder
from model_checkpoint.utils.jsonable import unescape

log = logging.getLogger(__name__)


@dataclass
class RecoveryReport:
    """What recovery did, by checkpoint id.

    Attributes:
        rolled_forward: published whole without a committed row: committed now.
        discarded: never finished; their staging folders were removed.
        failed: intents of saves that left nothing behind.
        corrupt: committed, but files are missing or of another length; the row says so, nothing was removed.
        buried: deleted on purpose, found where they were; moved to the trash.
        readmitted: in the trash, but unknown to the database; listed there again, to be undeleted or emptied.
        purged: past undoing, found in the trash; removed.
        left_alone: not recognised or not whole; still where they are.
    """

    rolled_forward: list[str] = field(default_factory=list)
    discarded: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)
    buried: list[str] = field(default_factory=list)
    readmitted: list[str] = field(default_factory=list)
    purged: list[str] = field(default_factory=list)
    left_alone: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(vars(self).values())


def decide(
    statuses: Mapping[str, str],
    published: Collection[str],
    staged: Collection[str],
    in_trash: Collection[str],
    buried: Collection[str],
) -> RecoveryReport:
    """Say what to do about each checkpoint, given that no save is under way.

    Args:
        statuses: id -> status of the directory's rows.
        published, staged, in_trash: ids of what lies in those places.
        buried: ids that have a tombstone.

    Returns:
        The plan, in the form of the report; ``rolled_forward`` are candidates that must still prove to be whole.
    """
    return RecoveryReport(
        rolled_forward=[i for i in published if i not in buried and statuses.get(i) not in ("committed", "corrupt")],
        discarded=list(staged),
        failed=[i for i, status in statuses.items() if status == "saving" and i not in published],
        corrupt=[i for i, status in statuses.items() if status == "committed" and i not in published],
        buried=[i for i in published if i in buried],
        purged=[i for i in in_trash if i in buried and i not in statuses],
        readmitted=[i for i in in_trash if i not in buried and i not in statuses],
    )


def recover(
    directory: CheckpointDirectory, db: EnhancedDatabaseConnection, best_metrics: Mapping[str, str]
) -> RecoveryReport | None:
    """Bring directory and database to agree; None when a save of another process is under way, which is left to it."""
    try:
        with directory.exclusive(timeout=0):
            return _recover(directory, db, best_metrics)
    except LockTimeoutError:
        return None


def _recover(
    directory: CheckpointDirectory, db: EnhancedDatabaseConnection, best_metrics: Mapping[str, str]
) -> RecoveryReport:
    rows = db.checkpoints
    statuses = {key: row[0] for key, row in rows.statuses(directory.store_id).items()}
    published = directory.published()
    report = decide(statuses, published, directory.staged(), directory.in_trash(), rows.buried(directory.store_id))
    for checkpoint_id in report.discarded:
        directory.discard_staged(checkpoint_id)
    for checkpoint_id in report.failed:
        rows.fail(checkpoint_id)
    for checkpoint_id in report.buried:
        directory.trash(published[checkpoint_id], checkpoint_id)
    for checkpoint_id in report.purged:
        directory.unlink_trashed(checkpoint_id)
    report.corrupt += _resized(directory, published, rows.file_sizes(directory.store_id))
    for checkpoint_id in report.corrupt:
        rows.mark_corrupt(checkpoint_id)
        log.error(
            "checkpoint %s is corrupt: files are missing or of another length; nothing was removed", checkpoint_id
        )
    _roll_forward(directory, db, best_metrics, published, report)
    _readmit(directory, db, report)
    if report:
        log.info("recovered %s: %s", directory.path, {name: len(ids) for name, ids in vars(report).items() if ids})
    return report


def _resized(
    directory: CheckpointDirectory, published: Mapping[str, str], sizes: Mapping[str, Mapping[str, int]]
) -> list[str]:
    def size(path: str) -> int:
        try:
            return os.stat(path, follow_symlinks=False).st_size
        except FileNotFoundError:
            return -1

    bad = []
    for checkpoint_id, files in sizes.items():
        if checkpoint_id in published:
            folder = directory.folder(published[checkpoint_id], checkpoint_id)
            if any(size(os.path.join(folder, name)) != expected for name, expected in files.items()):
                bad.append(checkpoint_id)
    return bad


def _roll_forward(
    directory: CheckpointDirectory,
    db: EnhancedDatabaseConnection,
    best_metrics: Mapping[str, str],
    published: Mapping[str, str],
    report: RecoveryReport,
) -> None:
    whole: list[tuple[Manifest, str]] = []
    for checkpoint_id in report.rolled_forward:
        folder = directory.folder(published[checkpoint_id], checkpoint_id)
        check = verify_folder(folder)
        found = read_manifest(folder) if check["verified"] else None
        if found is not None and found[0].experiment["id"] == published[checkpoint_id]:
            whole.append(found)
        else:
            report.left_alone.append(checkpoint_id)
            why = check["error"] or "its manifest names another experiment than its folder"
            log.error("checkpoint %s has no row and is not whole, left as it is: %s", checkpoint_id, why)
    for manifest, digest in sorted(whole, key=lambda pair: pair[0].intent):  # in the order in which they were saved
        db.experiments.create(experiment_of(manifest))
        record = record_of(manifest, digest)
        files = [(f.name, f.size, f.sha256) for f in manifest.files]
        db.checkpoints.commit(
            record, directory.store_id, files, lambda record, held: flags_taken(record, held, best_metrics)
        )
    report.rolled_forward = [manifest.checkpoint_id for manifest, _ in whole]


def _readmit(directory: CheckpointDirectory, db: EnhancedDatabaseConnection, report: RecoveryReport) -> None:
    for checkpoint_id in list(report.readmitted):
        try:
            manifest, digest = read_manifest(directory.trash_folder(checkpoint_id))
        except (IntegrityError, FormatVersionError) as error:
            report.readmitted.remove(checkpoint_id)
            report.left_alone.append(checkpoint_id)
            log.error("what lies in the trash as %s is not recognised, left as it is: %s", checkpoint_id, error)
            continue
        files = [(f.name, f.size, f.sha256) for f in manifest.files]
        with db.transaction(durable=True):
            db.experiments.create(experiment_of(manifest))
            db.checkpoints.commit(record_of(manifest, digest), directory.store_id, files, lambda *_: {})
            db.checkpoints.trash(directory.store_id, {checkpoint_id: "found in the trash"}, 0, {})


def experiment_of(manifest: Manifest) -> ExperimentRecord:
    """Return the experiment as the manifest tells of it, for a database that has lost it."""
    told = dict(manifest.experiment)
    return ExperimentRecord(
        **{
            **told,
            "config": unescape(told["config"]),
            "metadata": unescape(told["metadata"]),
            "tags": tuple(told["tags"]),
        },
        status="interrupted",
    )


def record_of(manifest: Manifest, digest: str) -> CheckpointRecord:
    """Return the row of a checkpoint as its manifest tells of it."""
    return CheckpointRecord(
        id=manifest.checkpoint_id,
        experiment_id=manifest.experiment["id"],
        backend=manifest.backend,
        size=manifest.size,
        created_at=manifest.created_at,
        manifest_sha256=digest,
        **decode_details(manifest.values),
    )
