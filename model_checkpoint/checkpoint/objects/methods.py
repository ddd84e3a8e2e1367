"""Objects of any library that say themselves what their state is."""

from __future__ import annotations

from typing import Any

from model_checkpoint.checkpoint.objects import ObjectAdapter


class StateDictAdapter(ObjectAdapter):
    """Objects with ``state_dict()`` and ``load_state_dict()``."""

    def owns(self, value: object) -> bool:
        return callable(getattr(value, "state_dict", None))

    def complete(self, value: object) -> bool:
        return False

    def setter(self, value: object) -> str | None:
        return "load_state_dict"

    def state_of(self, value: Any) -> object:
        state = value.state_dict()
        if not isinstance(state, dict):
            raise ValueError(f"its state_dict() is a {type(state).__name__}, which must be a dict")
        return state

    def put_back(self, value: Any, state: object) -> object:
        value.load_state_dict(state)
        return value


class GetStateAdapter(ObjectAdapter):
    """Objects with ``get_state()`` and ``set_state()``."""

    opaque = True

    def owns(self, value: object) -> bool:
        return callable(getattr(value, "get_state", None)) and callable(getattr(value, "set_state", None))

    def complete(self, value: object) -> bool:
        return False

    def setter(self, value: object) -> str | None:
        return "set_state"

    def state_of(self, value: Any) -> object:
        state = value.get_state()
        if state is value:
            raise ValueError("its get_state() returns the object itself")
        return state

    def put_back(self, value: Any, state: object) -> object:
        value.set_state(state)
        return value
