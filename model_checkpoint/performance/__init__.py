"""Caching, batching and statistics."""

from model_checkpoint.performance.lru_cache import LRUCache

__all__ = ["LRUCache"]
