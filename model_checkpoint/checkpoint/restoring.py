"""From a checkpoint into objects that exist: ``restore`` and ``load_into``, readable here from top to bottom."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from model_checkpoint.checkpoint.arguments import check_choice, check_flags
from model_checkpoint.checkpoint.best import elect
from model_checkpoint.checkpoint.inplace import put_into
from model_checkpoint.checkpoint.loading import CheckpointLoading
from model_checkpoint.checkpoint.reader import CheckpointReader
from model_checkpoint.checkpoint.renaming import check_rules
from model_checkpoint.checkpoint.rng import Setter, setters
from model_checkpoint.database.models import CheckpointRecord
from model_checkpoint.errors import ConfigurationError, Problem

log = logging.getLogger(__name__)

_SHOWN = 20  # problems that a warning lists


class CheckpointRestoring(CheckpointLoading):
    """Restoring; ``EnhancedCheckpointManager`` sets it up."""

    def restore(  # noqa: PLR0913 - objects, which checkpoint, and how: each is asked for by name
        self,
        model: object = None,
        optimizer: object = None,
        scheduler: object = None,
        extra_state: object = None,
        checkpoint_id: str | None = None,
        experiment_id: str | None = None,
        checkpoint_type: str = "latest",
        *,
        strict: str = "error",
        rename: Mapping[Any, str] | None = None,
        restore_rng: bool = True,
        verify_integrity: bool = True,
        on_corruption: str = "raise",
    ) -> dict[str, Any]:
        """Put a checkpoint into objects that exist, so that training goes on as if it had never stopped.

        Before anything is changed, keys, shapes and dtypes are compared and every byte is verified. Objects are those
        that were given to ``save_checkpoint`` under the same names, or new ones like them: anything with
        ``state_dict()`` and ``load_state_dict()`` or ``get_state()`` and ``set_state()``, modules and optimizers of
        PyTorch, Keras, Flax and TensorFlow, estimators of scikit-learn and XGBoost, random generators, or nested dicts,
        lists and tuples of such objects, arrays and plain values. ``torch.compile`` and DDP make no difference.

        Args:
            model, optimizer, scheduler, extra_state: what to restore; None leaves it out. Arrays in host memory in C
                order are filled in their place, without a second copy of the state. What cannot be changed, such as
                JAX arrays, named tuples and other pytrees, is made anew in the same classes and on the same devices:
                take it from the result, or where it lies in a dict or list, from there.
            checkpoint_id, experiment_id, checkpoint_type: which checkpoint, as for ``load_checkpoint``.
            strict: what happens when something does not fit. ``error`` raises and changes nothing; ``warn`` logs it and
                ``skip`` does not, and both restore the rest. An optimizer, or what else is no module, of which a part
                does not fit stays as it is.
            rename: names in the checkpoint -> names in the objects, where they differ, such as ``{"model.encoder.*":
                "model.backbone.*"}``; each ``*`` stands for any text. Keys may be compiled regular expressions, which
                are replaced as by ``re.sub``. Names are those of ``keys`` in ``load_checkpoint``; they may lead from
                one component to another, such as ``{"extra.average.*": "model.*"}``.
            restore_rng: whether to put back the random states of Python, NumPy, PyTorch and TensorFlow, as far as they
                were saved and the library is imported.
            verify_integrity: False compares lengths only.
            on_corruption: ``raise`` or ``fallback``, as for ``load_checkpoint``.

        Returns:
            What ``load_checkpoint`` returns, without the states, and ``model``, ``optimizer``, ``scheduler`` and
            ``extra_state``: the objects that were given, or what was made in their place; ``best``: criterion -> the
            best value of this run up to this checkpoint; ``report``: a dict of ``missing`` and ``unexpected`` (paths),
            ``mismatched`` (lines with both shapes) and ``renamed`` (old -> new path).

        Raises:
            StateMismatchError: with ``strict="error"``, something does not fit; its text lists missing, unexpected and
                mis-shaped keys with both shapes. Nothing was changed.
            ConfigurationError: no object is given, or an argument cannot be used. Nothing was changed.
            ExperimentNotFoundError, CheckpointNotFoundError, UnknownCheckpointTypeError, IntegrityError, HookVetoError,
            MissingDependencyError, SaveFailedError: as from ``load_checkpoint``. Nothing was changed.
            RestoreFailedError: an object raised while it was given its state; others have theirs.
            StorageError: the disk failed. If it does so after the verification, the objects are filled in part.
        """
        check_choice("strict", strict, ("error", "warn", "skip"))
        check_choice("on_corruption", on_corruption, ("raise", "fallback"))
        check_flags(verify_integrity=verify_integrity, restore_rng=restore_rng)
        rules = check_rules(rename)
        targets = _given(model=model, optimizer=optimizer, scheduler=scheduler, extra=extra_state)
        random: list[Setter] = []

        def read(reader: CheckpointReader) -> Any:
            with reader.decoding():
                random[:] = setters(reader.tree().get("rng")) if restore_rng else []
            return put_into(reader, targets, self._threads, in_place=False, lenient=strict != "error", rules=rules)

        which = (checkpoint_id, experiment_id, checkpoint_type)
        record, restored, told = self._put(which, read, verify_integrity, on_corruption == "fallback")
        for put_back in random:  # last: objects may draw numbers when they are given their state
            put_back()
        if restored.problems and strict == "warn":
            log.warning("%s was restored in part: %s", record.id, _listed(restored.problems))
        return {
            **{name: restored.objects.get(name) for name in ("model", "optimizer", "scheduler")},
            "extra_state": restored.objects.get("extra"),
            **told,
            "best": self._best_until(record),
            "report": _report(restored.problems, restored.renamed),
        }

    def load_into(
        self,
        model: object = None,
        optimizer: object = None,
        scheduler: object = None,
        checkpoint_id: str | None = None,
        experiment_id: str | None = None,
        checkpoint_type: str = "latest",
        verify_integrity: bool = True,
    ) -> dict[str, Any]:
        """Load a checkpoint into memory that exists: ``restore`` for arrays that can be changed, and nothing besides.

        No random state is touched, and what could only be made anew is refused, but where it lies in a dict or list.

        Args:
            model, optimizer, scheduler: what to fill, as for ``restore``; None leaves it out.
            checkpoint_id, experiment_id, checkpoint_type: which checkpoint, as for ``load_checkpoint``.
            verify_integrity: False compares lengths only.

        Returns:
            What ``load_checkpoint`` returns, without the states.

        Raises:
            StateMismatchError: the objects are not as they were when it was saved, or cannot be changed; the text says
                where. Nothing was changed.
            And all else that ``restore`` raises.
        """
        check_flags(verify_integrity=verify_integrity)
        targets = _given(model=model, optimizer=optimizer, scheduler=scheduler)

        def read(reader: CheckpointReader) -> Any:
            return put_into(reader, targets, self._threads, in_place=True)

        return self._put((checkpoint_id, experiment_id, checkpoint_type), read, verify_integrity, False)[2]

    def _put(
        self, which: tuple[str | None, str | None, str], read: Any, verify: bool, fall_back: bool
    ) -> tuple[CheckpointRecord, Any, dict[str, Any]]:
        """Return the checkpoint, what ``read`` returned of it, and its values."""
        started = time.perf_counter()
        self._settle()
        checkpoint_id, experiment_id, checkpoint_type = which
        wanted = self._experiment_to_load(checkpoint_id, experiment_id)
        reading = partial(self._read, verify and self._integrity, read)
        record, made, refused = self._read_chosen(checkpoint_id, wanted, checkpoint_type, fall_back, reading)
        self._tally.count(record.experiment_id, loads=1, load_seconds=time.perf_counter() - started)
        told = self._flags(record)
        if refused:
            told["fallback_from"] = list(refused)
        return record, made, self._loaded(record, told)

    def _best_until(self, record: CheckpointRecord) -> dict[str, float]:
        records = self._db.checkpoints.records(self._directory.store_id, record.experiment_id)
        before = [r for r in records if r.status == "committed" and (r.sequence or 0) <= (record.sequence or 0)]
        return {
            criterion.removeprefix("metrics."): value
            for criterion, (_, value) in elect(before, self._best_metrics).items()
        }


def _given(**objects: object) -> dict[str, object]:
    targets = {name: target for name, target in objects.items() if target is not None}
    if not targets:
        raise ConfigurationError("there is nothing to load into; pass a model, optimizer or scheduler")
    return targets


def _listed(problems: list[Problem]) -> str:
    more = f"; ... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "; ".join(problem.text for problem in problems[:_SHOWN]) + more


def _report(problems: list[Problem], renamed: dict[str, str]) -> dict[str, Any]:
    return {
        "missing": [problem.path for problem in problems if problem.kind == "missing"],
        "unexpected": [problem.path for problem in problems if problem.kind == "unexpected"],
        "mismatched": [problem.text for problem in problems if problem.kind == "mismatched"],
        "renamed": renamed,
    }
