"""How long does a durable save take, against the peers' and against what disk and SHA-256 allow?

Every round saves the same state once with each peer, one after the other, so that noise strikes all, and in another
order each time, because what comes after much writing suffers; medians of the rounds are compared. Before each save
what the last one wrote is removed and the disk comes to rest, so that nobody pays for another's dirty pages. A row such
as "torch.save + fsync + SHA-256" is the same save as "torch.save", timed further.

    python benchmarks/save.py [--state gpt2] [--rounds 5] [--folder /mnt/disk] [--check]

Besides: what a save of 1 MB costs above its own fsyncs (small_save.py), what a blocking save takes of memory
(peak_memory.py), and whether many tiny tensors cost more per byte than one large one (the state "mixed").
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

from limits import Limits, copy_limits, hash_limits
from peak_memory import measure_peaks
from peers import PEERS, Ours, Peer
from report import Figure, Section, arguments, machine, progress, ratio, shuffled, tell
from small_save import measure_small
from states import STATES, build

OURS = "ours: save, durable, with SHA-256"


def measure(name: str, rounds: int, folder: Path) -> Section:
    """Return the seconds of each peer's saves of a state."""
    progress(f"{name}: building the state")
    state = build(name)
    section = Section(f"save of {name}, {len(state.flat)} tensors, {state.nbytes / 1e6:,.1f} MB", state.nbytes)
    limits = Limits(state, folder)
    peers = [peer(state, folder) for peer in PEERS.values()]
    saves = [partial(_write_raw, limits), *(partial(_save, peer) for peer in peers)]
    for i in range(rounds + 1):
        progress(f"{name}: round {i} of {rounds}")
        for row, work in {**hash_limits(limits), **copy_limits(limits)}.items():
            section.timed(row, work)
        for work in shuffled(saves, i):
            work(section)
    for peer in peers:
        peer.close()
    return section


def _write_raw(limits: Limits, section: Section) -> None:
    section.timed("limit: raw write + fsync", limits.write)
    limits.close()


def _save(peer: Peer, section: Section) -> None:
    peer.save(section.stopwatch())
    peer.clear()


def measure_per_byte(rounds: int, folder: Path) -> Section:
    """Return the seconds of our saves of 200 tensors, most of them tiny, and of one tensor, of 1 GB each."""
    states = {name: build(name) for name in ("mixed", "large")}
    section = Section("ours, 1.0 GB in 200 tensors and in one", states["large"].nbytes)
    peers = {}
    for name, state in states.items():
        (folder / name).mkdir()
        peers[name] = Ours(state, folder / name)
    for i in range(rounds + 1):
        progress(f"200 tensors and one: round {i} of {rounds}")
        for name, peer in peers.items():
            start = section.stopwatch()
            peer.save(lambda _, name=name, start=start: start(f"ours: {name}"))
            peer.clear()
    for peer in peers.values():
        peer.close()
    return section


def figures_of(name: str, section: Section) -> list[Figure]:
    """Return the figures to reach; limits hold for gpt2."""
    rows = [("safetensors save_file + fsync", 1.15), ("torch.save + fsync + SHA-256", 0.40)]
    return [
        ratio(f"{name}: ours ÷ {row}", section, OURS, row, limit if name == "gpt2" else None) for row, limit in rows
    ]


def main() -> int:
    options = arguments(__doc__, STATES)
    sections, figures = [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        facts = machine(folder)
        for more in (measure_small, measure_peaks):  # first: in a process that already holds gigabytes all is slower
            section, figure = more(folder)
            sections.append(section)
            figures.append(figure)
        for name in options.state:
            (folder / f"peers-{name}").mkdir()
            sections.append(measure(name, options.rounds, folder / f"peers-{name}"))
            figures += figures_of(name, sections[-1])
        if "large" in options.state:
            sections.append(measure_per_byte(options.rounds, folder))
            figures.append(
                ratio("200 tensors ÷ one tensor of as many bytes", sections[-1], "ours: mixed", "ours: large", None)
            )
    tell("save", facts, sections, figures)
    return int(options.check and not all(figure.reached for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
