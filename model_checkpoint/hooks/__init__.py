"""Hooks: code of yours that runs when something happens to a checkpoint, an experiment or a metric."""

from model_checkpoint.hooks.base_hook import BaseHook, HookContext, HookEvent, HookPriority, HookResult
from model_checkpoint.hooks.decorators import (
    async_hook_handler,
    benchmark_hook,
    conditional_hook,
    hook_handler,
    retry_on_failure,
    suppress_errors,
)
from model_checkpoint.hooks.hook_manager import HookManager

__all__ = [
    "BaseHook",
    "HookContext",
    "HookEvent",
    "HookManager",
    "HookPriority",
    "HookResult",
    "async_hook_handler",
    "benchmark_hook",
    "conditional_hook",
    "hook_handler",
    "retry_on_failure",
    "suppress_errors",
]
