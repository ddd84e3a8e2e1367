"""The tests that need frameworks; each skips where its own are not installed, unless all are required."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are made here, from their configurations
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

REQUIRED = (
    *("torch", "numpy", "jax", "tensorflow", "flax", "optax", "keras", "sklearn", "skops", "xgboost", "torchdata"),
    *("lightning", "transformers", "accelerate", "optuna", "orbax.checkpoint"),
)


def pytest_configure() -> None:
    if os.environ.get("MODEL_CHECKPOINT_REQUIRE_FRAMEWORKS"):
        missing = [name for name in REQUIRED if find_spec(name.partition(".")[0]) is None]
        if missing:
            raise pytest.UsageError(
                f"these frameworks are not installed: {', '.join(missing)}; run make test-frameworks"
            )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "frameworks" in item.path.parts:
            item.add_marker(pytest.mark.slow)  # importing one takes seconds
