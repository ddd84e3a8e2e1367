"""Every exception of the engine: one family, each member also the natural builtin and carrying the offending object."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class ModelCheckpointError(Exception):
    """Base of all errors raised by this package. They can be pickled, as a pool of processes does with them."""

    def __reduce__(self) -> tuple[object, ...]:
        file = (self.filename,) if isinstance(self, OSError) and self.filename is not None else ()
        facts = {name: _sendable(value) for name, value in vars(self).items()}
        return _again, (type(self), (*self.args, *file), facts)


def _sendable(value: object) -> object:
    """Return a fact of an error, or its text where it cannot be pickled, as a class within a function cannot."""
    import pickle

    try:
        pickle.dumps(value)
    except Exception:  # noqa: BLE001 - whatever its class raises
        return repr(value)
    return value


def _again(kind: type[ModelCheckpointError], args: tuple[object, ...], facts: dict[str, object]) -> BaseException:
    """Return an error as it was; the constructors of its class take the facts that its text was made of."""
    error = kind.__new__(kind, *args)
    if isinstance(error, OSError):
        OSError.__init__(error, *args)
    else:
        error.args = args
    if isinstance(error, ImportError):
        error.msg = str(args[0])
    vars(error).update(facts)
    return error


class ConfigurationError(ModelCheckpointError, ValueError):
    """An argument that cannot be used; the text names the argument and what it accepts."""


class QueryError(ModelCheckpointError, ValueError):
    """A filter that cannot be understood; ``column`` is where in ``filter`` the problem is, from 0."""

    def __init__(self, problem: str, filter: str, column: int) -> None:
        start = filter.rfind("\n", 0, column) + 1
        line = filter[start:].partition("\n")[0]
        super().__init__(f"{problem}\n  {line}\n  {' ' * (column - start)}^")
        self.filter = filter
        self.column = column


class MissingDependencyError(ModelCheckpointError, ImportError):
    """An optional package is needed for what was asked; the text gives the pip extra."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed; "
            f"install it with: pip install 'model-checkpoint[{extra}]'"
        )
        self.package = package
        self.extra = extra


class UnsupportedValueError(ModelCheckpointError, TypeError):
    """A value that cannot be stored without pickle; ``path`` says where it sits in what was passed."""

    def __init__(self, path: str, value: object, advice: str) -> None:
        kind = type(value)
        super().__init__(f"{path}: cannot store a {kind.__module__}.{kind.__qualname__}; {advice}")
        self.path = path
        self.value_type = kind


class ExperimentNotFoundError(ModelCheckpointError, ValueError):
    """No such experiment in the database, or none was named where one is needed."""


class CheckpointNotFoundError(ModelCheckpointError, ValueError):
    """No such checkpoint; the text always begins with ``Checkpoint not found``."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"Checkpoint not found: {what}; {advice}")
        self.what = what


class UnknownCheckpointTypeError(ModelCheckpointError, ValueError):
    """A checkpoint type that nothing was ever saved under."""

    def __init__(self, checkpoint_type: str, known: Iterable[str]) -> None:
        super().__init__(f"unknown checkpoint type {checkpoint_type!r}; use one of: {', '.join(known)}")
        self.checkpoint_type = checkpoint_type


class UnknownBackendError(ModelCheckpointError, ValueError):
    """A storage backend name that is not registered."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        super().__init__(
            f"unknown storage backend {name!r}; known: {', '.join(sorted(known))}; "
            "add one with register_storage_backend(name, 'module:Class')"
        )
        self.name = name


class IntegrityError(ModelCheckpointError, ValueError):
    """Stored bytes are not the bytes that were saved: a file is missing, resized, changed or not decodable.

    Attributes:
        path: the file concerned.
        expected, actual: what the manifest promises and what is there (SHA-256 hex digests, byte counts or words).
    """

    def __init__(self, path: str, problem: str, expected: object = None, actual: object = None) -> None:
        found = "" if expected is None and actual is None else f" (expected {expected}, found {actual})"
        super().__init__(
            f"{path}: {problem}{found}; nothing was loaded from it. "
            "Load another checkpoint, or restore this file from a copy"
        )
        self.path = path
        self.problem = problem
        self.expected = expected
        self.actual = actual


class FormatError(ModelCheckpointError, ValueError):
    """A file that breaks the rules of its format."""


class StorageError(ModelCheckpointError, OSError):
    """The file system refused an operation; carries ``errno``, ``filename`` and what is still intact."""

    def __init__(self, action: str, path: str, cause: OSError, advice: str) -> None:
        super().__init__(cause.errno, f"could not {action}: {cause.strerror or cause}; {advice}", path)
        self.action = action


class SaveFailedError(ModelCheckpointError, RuntimeError):
    """A save in the background failed; the failure itself is the ``__cause__``.

    That checkpoint does not exist, unless what stopped it came at its commit, as an error of the database, or after it,
    as a KeyboardInterrupt.
    """

    def __init__(self, checkpoint_id: str, cause: BaseException) -> None:
        gone = "that checkpoint does not exist"
        if isinstance(cause, (DatabaseError, MemoryError)) or not isinstance(cause, Exception):
            gone = "that checkpoint exists if list_checkpoints() shows it"
        super().__init__(
            f"the background save of checkpoint {checkpoint_id} failed: {type(cause).__name__}: {cause}; "
            f"{gone}, earlier ones are untouched. Mend the cause and save again"
        )
        self.checkpoint_id = checkpoint_id


class Problem(NamedTuple):
    """A place where a checkpoint does not fit an object.

    Attributes:
        kind: ``missing`` (is there, was not saved), ``unexpected`` (was saved, is not there) or ``mismatched``.
        path: where, such as ``model.encoder.weight``.
        text: path, what was saved and what is there.
    """

    kind: str
    path: str
    text: str


class StateMismatchError(ModelCheckpointError, ValueError):
    """What a checkpoint holds does not fit the objects it was to be loaded into; they were not changed.

    Attributes:
        problems: a line for each place: what was saved there, and what is there.
        missing, unexpected, mismatched: their paths, by kind; see ``Problem``.
    """

    def __init__(self, problems: list[Problem]) -> None:
        shown = "".join(f"\n  {problem.text}" for problem in problems[:20])
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        places = "1 place" if len(problems) == 1 else f"{len(problems)} places"
        super().__init__(
            f"the checkpoint does not fit in {places}; nothing was changed. Make the objects as they were when it was "
            f"saved, or use restore() with rename= or strict='warn', or load_checkpoint():{shown}{more}"
        )
        self.problems = [problem.text for problem in problems]
        self.missing = [problem.path for problem in problems if problem.kind == "missing"]
        self.unexpected = [problem.path for problem in problems if problem.kind == "unexpected"]
        self.mismatched = [problem.path for problem in problems if problem.kind == "mismatched"]


class RestoreFailedError(ModelCheckpointError, RuntimeError):
    """An object raised while it was given its state; those before it have theirs, so all should be made anew.

    Attributes:
        path: the object's, such as ``extra.loader``.
    """

    def __init__(self, path: str, value: object, error: BaseException) -> None:
        super().__init__(
            f"{path}: {type(value).__name__} did not take its state: {type(error).__name__}: {error}. Other objects "
            "may have been changed before; make them anew, or restore them without this one"
        )
        self.path = path


class Preempted(SystemExit):
    """The process ends because a signal asked for it; it was saved first if the signal was met at a safe point.

    Attributes:
        raised: whether there was one in this process; at the interpreter's exit nothing else tells of it.
    """

    raised = False

    def __init__(self, status: int) -> None:
        super().__init__(status)
        Preempted.raised = True


class FormatVersionError(ModelCheckpointError, RuntimeError):
    """A database or checkpoint directory written by a newer version of this package."""

    def __init__(self, what: str, found: int, known: int) -> None:
        super().__init__(
            f"{what} has format version {found}, this package knows versions up to {known}; "
            "nothing was changed. Upgrade model-checkpoint to open it"
        )
        self.found = found
        self.known = known


class DatabaseError(ModelCheckpointError, RuntimeError):
    """The database refused an operation; the driver's own error is the ``__cause__``."""


class LockTimeoutError(ModelCheckpointError, TimeoutError):
    """Another process holds the checkpoint directory's lock and did not let go in time."""


class HookRegistrationError(ModelCheckpointError, ValueError):
    """A hook that cannot be registered; the text names the hook and the argument."""


class HookVetoError(ModelCheckpointError, RuntimeError):
    """A BEFORE hook stopped the operation; nothing was written, read or removed."""

    def __init__(self, hook: str, event: str, reason: object = None, about: str | None = None) -> None:
        of = f" of {about}" if about else ""
        why = f": {reason}" if reason is not None else ""
        super().__init__(f"hook {hook!r} vetoed {event}{of}{why}; the operation was not started")
        self.hook = hook
        self.event = event
        self.reason = reason


class HookTimeoutError(ModelCheckpointError, TimeoutError):
    """A hook took longer than its timeout; whatever it does still, nobody waits for it any more."""

    def __init__(self, timeout: float) -> None:
        super().__init__(f"the handler took longer than its timeout of {timeout:g} s")
        self.timeout = timeout


class NotificationError(ModelCheckpointError, ConnectionError):
    """A message of a hook that did not get through; the text names the host and its answer, and no secret."""


class ClaimLostError(ModelCheckpointError, RuntimeError):
    """A worker's claim of a configuration expired, and another worker has it; what this one did does not count."""

    def __init__(self, grid: str, number: int) -> None:
        super().__init__(
            f"configuration {number} of grid {grid!r} is another worker's now: the claim was not renewed in time. "
            "Give the grid a longer lease"
        )
        self.grid = grid
        self.number = number
