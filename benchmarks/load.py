"""How long does a load take that verifies every byte, against the peers' that verify none?

Each peer saves the state once. Then every round loads with each of them, one after the other, so that noise strikes
all, and in another order each time: cold, with the files evicted from the page cache, and at once again, warm. Every
loaded state is dropped before the next load, and in the first round, which warms up, it is compared with the one that
was saved. Loads give new memory, as that which resumes a run does: what malloc keeps of an earlier load is given back
to the kernel first. (Left with it, a repeated torch.load of gpt2 takes 0.2 s instead of 0.8 s.) Only the rows that say
so load into warm memory. DCP always loads into tensors that are there; so our load is held against DCP's with the
allocation in its time, and our load_into against DCP's into warm memory; our load against the latter is reported.

    python benchmarks/load.py [--state gpt2] [--rounds 5] [--folder /mnt/disk] [--check]

Evicted by: sync, then posix_fadvise(DONTNEED) on each file. What a host caches for a virtual machine stays there, so
"cold" can be faster than the disk; the row "limit: raw read" shows by how much.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import disk
from limits import Limits, copy_limits, hash_limits
from peers import PEERS, Peer
from report import Figure, Section, arguments, machine, progress, ratio, shuffled, tell
from states import STATES, build

VERIFIED = "ours: load, every byte verified"
INTO = "ours: load_into warm memory, every byte verified"
MAPPED = "ours: load, mapped, not verified"
MAPPED_LIMIT = 30.0  # ms
SAVERS = ("ours", "torch", "safetensors", "dcp", "orbax")  # DCP's load does not depend on the threads that saved


class Loads:
    """Measures loads of one state, cold and warm."""

    def __init__(self, title: str, nbytes: int) -> None:
        self.cold = Section(f"cold load of {title}", nbytes)
        self.warm = Section(f"warm load of {title}", nbytes)

    def both(self, row: str, path: Path, load: Callable[[], Any]) -> Any:
        """Load cold, then warm; returns what came last."""
        disk.evict(path)
        disk.release_memory()
        self.cold.timed(row, load)  # what it returns is dropped here
        disk.release_memory()
        return self.warm.timed(row, load)


def measure(name: str, rounds: int, folder: Path) -> Loads:
    """Return the seconds of each peer's loads of a state."""
    progress(f"{name}: saving the state with each peer")
    state = build(name)
    loads = Loads(f"{name}, {len(state.flat)} tensors, {state.nbytes / 1e6:,.1f} MB", state.nbytes)
    limits = Limits(state, folder)
    limits.write()
    peers = [PEERS[peer](state, folder) for peer in SAVERS]
    for peer in peers:
        peer.save(lambda row: None)
    ways = [(peer, row, load) for peer in peers for row, load in peer.loads().items()]
    for i in range(rounds + 1):
        progress(f"{name}: round {i} of {rounds}")
        for row, work in {**hash_limits(limits), **copy_limits(limits)}.items():
            loads.warm.timed(row, work)
        loads.both("limit: raw read into one warm buffer", limits.path, limits.read)
        for peer, row, load in shuffled(ways, i):
            loaded = loads.both(row, peer.path, load)
            if i == 0:
                _compare(peer, row, loaded)
            del loaded  # a mapped file cannot be evicted
    for peer in peers:
        peer.close()
    limits.close()
    return loads


def _compare(peer: Peer, row: str, loaded: Any) -> None:
    if not peer.holds_state(loaded):
        raise AssertionError(f"{row!r} did not give the state that was saved")


def figures_of(name: str, loads: Loads) -> list[Figure]:
    """Return the figures to reach; limits hold for gpt2."""
    known = name == "gpt2"
    rows = [
        ("load", VERIFIED, "DCP load into new memory", 1.0),
        ("load_into", INTO, "DCP load into warm memory", 1.0),
        ("load", VERIFIED, "DCP load into warm memory", None),
        ("load", VERIFIED, "SHA-256 + torch.load", 0.6),
    ]
    figures = []
    for kind, section in (("cold", loads.cold), ("warm", loads.warm)):
        for ours, row, other, limit in rows:
            what = f"{name}, {kind}: verified {ours} ÷ {other}"
            figures.append(ratio(what, section, row, other, limit if known else None))
        mapped = section.median(MAPPED) * 1e3
        figures.append(Figure(f"{name}, {kind}: mapped", mapped, MAPPED_LIMIT if known else None, "ms"))
    return figures


def main() -> int:
    options = arguments(__doc__, STATES)
    sections, figures = [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        facts = {**machine(Path(temporary)), "evicted by": disk.COLD}
        for name in options.state:
            folder = Path(temporary) / name
            folder.mkdir()
            loads = measure(name, options.rounds, folder)
            disk.remove(folder)
            sections += [loads.cold, loads.warm]
            figures += figures_of(name, loads)
    tell("load", facts, sections, figures)
    return int(options.check and not all(figure.reached for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
