"""scikit-learn's estimators, in skops' format, which is loaded without running code of unknown classes."""

from __future__ import annotations

from typing import Any

from model_checkpoint.checkpoint.objects import ObjectAdapter
from model_checkpoint.utils.optional import require


class SklearnAdapter(ObjectAdapter):
    """Estimators, pipelines included. A state is ``{"class": ..., "skops": bytes}``; ``skops.io.loads`` reads it."""

    opaque = True

    def owns(self, value: object) -> bool:
        base = require("sklearn.base", "sklearn", "saving an estimator")  # its own object is here, so it is loaded
        return isinstance(value, base.BaseEstimator)

    def class_of(self, value: object) -> str | None:
        return type(value).__name__

    def state_of(self, value: object) -> object:
        io = require("skops.io", "sklearn", "saving a scikit-learn estimator")
        return {"class": self.class_of(value), "skops": io.dumps(value)}

    def put_back(self, value: Any, state: Any) -> object:
        io = require("skops.io", "sklearn", "loading a scikit-learn estimator")
        own = f"{type(value).__module__}.{type(value).__qualname__}"
        unknown = [name for name in io.get_untrusted_types(data=state["skops"]) if name != own]
        if unknown:
            raise ValueError(
                f"it holds objects of {', '.join(unknown)}, which skops does not know to be safe; look at them, then "
                "use load_checkpoint() and skops.io.loads(..., trusted=[...])"
            )
        loaded = io.loads(state["skops"], trusted=[own])
        vars(value).clear()
        vars(value).update(vars(loaded))
        return value
