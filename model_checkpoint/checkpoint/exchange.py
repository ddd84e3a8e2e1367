"""Checkpoints of other tools: adopted as ordinary ones, and ordinary ones written for other tools."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from model_checkpoint.arrays import DTYPES, HostArray, adapter_for
from model_checkpoint.checkpoint import foreign
from model_checkpoint.checkpoint.arguments import check_choice, check_flags, integers, label, numbers
from model_checkpoint.checkpoint.calls import SaveCall
from model_checkpoint.checkpoint.comparison import CheckpointComparison
from model_checkpoint.checkpoint.events import payload
from model_checkpoint.checkpoint.foreign.files import can_be_path
from model_checkpoint.checkpoint.foreign.target import format_of, publish
from model_checkpoint.checkpoint.reader import CheckpointReader
from model_checkpoint.checkpoint.state import encode
from model_checkpoint.database.checkpoints import details_of
from model_checkpoint.database.models import CheckpointRecord
from model_checkpoint.errors import ConfigurationError, FormatError, UnsupportedValueError
from model_checkpoint.hooks import HookEvent
from model_checkpoint.utils.jsonable import text, to_jsonable, to_number

log = logging.getLogger(__name__)

_FACTS = ("epoch", "step", "loss", "val_loss", "metrics", "config")
_OPTIONAL: dict[str, Callable[[Any, str], Any]] = {
    "loss": to_number,
    "val_loss": to_number,
    "config": to_jsonable,
    "notes": text,
    "model_name": text,
}
_VALUES = (*_FACTS, "notes", "model_name", "checkpoint_type", "update_best")


class CheckpointExchange(CheckpointComparison):
    """Import and export; ``EnhancedCheckpointManager`` sets it up."""

    save_checkpoint: Callable[..., str]
    _save: Callable[..., None]
    _experiment_to_save: Callable[[str | None], str]
    _take_turn: Callable[[bool], None]
    _after_save: Callable[[str], None]
    _experiments: dict[str, tuple[int, dict[str, Any]]]

    def import_checkpoint(
        self,
        path: str | os.PathLike[str],
        *,
        experiment_id: str | None = None,
        copy: bool = True,
        trust: bool = False,
        **values: Any,
    ) -> str:
        """Adopt a checkpoint that another tool wrote; it is an ordinary one from then on, and durable on return.

        What it is, is decided by its content: a file of ``torch.save`` (a state_dict, a dict of parts, Lightning's
        ``.ckpt``), SafeTensors, or a folder of Hugging Face, of Orbax (a tree, or a step of a CheckpointManager) or of
        PyTorch DCP. What is neither model, optimizer nor scheduler becomes ``extra_state``. The file or folder itself
        is never changed, moved or removed, and links in it that lead elsewhere are not followed.

        Args:
            path: the file or folder.
            experiment_id: whose checkpoint it becomes; the tracker's when None.
            copy: False gives the files a second name in the checkpoint directory (a hard link) in place of a copy, for
                SafeTensors, Hugging Face folders of these and files of ``torch.save``; memory for the arrays is not
                needed then. Both names are one file: if it is changed in place later, its digest tells, and loading
                raises IntegrityError. Tools that write a new file and rename it change nothing here.
            trust: load pickles fully, which runs whatever code they name. Do so only with files from people whom you
                would let run programs as you. Not together with ``copy=False``.
            values: ``epoch``, ``step``, ``loss``, ``val_loss``, ``metrics``, ``config``, ``notes``, ``model_name``,
                ``checkpoint_type`` and ``update_best`` of ``save_checkpoint``. Of the first six, those that are not
                given, or None, are what the file says of itself. The notes end with the name that was imported, and
                what was left out.

        Returns:
            The new checkpoint's id.

        Raises:
            ConfigurationError: nothing is there, it is of no known format, an argument cannot be used, the pickle needs
                ``trust`` (the text names what it asks for), or ``copy=False`` is not possible.
            FormatError: it is damaged, incomplete or not what its format allows.
            UnsupportedValueError: a part has no safe form; the text names its path. Of what Lightning saves besides
                model, optimizers and schedulers, such a part is left out, with a warning that names it.
            MissingDependencyError: its format needs a package (extras ``torch`` and ``orbax``).
            ExperimentNotFoundError, HookVetoError, StorageError, DatabaseError, SaveFailedError: as from
                ``save_checkpoint``. Whatever is raised, nothing is left of the import.
        """
        started = time.perf_counter()
        given = _absolute(path)
        check_flags(copy=copy, trust=trust)
        if trust and not copy:
            raise ConfigurationError("trust=True is for pickles that must be converted; use it with copy=True")
        unknown = sorted(values.keys() - _VALUES)
        if unknown:
            raise ConfigurationError(f"import_checkpoint() takes no {unknown[0]!r}; it takes {', '.join(_VALUES)}")
        experiment_id = self._experiment_to_save(experiment_id)
        found = foreign.read(foreign.Source(os.path.realpath(given), trust, copy))
        if found.left_out:
            log.warning("import of %s: left out %s", *map(_printable, (given, ", ".join(found.left_out))))
        wanted = {name: value for name, value in values.items() if value is not None}
        if "config" not in wanted:
            _check_config(found.config, given)
        values = {**{name: getattr(found, name) for name in _FACTS}, **wanted}
        notes = None if values.get("notes") is None else text(values["notes"], "notes")
        values["notes"] = _notes(notes, os.path.basename(given), found.left_out)
        if not copy:
            return self._adopt(found, experiment_id, values, started)
        states = (found.model, found.optimizer, found.scheduler)
        return self.save_checkpoint(
            *states, **values, extra_state=found.extra, experiment_id=experiment_id, save_rng=False, blocking=True
        )

    def _adopt(self, found: foreign.Foreign, experiment_id: str, values: Mapping[str, Any], started: float) -> str:
        """Do what ``save_checkpoint`` does, with files that there are already."""
        optional: dict[str, Any] = {
            name: None if values.get(name) is None else check(values[name], name) for name, check in _OPTIONAL.items()
        }
        flag = values.get("update_best", True)
        check_flags(update_best=flag)
        epoch, step = integers(epoch=values["epoch"], step=values["step"])
        record = CheckpointRecord(
            id=str(uuid.uuid4()),
            experiment_id=experiment_id,
            checkpoint_type="regular" if values.get("checkpoint_type") is None else label(values["checkpoint_type"]),
            epoch=epoch,
            step=step,
            metrics=numbers(values["metrics"] or {}),
            backend=found.backend,
            created_at=time.time(),
            update_best=bool(flag),
            **optional,
        )
        self._take_turn(False)
        state = encode(found.components())
        if found.backend == "safetensors" and not _named_as_stored(found.model, state.arrays.get("model", {})):
            raise ConfigurationError("a tensor's name is empty, which has no place in a checkpoint; use copy=True")
        self._fire(HookEvent.BEFORE_CHECKPOINT_SAVE, payload(record), record.id, experiment_id)
        self._take_turn(False)  # of a hook, or of another thread
        known = self._experiments[experiment_id][1]
        self._save(SaveCall(record, details_of(record), known, self._integrity, started), state, found.files)
        self._after_save(record.id)
        return record.id

    def export_checkpoint(
        self,
        checkpoint_id: str,
        path: str | os.PathLike[str],
        *,
        format: str | None = None,
        overwrite: bool = False,
    ) -> str:
        """Write a checkpoint for other tools. Every byte is compared with its digest before it is written anew.

        It is written beside ``path``, made durable and renamed: whatever fails, what was there is there still. A folder
        that replaces another changes names with it; where the system cannot do that at once (other than Linux), a kill
        in that moment leaves the old one beside ``path``, as ``.<id>.old``.

        Args:
            checkpoint_id: which.
            path: a new file or folder in a folder that exists.
            format: ``safetensors`` (one file with the model's tensors, their names joined by dots), ``huggingface`` (a
                folder with the same, in shards of at most 5 GB, and ``config.json`` where the config is a dict), or
                ``pt`` (all parts, for ``torch.load(weights_only=True)``; arrays of other libraries become tensors).
                When None, the ending says it: ``.safetensors``, ``.pt``, ``.pth``, or none for a folder.
            overwrite: replace what is at ``path``; a folder only where it holds nothing but such an export.

        Returns:
            The absolute path. Of tensors that are one (tied), SafeTensors files hold the first, and name the others in
            their metadata, as ``safetensors.torch.save_model`` does.

        Raises:
            ConfigurationError: the format cannot be told, ``path`` exists, is in the checkpoint directory or the
                database, or there are no tensors.
            UnsupportedValueError: SafeTensors cannot hold a tensor; the text names it.
            CheckpointNotFoundError, IntegrityError, HookVetoError, SaveFailedError, MissingDependencyError: as from
                ``load_checkpoint``.
            StorageError: the file system refused.
        """
        self._settle()
        target = _absolute(path)
        check_flags(overwrite=overwrite)
        self._refuse_own(target)
        chosen = format_of(target) if format is None else format
        check_choice("format", chosen, foreign.WRITERS)
        wanted = {"model", "optimizer", "scheduler", "extra"} if chosen == "pt" else {"model"}

        def read(reader: CheckpointReader) -> dict[str, Any]:
            return reader.load(wanted)

        def write(made: str) -> None:
            record, components, _ = self._read_chosen(
                checkpoint_id, None, "latest", False, partial(self._read, True, read)
            )
            tensors, ties = ({}, {}) if chosen == "pt" else _tensors(components.get("model"), record.id)
            state = {"components": components, **self._loaded(record, self._flags(record))}
            foreign.writer(chosen)(made, tensors, ties, state)

        publish(target, chosen == "huggingface", overwrite, write)
        return target

    def _refuse_own(self, target: str) -> None:
        """Raise ConfigurationError if ``target`` is a place of the engine's own files."""
        place = os.path.join(os.path.realpath(os.path.dirname(target)), os.path.basename(target))
        folder, database = (os.path.realpath(own) for own in (self._directory.path, self._db.place))
        if os.path.commonpath([folder, place]) == folder or place == database or place.startswith(f"{database}-"):
            raise ConfigurationError(f"{target} is among the engine's own files; choose a path outside {folder}")


def _absolute(path: Any) -> str:
    try:
        given = os.fspath(path)
        if not isinstance(given, str) or not given or not can_be_path(given):
            raise TypeError
    except TypeError:
        raise ConfigurationError(f"path must be the path of a file or folder, not {path!r}") from None
    return os.path.abspath(given)


def _check_config(config: object, path: str) -> None:
    try:
        to_jsonable(config, "config")
    except UnsupportedValueError as error:
        raise FormatError(f"the config that {path} brings cannot be kept; give another with config=: {error}") from None


def _printable(name: str) -> str:
    """Return a file's name as text that can be stored and printed: names may be any bytes."""
    return name.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def _notes(given: str | None, name: str, left_out: tuple[str, ...]) -> str:
    names = [*map(_printable, (name, *left_out))]
    parts = [*([] if given is None else [given]), f"imported from {names[0]}"]
    return "; ".join([*parts, f"left out: {', '.join(names[1:])}"] if left_out else parts)


def _tensors(model: object, checkpoint_id: str) -> tuple[dict[str, HostArray], dict[str, str]]:
    """Return the model's tensors by name, joined with dots, and of those that are tied: name -> name of the first.

    Raises:
        ConfigurationError: there is none.
        UnsupportedValueError: two have one name, or SafeTensors cannot hold one.
    """
    tensors: dict[str, HostArray] = {}
    ties: dict[str, str] = {}
    names: dict[int, str] = {}
    left_out: list[str] = []
    for name, value in _leaves(model, ()):
        adapter = adapter_for(type(value))
        array = None if adapter is None or isinstance(value, (bytes, bytearray)) else adapter.to_host(value)
        if array is None:
            left_out.append(name)
        elif name in tensors or name in ties or not _can_be_named(name):
            raise UnsupportedValueError(name, value, "SafeTensors cannot hold it by this name; use format='pt'")
        elif DTYPES[array.dtype].lanes > 1:
            raise UnsupportedValueError(name, value, f"SafeTensors has no {array.dtype}; use format='pt'")
        elif id(value) in names:
            ties[name] = names[id(value)]
        else:
            tensors[name], names[id(value)] = array, name
    if not tensors:
        raise ConfigurationError(f"checkpoint {checkpoint_id} has no tensors in its model; use format='pt'")
    if left_out:
        log.warning("export of %s: SafeTensors holds tensors only, left out %s", checkpoint_id, ", ".join(left_out))
    return tensors, ties


def _named_as_stored(model: object, arrays: Mapping[str, HostArray]) -> bool:
    """Whether arrays have the names that the files have, where one that is tied has that of the first."""
    first = {id(value): name for name, value in reversed(_leaves(model, ()))}
    return arrays.keys() <= set(first.values())


def _can_be_named(name: str) -> bool:
    return name not in ("", "format", "__metadata__") and name.encode("utf-8", "ignore").decode() == name


def _leaves(value: Any, path: tuple[str, ...]) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in _leaves(item, (*path, str(key)))]
    if isinstance(value, (list, tuple)):
        return [leaf for i, item in enumerate(value) for leaf in _leaves(item, (*path, str(i)))]
    return [(".".join(path), value)]
