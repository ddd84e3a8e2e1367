"""Hooks: code of yours that runs when something happens to a checkpoint."""

from model_checkpoint.hooks.base_hook import BaseHook, HookContext, HookEvent, HookPriority, HookResult
from model_checkpoint.hooks.hook_manager import HookManager

__all__ = ["BaseHook", "HookContext", "HookEvent", "HookManager", "HookPriority", "HookResult"]
