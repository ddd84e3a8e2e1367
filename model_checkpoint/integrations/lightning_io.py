"""Lightning's checkpoints through a manager: how they are stored, and a ``CheckpointIO`` of them."""

from __future__ import annotations

import json
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from model_checkpoint.checkpoint.enhanced_manager import EnhancedCheckpointManager
from model_checkpoint.errors import CheckpointNotFoundError, ConfigurationError, FormatError, StorageError
from model_checkpoint.utils.jsonable import to_number
from model_checkpoint.utils.optional import require

_OLD_NAME = "pytorch_lightning" in sys.modules and "lightning" not in sys.modules
_NAME = "pytorch_lightning" if _OLD_NAME else "lightning.pytorch"
lightning: Any = require(_NAME, "lightning", "training with Lightning")
_CheckpointIO: Any = lightning.plugins.CheckpointIO

log = logging.getLogger(__name__)

_PARTS = {"model": "state_dict", "optimizer": "optimizer_states", "scheduler": "lr_schedulers"}  # ours -> Lightning's
_HYPERPARAMETERS = ("hyper_parameters", "datamodule_hyper_parameters")


class ManagerCheckpointIO(_CheckpointIO):  # type: ignore[misc]
    """Lets Lightning's ``ModelCheckpoint``, ``Trainer.save_checkpoint`` and ``ckpt_path`` use a manager, unpickled.

    At the path that Lightning gives there is a small JSON file that names the checkpoint. What Lightning keeps is
    pinned, so that the manager's retention lets it be, and removed when Lightning removes it; the file may be moved.

    Args:
        manager: saves and loads; it must have a tracker.
    """

    def __init__(self, manager: EnhancedCheckpointManager) -> None:
        super().__init__()
        self._manager = manager

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save it, and then write the file at ``path`` that names it.

        Raises:
            ConfigurationError: ``storage_options`` are given: there are none.
            UnsupportedValueError: a value would need pickle; the text names its path.
            And what ``save_checkpoint`` of the manager raises.
        """
        if storage_options is not None:
            raise ConfigurationError("storage_options are not known here; the manager decides how it stores")
        path = Path(path)
        earlier = _named_at(path) if path.is_file() else None
        found = [state for state in checkpoint.get("callbacks", {}).values() if state.get("monitor") is not None]
        scores = {state["monitor"]: state.get("current_score") for state in found}
        metrics = {name: to_number(value, name) for name, value in scores.items() if value is not None}
        numbers = {"epoch": checkpoint["epoch"], "step": checkpoint["global_step"], "metrics": metrics}
        made = store(self._manager, checkpoint, blocking=True, **numbers)
        self._manager.pin(made)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f".{path.name}.{made}")
            with open(beside, "w") as file:
                json.dump({"checkpoint_id": made}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except OSError as error:
            advice = f"checkpoint {made}, which it should name, is saved"
            raise StorageError("write", str(path), error, advice) from error
        if earlier is not None:
            self._delete(earlier)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Return the checkpoint as Lightning gave it, in host memory; ``weights_only`` makes no difference.

        Raises:
            CheckpointNotFoundError: there is no such file.
            FormatError: it is none of this class; and what ``load_checkpoint`` of the manager raises.
        """
        return assembled(self._manager.load_checkpoint(_named_at(Path(path))))

    def remove_checkpoint(self, path: Any) -> None:
        """Remove the file and the checkpoint that it names; nothing happens where there is none."""
        path = Path(path)
        if path.is_file():
            named = _named_at(path)
            path.unlink()
            self._delete(named)

    def _delete(self, checkpoint_id: str) -> None:
        try:
            self._manager.unpin(checkpoint_id)
            self._manager.delete_checkpoint(checkpoint_id)
        except CheckpointNotFoundError:
            log.info("checkpoint %s, which Lightning does not want any more, is gone already", checkpoint_id)


def store(manager: EnhancedCheckpointManager, checkpoint: Mapping[str, Any], **known: Any) -> str:
    """Save what Lightning's ``dump_checkpoint`` returned; ``known`` are further arguments of ``save_checkpoint``."""
    rest = {name: value for name, value in checkpoint.items() if name not in (*_PARTS.values(), "hparams_type")}
    rest.update({name: _plain(rest[name]) for name in _HYPERPARAMETERS if name in rest})
    parts: dict[str, Any] = {ours: checkpoint.get(name) for ours, name in _PARTS.items()}
    return manager.save_checkpoint(**parts, extra_state=rest, save_rng=False, **known)


def _plain(value: Any) -> Any:
    """Return hyperparameters as they can be stored: paths as text, namespaces and OmegaConf's as dicts and lists."""
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, tuple)):
        return [_plain(part) for part in value]
    return value


def assembled(loaded: Mapping[str, Any]) -> dict[str, Any]:
    """Return it as Lightning gave it, of what ``load_checkpoint`` returned."""
    parts = {name: loaded[f"{ours}_state_dict"] for ours, name in _PARTS.items()}
    return {**loaded["extra_state"], **{name: part for name, part in parts.items() if part is not None}}


def _named_at(path: Path) -> str:
    if not path.is_file():
        raise CheckpointNotFoundError(str(path), "there is no such file; list_checkpoints() shows what the manager has")
    try:
        return str(json.loads(path.read_bytes())["checkpoint_id"])
    except (ValueError, TypeError, KeyError) as error:
        raise FormatError(
            f"{path} does not name a checkpoint; load it with Lightning's own TorchCheckpointIO"
        ) from error
