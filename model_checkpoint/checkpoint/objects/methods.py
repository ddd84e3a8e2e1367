"""Objects of any library that say themselves what their state is."""

from __future__ import annotations

from typing import Any

from model_checkpoint.checkpoint.objects import ObjectAdapter, Traits


class StateDictAdapter(ObjectAdapter):
    """Objects with ``state_dict()`` and ``load_state_dict()``."""

    def owns(self, value: object) -> bool:
        return _has(value, "state_dict")

    def traits(self, value: object) -> Traits:
        return Traits(complete=False, together=True, grows=True, setter="load_state_dict")

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

    def owns(self, value: object) -> bool:
        return _has(value, "get_state") and _has(value, "set_state")

    def traits(self, value: object) -> Traits:
        return Traits(opaque=True, together=True, setter="set_state")

    def state_of(self, value: Any) -> object:
        state = value.get_state()
        if state is value:
            raise ValueError("its get_state() returns the object itself")
        return state

    def put_back(self, value: Any, state: object) -> object:
        value.set_state(state)
        return value


def _has(value: object, method: str) -> bool:
    try:
        return callable(getattr(value, method, None))
    except Exception:  # noqa: BLE001 - a dict whose items are attributes raises KeyError, a property whatever it likes
        return False
