"""How long does a save in the background stop training, and how much does it slow training down meanwhile?

Every round goes through all peers, in another order each time, so that noise strikes all. Each saves the same state
twice: once with nothing else running, for the stall (until the call returns, when the state may be changed again) and
the time until durable; and once while matrices are multiplied, for the slow-down (matmul.py says how it is measured).
Our own blocking save and a copy of the state into warm memory go with every round. Before each save what the last one
wrote is removed and the disk comes to rest. The first save of each, which allocates its buffers, is reported apart.

    python benchmarks/async_save.py [--state gpt2] [--rounds 5] [--folder /mnt/disk] [--check]
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from async_peers import ASYNC_PEERS
from limits import Limits, copy_limits
from matmul import Matmul
from peers import Ours
from report import Figure, Section, arguments, machine, progress, ratio, shuffled, tell
from states import STATES, State, build

COPY = "limit: memcpy to warm memory, all cores"
COPY_ONE = "limit: memcpy to warm memory, one core"
BLOCKING = "ours: blocking save"
REUSED = "DCP, reused stager"


class AsyncSaves:
    """Measures background saves of one state."""

    def __init__(self, state: State) -> None:
        title = f"{state.name}, {len(state.flat)} tensors, {state.nbytes / 1e6:,.1f} MB"
        self.stall = Section(f"stall by an async save of {title}", state.nbytes)
        self.durable = Section(f"until an async save is durable, {title}", state.nbytes)
        self.slow_down = Section(f"slow-down of matmul while the save runs, {title}", unit="x")
        self.extra = Section(f"extra seconds of matmul for each save, {title}")

    def sections(self) -> list[Section]:
        return [self.stall, self.durable, self.slow_down, self.extra]


def measure(name: str, rounds: int, folder: Path) -> AsyncSaves:
    """Return stalls, times until durable and slow-downs of each peer's saves of a state."""
    progress(f"{name}: building the state")
    state = build(name)
    found = AsyncSaves(state)
    limits, matmul = Limits(state, folder), Matmul()
    (folder / "blocking").mkdir()
    blocking = Ours(state, folder / "blocking")
    peers = {peer: make(state, folder) for peer, make in ASYNC_PEERS.items()}
    for i in range(rounds + 1):
        progress(f"{name}: round {i} of {rounds}")
        for row, work in copy_limits(limits).items():
            found.stall.timed(row, work)
        os.sync()
        found.durable.timed("limit: raw write + fsync", limits.write)
        limits.close()
        lap = found.durable.stopwatch()
        blocking.save(lambda _, lap=lap: lap(BLOCKING))
        blocking.clear()
        for row, peer in shuffled(list(peers.items()), i):
            stall, durable = found.stall.stopwatch(), found.durable.stopwatch()
            peer.start()
            stall(row)
            peer.wait()
            durable(row)
            peer.clear()
            slow_down, extra = peer.slow_down(matmul)
            found.slow_down.add(row, slow_down)
            found.extra.add(row, extra)
            peer.clear()
    for peer in (*peers.values(), blocking):
        peer.close()
    return found


def figures_of(name: str, found: AsyncSaves) -> list[Figure]:
    """Return the figures to reach; limits hold for gpt2."""
    known = name == "gpt2"
    rows = [
        ("stall ÷ memcpy, all cores", found.stall, "ours", COPY, 1.2),
        ("stall ÷ memcpy, one core", found.stall, "ours", COPY_ONE, None),
        ("stall ÷ DCP with a reused stager", found.stall, "ours", REUSED, 0.8),
        ("until durable ÷ our blocking save", found.durable, "ours", BLOCKING, 1.3),
        ("extra seconds ÷ DCP's", found.extra, "ours", REUSED, 1.0),
        ("slow-down while it runs ÷ DCP's", found.slow_down, "ours", REUSED, 1.0),
    ]
    return [
        ratio(f"{name}: {text}", section, row, other, limit if known else None)
        for text, section, row, other, limit in rows
    ]


def main() -> int:
    options = arguments(__doc__, STATES)
    sections: list[Section] = []
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        facts = machine(Path(temporary))
        for name in options.state:
            folder = Path(temporary) / name
            folder.mkdir()
            found = measure(name, options.rounds, folder)
            sections += found.sections()
            figures += figures_of(name, found)
    tell("async", facts, sections, figures)
    return int(options.check and not all(figure.reached for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
