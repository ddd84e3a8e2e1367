"""What Lightning has measured and keeps in no checkpoint: averages of the epoch under way, and what was last logged."""

from __future__ import annotations

from typing import Any

from model_checkpoint.utils.optional import require


def state_of(trainer: Any) -> dict[str, Any]:
    """Return the metrics of a trainer as plain values and tensors, for ``put_back`` and ``complete``.

    ``partial`` are values that are logged with ``on_epoch=True``; ``modules``, states of metrics of torchmetrics that
    belong to the module; ``logged``, what ``trainer.callback_metrics`` shows to schedulers and callbacks.
    """
    results = trainer.fit_loop.epoch_loop._results
    return {
        "logged": dict(trainer.callback_metrics),
        "partial": {
            key: {"value": metric.value, "size": getattr(metric, "cumulated_batch_size", None)}
            for key, metric in results.items()
            if metric.is_tensor and metric.meta.on_epoch and not metric.has_reset
        },
        "modules": {
            name: {"states": {key: getattr(module, key) for key in module._defaults}, "updates": module._update_count}
            for name, module in _torchmetrics(trainer.lightning_module).items()
            if module._update_count
        },
    }


def put_back(trainer: Any, pl_module: Any, state: dict[str, Any]) -> None:
    """Put back what needs no more batches."""
    trainer._logger_connector._callback_metrics.update(state["logged"])
    metrics = _torchmetrics(pl_module)
    for name, saved in state["modules"].items():
        metric = metrics[name]
        for key, value in saved["states"].items():
            on_device = [part.to(metric.device) for part in (value if isinstance(value, list) else [value])]
            setattr(metric, key, on_device if isinstance(value, list) else on_device[0])
        metric._update_count, metric._computed = saved["updates"], None


def complete(trainer: Any, partial: dict[str, Any]) -> None:
    """Add what was averaged before to the averages that the first batch since has begun, out of ``partial``."""
    results = trainer.fit_loop.epoch_loop._results
    for key in [key for key in partial if key in results and not results[key].has_reset]:
        metric, saved = results[key], partial.pop(key)
        value = saved["value"].to(metric.value.device)
        if metric.meta.is_max_reduction or metric.meta.is_min_reduction:
            metric.value = metric.meta.reduce_fx(value, metric.value)
        else:
            metric.value = value + metric.value
        if saved["size"] is not None:
            metric.cumulated_batch_size = saved["size"].to(metric.value.device) + metric.cumulated_batch_size


def _torchmetrics(pl_module: Any) -> dict[str, Any]:
    kind = require("torchmetrics", "lightning", "training with Lightning").Metric
    return {name: module for name, module in pl_module.named_modules() if isinstance(module, kind)}
