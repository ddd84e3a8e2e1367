"""Orbax: a folder of TensorStore arrays, or a step of a CheckpointManager, whose items are such folders or JSON."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

from model_checkpoint.checkpoint.foreign.files import check_told, read_json, refuse_links
from model_checkpoint.checkpoint.foreign.parts import Foreign, Source, sort_parts
from model_checkpoint.errors import ConfigurationError, FormatError
from model_checkpoint.utils.optional import require

_TREE_MARKS = ("_METADATA", "manifest.ocdbt", "_sharding")


def read(source: Source) -> Foreign:
    """Read the arrays into NumPy's, wherever they were; a step with one item is that item."""
    if not source.copy:
        raise ConfigurationError(f"{source.path} is an Orbax checkpoint, which must be converted; use copy=True")
    ocp = require("orbax.checkpoint", "orbax", "importing an Orbax checkpoint")
    if ".orbax-checkpoint-tmp" in os.path.basename(source.path):
        raise FormatError(f"{source.path} was never finished; import another step")
    refuse_links(source.path)
    try:
        content = _content(ocp, source.path)
    except (FormatError, ConfigurationError):
        raise
    except Exception as error:  # orbax and TensorStore raise whatever they like
        raise FormatError(f"{source.path} is no whole Orbax checkpoint: {error!s:.1000}") from error
    if isinstance(content, Mapping) and "params" in content and "opt_state" in content:  # Flax's TrainState
        content = {**content, "optimizer": content["opt_state"]}
        del content["opt_state"]
        return sort_parts(content, ("params",))
    return sort_parts(content)


def _content(ocp: Any, folder: str) -> Any:
    if _is_tree(folder):
        return _tree(ocp, folder)
    items: dict[str, Any] = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if not entry.is_dir():
            continue
        text = os.path.join(entry.path, "metadata")  # what JsonCheckpointHandler writes
        if _is_tree(entry.path):
            items[entry.name] = _tree(ocp, entry.path)
        elif os.path.isfile(text):
            items[entry.name] = read_json(text)
        elif entry.name != "metrics":
            raise FormatError(f"{entry.path} is neither a tree of arrays nor JSON; remove that item, or restore it")
    trees = [name for name in ("default", "state", *items) if name in items]
    if not trees:
        raise FormatError(f"{folder} holds no item of Orbax; give the folder of one step")
    return items[trees[0]] if len(items) == 1 else _joined(items)


def _joined(items: dict[str, Any]) -> dict[str, Any]:
    """Return the items of a step as one dict: what ``state`` or ``default`` holds, and the others by their names."""
    main = next((items[name] for name in ("default", "state") if isinstance(items.get(name), dict)), None)
    if main is None or main.keys() & items.keys():
        return items
    return {**main, **{name: item for name, item in items.items() if item is not main}}


def _is_tree(folder: str) -> bool:
    return any(os.path.exists(os.path.join(folder, mark)) for mark in _TREE_MARKS)


def _tree(ocp: Any, folder: str) -> Any:
    import jax
    import numpy as np

    with ocp.PyTreeCheckpointer() as checkpointer:
        described = checkpointer.metadata(folder)
        tree = getattr(described, "item_metadata", described)
        tree = getattr(tree, "tree", tree)
        _check_sizes(folder, jax.tree.leaves(tree))
        wanted = jax.tree.map(lambda leaf: _restore_args(ocp, np, leaf), tree)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of shardings, which host memory has none of
            return checkpointer.restore(folder, restore_args=wanted)


def _restore_args(ocp: Any, np: Any, leaf: Any) -> Any:
    """Ask for arrays in host memory: the devices that they were saved from need not be here. Plain numbers stay so."""
    is_array = isinstance(leaf, ocp.metadata.ArrayMetadata)
    if is_array and not isinstance(leaf, ocp.metadata.ScalarMetadata):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.RestoreArgs()


def _check_sizes(folder: str, leaves: list[Any]) -> None:
    stored = sum(os.path.getsize(os.path.join(place, name)) for place, _, names in os.walk(folder) for name in names)
    told = 0
    for leaf in leaves:
        size = getattr(getattr(leaf, "dtype", None), "itemsize", 0)
        for length in getattr(leaf, "shape", None) or ():
            size *= length
        told += size
    check_told(folder, told, stored)
