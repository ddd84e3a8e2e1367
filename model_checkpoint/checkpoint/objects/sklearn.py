"""scikit-learn's estimators, in skops' format, which is loaded without running code of unknown classes."""

from __future__ import annotations

from typing import Any

from model_checkpoint.checkpoint.objects import ObjectAdapter, Traits
from model_checkpoint.utils.optional import require


class SklearnAdapter(ObjectAdapter):
    """Estimators, pipelines included. A state is ``{"class": ..., "skops": bytes}``; ``skops.io.loads`` reads it.

    Into an estimator goes what skops knows to be safe, classes of scikit-learn, and those that the estimator itself has
    as a part. Skops asks about scikit-learn's trees, too, because their numbers are used unchecked: that the bytes are
    those that were saved is what their digests are for.
    """

    def owns(self, value: object) -> bool:
        base = require("sklearn.base", "sklearn", "saving an estimator")  # its own object is here, so it is loaded
        return isinstance(value, base.BaseEstimator)

    def traits(self, value: object) -> Traits:
        return Traits(opaque=True, kind=type(value).__name__)

    def state_of(self, value: object) -> object:
        io = require("skops.io", "sklearn", "saving a scikit-learn estimator")
        return {"class": type(value).__name__, "skops": io.dumps(value)}

    def refusal(self, value: Any, state: Any) -> str | None:
        io = require("skops.io", "sklearn", "loading a scikit-learn estimator")
        own = {f"{type(part).__module__}.{type(part).__qualname__}" for part in (value, *value.get_params().values())}
        names = io.get_untrusted_types(data=state["skops"])
        unknown = [name for name in names if name not in own and not name.startswith("sklearn.")]
        if not unknown:
            return None
        return (
            f"it holds objects of {', '.join(unknown)}, which skops does not know to be safe; look at them, then use "
            "load_checkpoint() and skops.io.loads(..., trusted=[...])"
        )

    def put_back(self, value: Any, state: Any) -> object:
        io = require("skops.io", "sklearn", "loading a scikit-learn estimator")
        loaded = io.loads(state["skops"], trusted=io.get_untrusted_types(data=state["skops"]))  # see refusal()
        vars(value).clear()
        vars(value).update(vars(loaded))
        return value
