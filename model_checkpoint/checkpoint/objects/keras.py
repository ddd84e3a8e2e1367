"""Keras 3: models, layers, metrics, optimizers and seed generators, on whatever backend."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from model_checkpoint.checkpoint.objects import ObjectAdapter
from model_checkpoint.utils.optional import require


class KerasAdapter(ObjectAdapter):
    """Objects with Keras variables.

    A model's have the paths that Keras gives them, such as ``dense/kernel``, but for the numbers that Keras counts up
    with every layer made in the process: those begin anew in each model. Others' have their places only, as in Keras'
    own files.
    """

    def owns(self, value: object) -> bool:
        keras = require("keras", "keras", "saving an object of Keras")  # its own object is here, so it is loaded

        kinds = (keras.Layer, keras.optimizers.Optimizer, keras.metrics.Metric, keras.random.SeedGenerator)
        return isinstance(value, kinds)

    def state_of(self, value: Any) -> object:
        keras = require("keras", "keras", "saving an object of Keras")
        if not getattr(value, "built", True) and isinstance(value, keras.Layer):
            raise ValueError("it is not built, so it has no variables yet; call it on data, or its build(), first")
        variables = _variables(value)
        if not isinstance(value, keras.Layer):
            return [variable.value for variable in variables]
        names = _names(variables, {_snake(type(layer).__name__) for layer in value._flatten_layers()})
        return {name: variable.value for name, variable in zip(names, variables)}

    def put_back(self, value: Any, state: Any) -> object:
        values = state if isinstance(state, list) else [state[name] for name in self.state_of(value)]  # type: ignore[attr-defined]
        for variable, new in zip(_variables(value), values):
            if new is not variable.value:  # it was not filled where it is
                variable.assign(new)
        return value


def _variables(value: Any) -> list[Any]:
    return [value.state] if hasattr(value, "state") and not hasattr(value, "variables") else list(value.variables)


def _snake(name: str) -> str:
    return re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z0-9]+)", r"\1_\2", name)).lower()


def _names(variables: Iterable[Any], classes: set[str]) -> list[str]:
    """Return a name for each variable: its path, with the numbers of automatic names counted from the first of each."""
    counted: dict[str, dict[str, int]] = {}
    names: list[str] = []
    for variable in variables:
        parts = []
        for part in variable.path.split("/"):
            base, _, number = part.rpartition("_")
            base = base if number.isdigit() and base else part
            if base in classes or base == "seed_generator":
                seen = counted.setdefault(base, {})
                number_here = seen.setdefault(part, len(seen))
                part = base if number_here == 0 else f"{base}_{number_here}"
            parts.append(part)
        name = "/".join(parts)
        names.append(name if name not in names else f"{name}#{names.count(name) + 1}")
    return names
