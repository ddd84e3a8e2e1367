"""Random generators that are objects: Python's and NumPy's. Torch's and TensorFlow's are their own adapters' affair."""

from __future__ import annotations

import copy
import random
from array import array
from collections.abc import Callable
from typing import Any

from model_checkpoint.checkpoint.objects import ObjectAdapter, Traits


def _refusal(try_it: Callable[[], object]) -> str | None:
    try:
        try_it()
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        return f"what was saved is no state of it: {error!r}"
    return None


class RandomAdapter(ObjectAdapter):
    """``random.Random``."""

    def owns(self, value: object) -> bool:
        return isinstance(value, random.Random) and not isinstance(value, random.SystemRandom)

    def traits(self, value: object) -> Traits:
        return Traits(opaque=True, kind="Random")

    def state_of(self, value: Any) -> object:
        version, words, gauss = value.getstate()
        return {"class": "Random", "version": version, "words": array("I", words), "gauss": gauss}

    def refusal(self, value: object, state: Any) -> str | None:
        return _refusal(lambda: self.put_back(random.Random(), state))

    def put_back(self, value: Any, state: Any) -> object:
        value.setstate((state["version"], tuple(state["words"]), state["gauss"]))
        return value


class NumpyAdapter(ObjectAdapter):
    """``numpy.random.Generator``, ``RandomState`` and bit generators."""

    def owns(self, value: object) -> bool:
        import numpy as np  # its own object is here, so it is loaded

        return isinstance(value, (np.random.Generator, np.random.RandomState, np.random.BitGenerator))

    def traits(self, value: object) -> Traits:
        return Traits(opaque=True, kind=self._state(value)["bit_generator"])

    def state_of(self, value: Any) -> object:
        return {"class": self.traits(value).kind, "state": self._state(value)}

    def _state(self, value: Any) -> Any:
        import numpy as np

        if isinstance(value, np.random.RandomState):
            return value.get_state(legacy=False)
        return getattr(value, "bit_generator", value).state

    def refusal(self, value: Any, state: Any) -> str | None:
        return _refusal(lambda: self.put_back(copy.deepcopy(value), state))

    def put_back(self, value: Any, state: Any) -> object:
        import numpy as np

        if isinstance(value, np.random.RandomState):
            value.set_state(state["state"])
        else:
            getattr(value, "bit_generator", value).state = state["state"]
        return value
