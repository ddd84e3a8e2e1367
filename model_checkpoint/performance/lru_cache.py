"""A bounded, thread-safe cache: the least recently used entry goes first, and every entry ages."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any

from model_checkpoint.errors import ConfigurationError
from model_checkpoint.utils.fork import renew_in_child


class LRUCache:
    """Least-recently-used cache with a time to live.

    Args:
        max_size: entries held at most; at least 1.
        default_ttl: seconds that an entry lives unless ``set`` says otherwise; None is forever.
        clock: seconds that never go back; ``time.monotonic`` unless a test brings its own.

    Raises:
        ConfigurationError: ``max_size`` or ``default_ttl`` is not positive.
    """

    def __init__(
        self, max_size: int = 500, default_ttl: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if max_size < 1:
            raise ConfigurationError(f"max_size must be at least 1, not {max_size}")
        if default_ttl is not None and default_ttl <= 0:
            raise ConfigurationError(f"default_ttl must be positive seconds or None, not {default_ttl}")
        self.max_size = max_size
        self.default_ttl = default_ttl
        self._clock = clock
        self._lock = Lock()
        renew_in_child(self, "_lock", Lock)
        self._entries: OrderedDict[Hashable, tuple[Any, float | None]] = OrderedDict()  # value, time of death
        self._hits = self._misses = self._evictions = self._expired = 0

    def get(self, key: Hashable, default: Any = None) -> Any:
        """Return the value of ``key``, now the most recently used, or ``default`` when it is absent or too old."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and (entry[1] is None or self._clock() < entry[1]):
                self._entries.move_to_end(key)
                self._hits += 1
                return entry[0]
            if entry is not None:
                del self._entries[key]
                self._expired += 1
            self._misses += 1
            return default

    def set(self, key: Hashable, value: Any, ttl: float | None = None) -> None:
        """Hold ``value`` as ``key`` for ``ttl`` seconds (None: the default); may evict the least recently used."""
        lifetime = self.default_ttl if ttl is None else ttl
        with self._lock:
            self._entries[key] = (value, None if lifetime is None else self._clock() + lifetime)
            self._entries.move_to_end(key)
            if len(self._entries) > self.max_size:
                self._entries.popitem(last=False)
                self._evictions += 1

    def delete(self, key: Hashable) -> bool:
        """Forget ``key``; returns whether it was there."""
        with self._lock:
            return self._entries.pop(key, None) is not None

    def clear(self) -> None:
        """Forget every entry; the counts stay."""
        with self._lock:
            self._entries.clear()

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)

    def stats(self) -> dict[str, float]:
        """Return ``size``, ``max_size``, ``hits``, ``misses``, ``evictions``, ``expired`` and ``hit_rate`` (0 to 1)."""
        with self._lock:
            asked = self._hits + self._misses
            return {
                "size": len(self._entries),
                "max_size": self.max_size,
                "hits": self._hits,
                "misses": self._misses,
                "evictions": self._evictions,
                "expired": self._expired,
                "hit_rate": self._hits / asked if asked else 0.0,
            }
