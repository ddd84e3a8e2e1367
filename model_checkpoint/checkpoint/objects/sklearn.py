"""scikit-learn's estimators, in skops' format, which is loaded without running code of unknown classes."""

from __future__ import annotations

import io
import json
import os
import zipfile
from typing import Any

from model_checkpoint.checkpoint.objects import ObjectAdapter, Traits
from model_checkpoint.utils.optional import require

_SCHEMA = "schema.json"


class SklearnAdapter(ObjectAdapter):
    """Estimators, pipelines included. A state is ``{"class": ..., "skops": bytes}``; ``skops.io.loads`` reads it.

    Into an estimator goes what skops knows to be safe, classes of scikit-learn, and those that the estimator itself has
    as a part. Skops asks about scikit-learn's trees, too, because their numbers are used unchecked: that the bytes are
    those that were saved is what their digests are for. Of an estimator that did not change, they are the same bytes.
    """

    def owns(self, value: object) -> bool:
        base = require("sklearn.base", "sklearn", "saving an estimator")  # its own object is here, so it is loaded
        return isinstance(value, base.BaseEstimator)

    def traits(self, value: object) -> Traits:
        return Traits(opaque=True, kind=type(value).__name__)

    def state_of(self, value: object) -> object:
        skops = require("skops.io", "sklearn", "saving a scikit-learn estimator")
        return {"class": type(value).__name__, "skops": _repeatable(skops.dumps(value))}

    def refusal(self, value: Any, state: Any) -> str | None:
        skops = require("skops.io", "sklearn", "loading a scikit-learn estimator")
        own = {f"{type(part).__module__}.{type(part).__qualname__}" for part in (value, *value.get_params().values())}
        names = skops.get_untrusted_types(data=state["skops"])
        unknown = [name for name in names if name not in own and not name.startswith("sklearn.")]
        if not unknown:
            return None
        return (
            f"it holds objects of {', '.join(unknown)}, which skops does not know to be safe; look at them, then use "
            "load_checkpoint() and skops.io.loads(..., trusted=[...])"
        )

    def put_back(self, value: Any, state: Any) -> object:
        skops = require("skops.io", "sklearn", "loading a scikit-learn estimator")
        loaded = skops.loads(state["skops"], trusted=skops.get_untrusted_types(data=state["skops"]))  # see refusal()
        vars(value).clear()
        vars(value).update(vars(loaded))
        return value


def _repeatable(content: bytes) -> bytes:
    """Return a file of skops without what is another each time: addresses, the time of day, memory between fields."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        files = [name for name in old.namelist() if name != _SCHEMA]
        names = {name: f"{number}{os.path.splitext(name)[1]}" for number, name in enumerate(files)}
        for name in files:
            new.writestr(zipfile.ZipInfo(names[name]), _without_padding(old.read(name)))
        schema = _renumbered(json.loads(old.read(_SCHEMA)), names, {})
        new.writestr(zipfile.ZipInfo(_SCHEMA), json.dumps(schema, indent=2))
    return made.getvalue()


def _without_padding(content: bytes) -> bytes:
    """Return an array's file with zeros between its fields, such as those of a tree's nodes, where anything may be."""
    if not content.startswith(b"\x93NUMPY"):
        return content
    import numpy as np  # scikit-learn's own

    array = np.load(io.BytesIO(content), allow_pickle=False)
    if array.dtype.names is None:
        return content
    made, clean = io.BytesIO(), np.zeros(array.shape, array.dtype)
    for name in array.dtype.names:
        clean[name] = array[name]
    np.save(made, clean, allow_pickle=False)
    return made.getvalue()


def _renumbered(node: Any, names: dict[str, str], ids: dict[int, int]) -> Any:
    if isinstance(node, list):
        return [_renumbered(item, names, ids) for item in node]
    if not isinstance(node, dict):
        return node
    made = {key: _renumbered(item, names, ids) for key, item in node.items()}
    if isinstance(node.get("file"), str):
        made["file"] = names[node["file"]]
    if node.get("__loader__") == "JsonNode":
        made.pop("__id__", None)  # whether two equal numbers or texts are one object is Python's to choose
    elif isinstance(node.get("__id__"), int):
        made["__id__"] = ids.setdefault(node["__id__"], len(ids) + 1)  # 0 would be none
    return made
