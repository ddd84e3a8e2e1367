"""Keras 3: models, layers, metrics, optimizers and seed generators, on whatever backend."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from model_checkpoint.checkpoint.objects import ObjectAdapter, Traits
from model_checkpoint.utils.optional import require

_LAYER = "it is not built, so it has no variables yet; call it on data, or its build(), first"
_OPTIMIZER = "it is not built, so it has no slots yet; call its build(model.trainable_variables) first"
_WRAPPERS = ("forward_", "backward_")  # what Bidirectional puts before the name of a layer


class KerasAdapter(ObjectAdapter):
    """Objects with Keras variables.

    A model's have the paths that Keras gives them, such as ``dense/kernel``, but for the numbers that Keras counts up
    with every layer made in the process: those begin anew in each model and layer. Others' have their places only, as
    in Keras' own files. Counters and seeds are stored with 64 bits: how many they have differs between the backends.
    """

    def owns(self, value: object) -> bool:
        keras = require("keras", "keras", "saving an object of Keras")  # its own object is here, so it is loaded

        kinds = (keras.Layer, keras.optimizers.Optimizer, keras.metrics.Metric, keras.random.SeedGenerator)
        return isinstance(value, kinds)

    def traits(self, value: object) -> Traits:
        return Traits(together=not isinstance(value, require("keras", "keras", "loading an object of Keras").Layer))

    def state_of(self, value: Any) -> object:
        keras = require("keras", "keras", "saving an object of Keras")
        if not getattr(value, "built", True) and isinstance(value, (keras.Layer, keras.optimizers.Optimizer)):
            raise ValueError(_LAYER if isinstance(value, keras.Layer) else _OPTIMIZER)
        variables = _variables(value)
        values = [_portable(keras, variable.value) for variable in variables]
        if not isinstance(value, keras.Layer):
            return values
        return dict(zip(_names(variables, {_snake(type(layer).__name__) for layer in value._flatten_layers()}), values))

    def put_back(self, value: Any, state: Any) -> object:
        values = state if isinstance(state, list) else [state[name] for name in self.state_of(value)]  # type: ignore[attr-defined]
        for variable, new in zip(_variables(value), values):
            if new is not variable.value:  # it was not filled where it is
                variable.assign(new)
        return value


def _variables(value: Any) -> list[Any]:
    return [value.state] if hasattr(value, "state") and not hasattr(value, "variables") else list(value.variables)


def _portable(keras: Any, value: Any) -> Any:
    if keras.backend.standardize_dtype(value.dtype) not in ("int32", "uint32", "int64"):
        return value
    return keras.ops.convert_to_numpy(value).astype("int64")


def _snake(name: str) -> str:
    """Return the automatic name of the first layer of a class, as Keras makes it."""
    return re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))).lower()


def _names(variables: Iterable[Any], classes: set[str]) -> list[str]:
    """Return a name for each variable: its path, with the numbers of automatic names counted from the first of each."""
    counted: dict[tuple[str, ...], dict[str, int]] = {}
    used: dict[str, int] = {}
    names: list[str] = []
    for variable in variables:
        path = tuple(variable.path.split("/"))
        parts = [_counted(part, counted.setdefault(path[:i], {}), classes) for i, part in enumerate(path)]
        name = "/".join(parts)
        used[name] = used.get(name, 0) + 1
        names.append(name if used[name] == 1 else f"{name}#{used[name]}")
    return names


def _counted(part: str, seen: dict[str, int], classes: set[str]) -> str:
    """Return a part of a path, numbered by how many of its kind were ``seen`` beside it; noted there is ``part``."""
    base, _, number = part.rpartition("_")
    base = base if number.isdigit() and base else part
    kind = next((base.removeprefix(wrapper) for wrapper in _WRAPPERS if base.startswith(wrapper)), base)
    if kind not in classes and base not in classes and base != "seed_generator":
        return part
    if part not in seen:
        seen[part] = sum(other.rpartition("_")[0] == base or other == base for other in seen)
    return base if seen[part] == 0 else f"{base}_{seen[part]}"
