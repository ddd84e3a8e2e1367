"""What this process does, by experiment: sums, and how long things took. Read by people and by Prometheus.

Nothing is computed where something is counted: a sum and a lap are an addition and an append, and whoever asks pays.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any
from weakref import WeakSet, ref

from model_checkpoint.utils.fork import renew_in_child

_KEPT = 1000  # laps, the newest; percentiles are theirs
QUANTILES = (0.5, 0.95, 0.99)
# Name -> what it is. Those that end in "seconds" are laps, with their count, sum and percentiles.
KNOWN = {
    "saves": "Checkpoints that were committed.",
    "bytes_written": "Bytes of their files.",
    "save_seconds": "From the beginning of writing a checkpoint until it was committed.",
    "stall_seconds": "How long a background save held up its caller.",
    "loads": "Checkpoints that were loaded.",
    "load_seconds": "How long loading one took.",
    "flushes": "Batches of metrics that were stored.",
    "points": "Metric points in them.",
    "flush_seconds": "How long storing a batch took.",
    "spooled": "Batches that went to a local file because the database was away.",
    "pending_saves": "Background saves that are not committed yet.",
    "buffered_points": "Metric points that are not stored yet.",
    "cache_hits": "Checkpoint records that the cache had.",
    "cache_misses": "Checkpoint records that it had not.",
}
_GAUGES = {"pending_saves", "buffered_points"}


class Tally:
    """Counts for one manager or tracker.

    Args:
        owner: whom the gauges are asked of; it is not kept alive.
        gauges: name -> what returns its value now, called with the owner.

    Attributes:
        lock: held by whoever changes the others.
        sums: (experiment id, name) -> sum.
        laps: (experiment id, name) -> seconds, the newest 1,000.
        counts: (experiment id, name) -> how many laps there were.
    """

    def __init__(self, owner: object, gauges: Mapping[str, Callable[[Any], float]]) -> None:
        self.lock = threading.Lock()
        makers = {"sums": _no_sums, "laps": _no_laps, "counts": _no_counts}
        self.sums, self.laps, self.counts = _no_sums(), _no_laps(), _no_counts()
        for name, make in makers.items():  # what the parent of a process did is the parent's
            renew_in_child(self, name, make)
        self._owner = ref(owner)
        self._gauges = gauges
        renew_in_child(self, "lock", threading.Lock)
        with _lock:
            _tallies.add(self)

    def count(self, experiment_id: str, **more: float) -> None:
        """Add to sums; what is named ``..._seconds`` is also a lap."""
        with self.lock:
            for name, value in more.items():
                self.sums[experiment_id, name] += value
                if name.endswith("_seconds"):
                    self.laps[experiment_id, name].append(value)
                    self.counts[experiment_id, name] += 1

    def gauged(self) -> dict[str, float]:
        """Return what the gauges show now."""
        owner = self._owner()
        return {} if owner is None else {name: read(owner) for name, read in self._gauges.items()}

    def experiments(self) -> list[str]:
        """Return the ids of the experiments that something was counted for."""
        with self.lock:
            return list(dict.fromkeys(experiment_id for experiment_id, _ in self.sums))

    def summary(self, experiment_id: str | None = None) -> dict[str, float]:
        """Return the sums of one experiment or all, with percentiles of laps (``stall_p95_seconds``).

        ``write_gb_per_second`` is what was written over the time that it took.
        """
        with self.lock:
            sums: defaultdict[str, float] = defaultdict(float)
            laps: defaultdict[str, list[float]] = defaultdict(list)
            for (experiment, name), value in self.sums.items():
                if experiment_id in (None, experiment):
                    sums[name] += value
                    laps[name] += self.laps.get((experiment, name), ())
        found = dict(sums)
        for name, seconds in laps.items():
            for quantile, value in zip(QUANTILES, quantiles(seconds)):
                found[f"{name.removesuffix('_seconds')}_p{quantile * 100:.0f}_seconds"] = value
        if found.get("save_seconds"):
            found["write_gb_per_second"] = found["bytes_written"] / found["save_seconds"] / 1e9
        return found


def _no_sums() -> defaultdict[tuple[str, str], float]:
    return defaultdict(float)


def _no_laps() -> defaultdict[tuple[str, str], deque[float]]:
    return defaultdict(partial(deque, maxlen=_KEPT))


def _no_counts() -> defaultdict[tuple[str, str], int]:
    return defaultdict(int)


_tallies: WeakSet[Tally] = WeakSet()
_lock = threading.Lock()


def quantiles(seconds: Iterable[float]) -> list[float]:
    """Return the percentiles 50, 95 and 99 by nearest rank; an empty list of nothing."""
    ordered = sorted(seconds)
    return [ordered[max(0, -(-int(quantile * 100) * len(ordered) // 100) - 1)] for quantile in QUANTILES if ordered]


class _Sample:
    """One metric of one experiment, of all tallies together."""

    def __init__(self) -> None:
        self.value = 0.0
        self.count = 0
        self.laps: list[float] = []


def prometheus_text() -> str:
    """Return what this process did as Prometheus reads it (text format 0.0.4), of all managers and trackers that live.

    Serve it under ``/metrics``, or write it to a file for the node exporter's textfile collector.
    """
    found: defaultdict[str, defaultdict[str, _Sample]] = defaultdict(partial(defaultdict, _Sample))
    with _lock:
        tallies = list(_tallies)
    for tally in tallies:
        for name, value in tally.gauged().items():
            found[name][""].value += value
        with tally.lock:
            for (experiment_id, name), value in tally.sums.items():
                found[name][experiment_id].value += value
            for (experiment_id, name), seconds in tally.laps.items():
                found[name][experiment_id].laps += seconds
            for (experiment_id, name), times in tally.counts.items():
                found[name][experiment_id].count += times
    return "".join(line for name in KNOWN if name in found for line in _lines(name, found[name]))


def _lines(name: str, samples: Mapping[str, _Sample]) -> Iterator[str]:
    kind = "gauge" if name in _GAUGES else "summary" if name.endswith("_seconds") else "counter"
    full = f"model_checkpoint_{name}" + ("_total" if kind == "counter" else "")
    yield f"# HELP {full} {KNOWN[name]}\n# TYPE {full} {kind}\n"
    for experiment_id, sample in sorted(samples.items()):
        labels = [f'experiment="{experiment_id}"'] if experiment_id else []
        if kind != "summary":
            yield f"{full}{_braces(labels)} {sample.value!r}\n"
            continue
        for quantile, value in zip(QUANTILES, quantiles(sample.laps)):
            quoted = f'quantile="{quantile}"'
            yield f"{full}{_braces([*labels, quoted])} {value!r}\n"
        yield f"{full}_sum{_braces(labels)} {sample.value!r}\n{full}_count{_braces(labels)} {sample.count}\n"


def _braces(labels: list[str]) -> str:
    return f"{{{','.join(labels)}}}" if labels else ""
