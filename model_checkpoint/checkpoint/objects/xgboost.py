"""XGBoost's boosters and estimators, in XGBoost's own UBJSON."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from model_checkpoint.checkpoint.objects import ObjectAdapter, Traits
from model_checkpoint.utils.optional import require


class XgboostAdapter(ObjectAdapter):
    """A state has ``class`` and ``ubj``, which ``load_model(bytearray(...))`` of XGBoost reads, and what is not in it.

    That is ``config`` of a booster, and ``params`` of an estimator, but for functions: those stay the target's own.
    XGBoost does not tell its random state; with its ``seed_per_iteration`` sampling goes on exactly.
    """

    def owns(self, value: object) -> bool:
        xgboost = require("xgboost", "xgboost", "saving a model of XGBoost")  # its own object is here, so it is loaded
        return isinstance(value, (xgboost.Booster, xgboost.XGBModel))

    def traits(self, value: object) -> Traits:
        return Traits(opaque=True, kind=type(value).__name__)

    def state_of(self, value: Any) -> object:
        name = type(value).__name__
        if not hasattr(value, "get_booster"):
            return {"class": name, "ubj": bytes(value.save_raw("ubj")), "config": value.save_config()}
        if not value.__sklearn_is_fitted__():
            raise ValueError("it is not fitted, so XGBoost has nothing to store; fit it first")
        params = {key: part for key, part in value.get_params().items() if not callable(part) and key != "callbacks"}
        with tempfile.TemporaryDirectory() as folder:  # an estimator's own attributes go to files only
            path = os.path.join(folder, "model.ubj")
            value.save_model(path)
            with open(path, "rb") as file:
                return {"class": name, "ubj": file.read(), "params": params}

    def put_back(self, value: Any, state: Any) -> object:
        value.load_model(bytearray(state["ubj"]))
        if "config" in state:
            value.load_config(state["config"])
        else:
            value.set_params(**state["params"])
        return value
