"""XGBoost's boosters and estimators, in XGBoost's own UBJSON."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from model_checkpoint.checkpoint.objects import ObjectAdapter
from model_checkpoint.utils.optional import require


class XgboostAdapter(ObjectAdapter):
    """A state is ``{"class": ..., "ubj": bytes}``; ``load_model(bytearray(...))`` of XGBoost reads it."""

    opaque = True

    def owns(self, value: object) -> bool:
        xgboost = require("xgboost", "xgboost", "saving a model of XGBoost")  # its own object is here, so it is loaded

        return isinstance(value, (xgboost.Booster, xgboost.XGBModel))

    def class_of(self, value: object) -> str | None:
        return type(value).__name__

    def state_of(self, value: Any) -> object:
        xgboost = require("xgboost", "xgboost", "saving a model of XGBoost")
        name = self.class_of(value)
        if isinstance(value, xgboost.Booster):
            return {"class": name, "ubj": bytes(value.save_raw("ubj"))}
        if not value.__sklearn_is_fitted__():
            raise ValueError("it is not fitted, so XGBoost has nothing to store; fit it first")
        with tempfile.TemporaryDirectory() as folder:  # an estimator's own attributes go to files only
            path = os.path.join(folder, "model.ubj")
            value.save_model(path)
            with open(path, "rb") as file:
                return {"class": name, "ubj": file.read()}

    def put_back(self, value: Any, state: Any) -> object:
        value.load_model(bytearray(state["ubj"]))
        return value
