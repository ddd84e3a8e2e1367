"""Recovery when a directory is opened: what a crash left half done is finished or undone. Running it twice is harmless.

Bytes are published before their row, and removed after it; so what lies on disk and what the database says can differ
in a few known ways only. ``decide`` names what to do about each, ``recover`` does it.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

from model_checkpoint.checkpoint.best import elect, flags_taken
from model_checkpoint.checkpoint.directory import CheckpointDirectory
from model_checkpoint.database import EnhancedDatabaseConnection
from model_checkpoint.database.checkpoints import Decide
from model_checkpoint.database.models import CheckpointRecord, ExperimentRecord, decode_details
from model_checkpoint.errors import DatabaseError, FormatVersionError, IntegrityError, LockTimeoutError
from model_checkpoint.integrity.manifest import FILE_NAME, Manifest
from model_checkpoint.integrity.verification import read_manifest, verify_folder
from model_checkpoint.utils.jsonable import unescape

log = logging.getLogger(__name__)

# What comes of a manifest that somebody else has sealed, and what is said then.
_NEVER_SAVED = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, DatabaseError)
_STRANGE = "the manifest of checkpoint %s holds what was never saved: %s"
_PATIENCE = 10.0  # seconds that ``rebuild`` waits for saves of other processes


@dataclass
class RecoveryReport:
    """What recovery did, by checkpoint id.

    Attributes:
        rolled_forward: published whole without a committed row: committed now; pinned if it had been deleted before.
        adopted: the database had them in a directory where they are no longer, or that had lost its ``.engine``.
        copies: the database has them in another directory, where they still are, or deleted; left as they are.
        discarded: never finished; their staging folders were removed.
        failed: saves that were begun and left nothing behind.
        corrupt: committed, but files are missing or of another length; the row says so, nothing was removed.
        buried: deleted on purpose, found where they were; moved to the trash.
        readmitted: in the trash, but unknown to the database; listed there again, to be undeleted or emptied.
        purged: past undoing, found in the trash; removed.
        left_alone: not recognised or not whole; still where they are.
        corrected: their rows did not say what their manifests say (``rebuild`` only).
    """

    rolled_forward: list[str] = field(default_factory=list)
    adopted: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    discarded: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)
    buried: list[str] = field(default_factory=list)
    readmitted: list[str] = field(default_factory=list)
    purged: list[str] = field(default_factory=list)
    left_alone: list[str] = field(default_factory=list)
    corrected: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(vars(self).values())


def decide(
    statuses: Mapping[str, str],
    published: Collection[str],
    staged: Collection[str],
    in_trash: Collection[str],
    purged: Collection[str],
) -> RecoveryReport:
    """Say what to do about each checkpoint, given that no save is under way.

    Args:
        statuses: id -> status of the directory's rows.
        published, staged, in_trash: ids of what lies in those places.
        purged: ids whose tombstones say that they were removed for good.

    Returns:
        The plan, in the form of the report; ``rolled_forward`` are candidates that must still prove to be whole.
    """
    return RecoveryReport(
        rolled_forward=[i for i in published if statuses.get(i) not in ("committed", "corrupt", "trashed")],
        discarded=list(staged),
        failed=[i for i, status in statuses.items() if status == "saving" and i not in published],
        corrupt=[i for i, status in statuses.items() if status == "committed" and i not in published],
        buried=[i for i in published if statuses.get(i) == "trashed" and i not in in_trash],
        purged=[i for i in in_trash if i in purged and i not in statuses],
        readmitted=[i for i in in_trash if i not in purged and i not in statuses and i not in published],
        left_alone=[i for i in published if statuses.get(i) == "trashed" and i in in_trash],
    )


def recover(
    directory: CheckpointDirectory, db: EnhancedDatabaseConnection, best_metrics: Mapping[str, str]
) -> RecoveryReport | None:
    """Introduce directory and database to each other, and bring them to agree.

    Returns:
        What was done; None when a save of another process is under way, to which recovery is left.
    """
    known_at = db.stores.path(directory.store_id)
    if known_at is not None:
        directory.be_distinct_from(known_at)
    db.stores.open(directory.store_id, directory.path)
    try:
        with directory.exclusive(timeout=0):
            return _recover(directory, db, best_metrics)
    except LockTimeoutError:
        with directory.shared():  # granted beside saves and loads at once; a recovery elsewhere is waited for
            log.info("recovery of %s was left to another manager, which is using it", directory.path)
        return None
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES):
            raise
        log.warning("%s cannot be written, so nothing was recovered; what is whole there can be loaded", directory.path)
        return None


def _recover(
    directory: CheckpointDirectory, db: EnhancedDatabaseConnection, best_metrics: Mapping[str, str]
) -> RecoveryReport:
    store, rows, graves = directory.store_id, db.checkpoints, db.tombstones
    found = rows.statuses(store)
    published, strangers = _placed(directory, {key: experiment for key, (_, experiment, _) in found.items()})
    statuses = {key: status for key, (status, *_) in found.items()}
    report = decide(statuses, published, directory.staged(), directory.in_trash(), graves.purged(store))
    report.left_alone += strangers
    _roll_forward(directory, db, best_metrics, published, report)  # before anything that must write to the directory
    for checkpoint_id in report.discarded:
        directory.discard_staged(checkpoint_id)
    for checkpoint_id in report.failed:
        rows.fail(checkpoint_id)
    for checkpoint_id in report.buried:
        directory.trash(published[checkpoint_id], checkpoint_id)
    for checkpoint_id in report.purged:
        directory.unlink_trashed(checkpoint_id)
    report.corrupt += _damaged(directory, published, rows.file_sizes(store))
    for checkpoint_id in report.corrupt:
        problem = f"checkpoint {checkpoint_id} is corrupt: a file is missing or of another length; nothing was removed"
        db.verifications.record(checkpoint_id, {"verified": False, "error": problem, "files": []}, time.time())
        log.error("%s", problem)
    _readmit(directory, db, report)
    if report.copies:
        log.warning(
            "%d checkpoints in %s are copies of what the database has elsewhere; to use them here, give this "
            "directory a database of its own: database_url='sqlite:///...'",
            len(report.copies),
            directory.path,
        )
    if report:
        log.info("recovered %s: %s", directory.path, {name: len(ids) for name, ids in vars(report).items() if ids})
    return report


def _placed(directory: CheckpointDirectory, experiments: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return checkpoint id -> experiment id of the published folders, and the ids of those in the wrong place.

    Args:
        directory: where to look.
        experiments: checkpoint id -> experiment id, as the rows have it; the manifest tells where there is no row.
    """
    placed, strangers = {}, []
    for experiment_id, checkpoint_id in directory.published():
        expected, problem = experiments.get(checkpoint_id), "it was saved to another experiment"
        if expected is None:
            try:
                manifest, _ = read_manifest(directory.folder(experiment_id, checkpoint_id))
                expected = manifest.experiment["id"]
            except (IntegrityError, FormatVersionError) as error:
                problem = str(error)
        if expected == experiment_id:
            placed[checkpoint_id] = experiment_id
        else:
            strangers.append(checkpoint_id)
            log.error("checkpoint %s in %s, left as it is: %s", checkpoint_id, experiment_id, problem)
    return placed, strangers


def _damaged(
    directory: CheckpointDirectory, published: Mapping[str, str], sizes: Mapping[str, Mapping[str, int]]
) -> list[str]:
    """Return the committed checkpoints of which a file is missing or of another length; digests are for loading."""

    def size(folder: str, name: str) -> int:
        try:
            return os.stat(os.path.join(folder, name), follow_symlinks=False).st_size
        except (OSError, ValueError, TypeError):  # of a damaged row: a NUL in it, or a number
            return -1

    bad = []
    for checkpoint_id, files in sizes.items():
        if checkpoint_id in published:
            folder = directory.folder(published[checkpoint_id], checkpoint_id)
            if any(size(folder, name) != expected for name, expected in files.items()) or size(folder, FILE_NAME) <= 0:
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
    buried = db.tombstones.buried(directory.store_id)
    for checkpoint_id in report.rolled_forward:
        folder = directory.folder(published[checkpoint_id], checkpoint_id)
        home = db.checkpoints.home(checkpoint_id)
        if home is not None and home[0] != directory.store_id:
            if home[2] == "trashed" or (home[1] != folder and os.path.isdir(home[1])):
                report.copies.append(checkpoint_id)
                continue
            if db.checkpoints.adopt(checkpoint_id, directory.store_id):
                report.adopted.append(checkpoint_id)
                continue
        check = verify_folder(folder)
        if check["verified"]:
            whole.append(read_manifest(folder))
        else:
            report.left_alone.append(checkpoint_id)
            log.error("checkpoint %s has no row and is not whole, left as it is: %s", checkpoint_id, check["error"])
    report.rolled_forward = []
    decide_best = partial(flags_taken, overrides=best_metrics)
    for manifest, digest in sorted(whole, key=lambda pair: pair[0].sequence):  # in the order in which they were saved
        admitted = _admit(directory, db, manifest, digest, decide_best)
        (report.rolled_forward if admitted else report.left_alone).append(manifest.checkpoint_id)
        if admitted and manifest.checkpoint_id in buried:
            # Its row was purged, after its folder had been moved away: somebody has put it back on purpose.
            db.tombstones.remove(directory.store_id, manifest.checkpoint_id)
            db.checkpoints.set_pinned(manifest.checkpoint_id, True)
    for manifest, _ in whole:
        db.experiments.set_parent(manifest.experiment["id"], manifest.experiment["parent_id"])


def rebuild(
    directory: CheckpointDirectory, db: EnhancedDatabaseConnection, best_metrics: Mapping[str, str]
) -> RecoveryReport:
    """Recover, then make every row of the directory say what its manifest says.

    Raises:
        LockTimeoutError: saves of other processes kept the directory busy.
    """
    rows, store = db.checkpoints, directory.store_id
    db.stores.open(store, directory.path)
    with directory.exclusive(_PATIENCE):
        known = rows.statuses(store)
        experiments = {experiment_id for _, experiment_id, _ in known.values()}
        corrected, corrupt, skipped = [], [], []
        for experiment_id, checkpoint_id in directory.published():
            status = known.get(checkpoint_id, ("trashed",))[0]  # without a row: recovery makes one, or says why not
            check = verify_folder(directory.folder(experiment_id, checkpoint_id)) if status != "trashed" else {}
            if not check or not check["verified"]:
                corrupt += [checkpoint_id] if check and status in ("committed", "corrupt") else []
                continue
            manifest, digest = read_manifest(directory.folder(experiment_id, checkpoint_id))
            if manifest.experiment["id"] != experiment_id:
                continue  # a copy in the wrong place: recovery says so
            files = [(f.name, f.size, f.sha256) for f in manifest.files]
            try:
                db.experiments.create(experiment_of(manifest))
                if rows.correct(record_of(manifest, digest), files, manifest.sequence):
                    corrected.append(checkpoint_id)
            except _NEVER_SAVED as error:
                log.error(_STRANGE, checkpoint_id, error)
                skipped.append(checkpoint_id)
                continue
            experiments.add(experiment_id)
            db.verifications.record(checkpoint_id, check, time.time())
        report = _recover(directory, db, best_metrics)
        report.corrected = corrected
        report.left_alone += [i for i in skipped if i not in report.left_alone]
        for checkpoint_id in set(corrupt) - set(report.corrupt):
            problem = f"checkpoint {checkpoint_id} is corrupt, nothing was removed"
            db.verifications.record(checkpoint_id, {"verified": False, "error": problem, "files": []}, time.time())
            report.corrupt.append(checkpoint_id)
        for experiment_id in experiments:
            with db.transaction(durable=True):
                rows.replace_holders(experiment_id, elect(rows.of_experiment(experiment_id), best_metrics))
        return report


def _admit(
    directory: CheckpointDirectory, db: EnhancedDatabaseConnection, manifest: Manifest, digest: str, decide_best: Decide
) -> bool:
    """Make row and experiment from a manifest; returns whether the database could take what it says."""
    try:
        record = record_of(manifest, digest)
        files = [(f.name, f.size, f.sha256) for f in manifest.files]
        with db.transaction(durable=True):
            db.experiments.create(experiment_of(manifest))
            db.checkpoints.commit(record, directory.store_id, files, decide_best, sequence=manifest.sequence)
        return True
    except _NEVER_SAVED as error:
        log.error(_STRANGE, manifest.checkpoint_id, error)
        return False


def _readmit(directory: CheckpointDirectory, db: EnhancedDatabaseConnection, report: RecoveryReport) -> None:
    for checkpoint_id in list(report.readmitted):
        try:
            manifest, digest = read_manifest(directory.trash_folder(checkpoint_id))
            home = db.checkpoints.home(checkpoint_id)
            if home is not None and db.stores.path(home[0]) is not None:
                report.readmitted.remove(checkpoint_id)
                report.copies.append(checkpoint_id)
                continue  # the trash of a directory that was copied: the original's row is not ours to change
            if home is not None:
                db.checkpoints.adopt(checkpoint_id, directory.store_id)  # its row names a directory that there is not
            known = _admit(directory, db, manifest, digest, lambda record, held, younger: {})
        except (IntegrityError, FormatVersionError) as error:
            log.error("%s", error)
            known = False
        if known:
            db.tombstones.add(directory.store_id, {checkpoint_id: "found in the trash"}, 0, {})
        else:
            report.readmitted.remove(checkpoint_id)
            report.left_alone.append(checkpoint_id)


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
