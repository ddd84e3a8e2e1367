"""Flax NNX: modules, optimizers, metrics and random streams, which are changed in place."""

from __future__ import annotations

from typing import Any

from model_checkpoint.checkpoint.objects import ObjectAdapter, Traits
from model_checkpoint.utils.optional import require


class FlaxAdapter(ObjectAdapter):
    """Objects of ``flax.nnx``; Linen's states are pytrees."""

    def owns(self, value: object) -> bool:
        nnx = require("flax.nnx", "flax", "saving an object of Flax")  # its own object is here, so it is loaded

        return isinstance(value, getattr(nnx, "Pytree", nnx.Object)) and not isinstance(value, nnx.State)

    def traits(self, value: object) -> Traits:
        nnx = require("flax.nnx", "flax", "loading an object of Flax")
        return Traits(together=isinstance(value, nnx.Optimizer))

    def state_of(self, value: object) -> object:
        nnx = require("flax.nnx", "flax", "saving an object of Flax")
        return _pure(nnx, nnx.state(value))

    def put_back(self, value: object, state: Any) -> object:
        nnx = require("flax.nnx", "flax", "loading an object of Flax")
        own = nnx.state(value)
        if hasattr(nnx, "replace_by_pure_dict"):
            nnx.replace_by_pure_dict(own, state)
        else:
            own.replace_by_pure_dict(state)
        nnx.update(value, own)
        return value


def _pure(nnx: Any, state: Any) -> object:
    return nnx.to_pure_dict(state) if hasattr(nnx, "to_pure_dict") else state.to_pure_dict()
