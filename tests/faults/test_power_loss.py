"""Power loss at system calls, on an ext4 of its own: what was not synced is gone, as after a real one.

The child is killed at a call; then the file system is shut down without writing its journal or any cached page
(``EXT4_IOC_SHUTDOWN``), unmounted and mounted again. That needs root and a loop device.
"""

from __future__ import annotations

import fcntl
import functools
import os
import random
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from strace import LARGE, Nursery, Outcome, Step, needs_strace, sample
from test_killed_at_every_call import Store

_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN, _IOR('X', 125, __u32)
_NO_LOG_FLUSH = 2  # EXT4_GOING_FLAGS_NOLOGFLUSH
_SIZE = 96 << 20  # bytes of the disk


class Disk:
    """An ext4 file system in a file, mounted at ``point``; a ``with`` block unmounts it whatever happens.

    It writes back as late as it may, and does not make up for a missing sync before a rename, as other file systems
    do not either.
    """

    def __init__(self, folder: Path) -> None:
        self.point = folder / "disk"
        self._image = folder / "disk.image"
        self._kept = folder / "disk.kept"

    def __enter__(self) -> Disk:
        self.point.mkdir()
        with open(self._image, "wb") as file:
            file.truncate(_SIZE)
        _do("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1", str(self._image))
        try:
            self.mount()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if os.path.ismount(self.point):
            subprocess.run(["umount", "-l", str(self.point)], check=False)  # lazily: even what is still open is let go

    def mount(self) -> None:
        _do("mount", "-o", "loop,commit=600,noauto_da_alloc", str(self._image), str(self.point))

    def unmount(self) -> None:
        _do("umount", str(self.point))

    def keep(self) -> None:
        """Remember what is on the disk, for ``restore``."""
        self.unmount()
        _do("cp", "--sparse=always", str(self._image), str(self._kept))
        self.mount()

    def restore(self) -> None:
        self.unmount()
        _do("cp", "--sparse=always", str(self._kept), str(self._image))
        self.mount()

    def lose_power(self) -> None:
        """Lose whatever was not synced, and come back."""
        descriptor = os.open(self.point, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(descriptor)
        self.unmount()
        self.mount()


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


@functools.cache
def why_no_disk() -> str:
    """Return why power cannot be lost here, or nothing."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "losing power needs root, to mount an ext4 of its own"
    with tempfile.TemporaryDirectory() as folder:
        try:
            with Disk(Path(folder)) as disk:
                disk.lose_power()
        except OSError as error:
            return f"losing power needs an ext4 mounted from a file, which does not work here: {error}"
    return ""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if reason := why_no_disk():
        pytest.skip(reason)
    with Disk(tmp_path) as disk:
        yield disk


@pytest.fixture
def nursery(tmp_path: Path) -> Iterator[Nursery]:
    with Nursery(tmp_path) as nursery:
        yield nursery


class Ruin:
    """A store of which a part lies on a disk that loses power, in one of three ways.

    Args:
        disk: that loses power.
        folder: on another disk, which does not.
        layout: what is on the first one: ``all``, ``checkpoints`` or ``database``. What is synced for the one would
            otherwise hide what was forgotten for the other: a sync writes the journal, and with it every rename.
        epochs: prepared.
    """

    def __init__(self, disk: Disk, folder: Path, layout: str, epochs: Sequence[int], **options: object) -> None:
        self.disk = disk
        self.layout = layout
        on_disk, beside = disk.point / "store", folder / "store"
        self.store = {
            "all": lambda: Store(on_disk),
            "checkpoints": lambda: Store(on_disk, beside / "e.db"),
            "database": lambda: Store(beside, on_disk / "e.db"),
        }[layout]()
        self._beside = None if layout == "all" else beside
        self.store.prepare(*epochs, **options)
        self.store.restore()
        shutil.rmtree(on_disk.with_suffix(".kept"))
        disk.keep()

    def restore(self) -> None:
        self.disk.restore()
        if self._beside is not None:
            shutil.rmtree(self._beside)
            shutil.copytree(self._beside.with_suffix(".kept"), self._beside)


SCENARIOS: dict[str, tuple[tuple[int, ...], list[Step], list[Step]]] = {
    "save": ((1, 2, 3), [["open"]], [["save", 4], ["save", 5], ["close"]]),
    "save in the background": ((1, 2, 3), [["open", {"async_save": True}]], [["save", 4], ["close"]]),
    "save of large files": ((1, 2, 3), [["open", {"max_shard_size": 9 << 20}]], [["save", LARGE]]),
    "delete": ((1, 2, 3), [["open"]], [["pin", 1], ["delete", 2], ["close"]]),
    "retention": ((1, 2, 3, 4, 5), [["open", {"max_checkpoints": 2}]], [["save", 6], ["close"]]),
    "first opening": ((), [], [["create"], ["open"], ["save", 2], ["close"]]),
}


def build(disk: Disk, folder: Path, layout: str, scenario: str) -> tuple[Ruin, list[Step], list[Step]]:
    """Prepare a disk for a scenario; return it, and what the child does before and under strace."""
    epochs, before, steps = SCENARIOS[scenario]
    ruin = Ruin(disk, folder, layout, epochs, max_checkpoints=2 if scenario == "retention" else None)
    return ruin, before, [[v, *(ruin.store.id_of(a) if v in ("delete", "pin") else a for a in m)] for v, *m in steps]


def survives(
    nursery: Nursery,
    ruin: Ruin,
    steps: Sequence[Step],
    before: Sequence[Step],
    point: tuple[str, int] | None,
    mutants: Sequence[tuple[str, str]] = (),
    retains: bool = False,
) -> tuple[Outcome, list[str]]:
    """Kill the child at a point, or let it end, and lose power; return what it said and what broke a promise."""
    ruin.restore()
    inject = [f"{point[0]}:signal=SIGKILL:when={point[1]}"] if point else []
    outcome = nursery.run(ruin.store.address, steps, before, inject, mutants)
    ruin.disk.lose_power()
    return outcome, ruin.store.violations(outcome.words, retains)


@needs_strace
@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("layout", ["all", "checkpoints", "database"])
def test_power_loss_at_any_call_loses_nothing_acknowledged_and_shows_nothing_partial(
    layout: str,
    scenario: str,
    disk: Disk,
    tmp_path: Path,
    nursery: Nursery,
    chance: random.Random,
    effort: Callable[[int, int], int],
    tried: Callable[[int], None],
) -> None:
    ruin, before, steps = build(disk, tmp_path, layout, scenario)
    retains = scenario == "retention"
    whole, found = survives(nursery, ruin, steps, before, None, (), retains)
    assert (whole.failures, found) == ([], [])
    points = sample(whole, chance, effort(6 if layout == "all" else 4, 10**9))
    tried(len(points) + 1)
    for point in points:
        outcome, found = survives(nursery, ruin, steps, before, point, (), retains)
        assert outcome.failures == [], point
        assert found == [], (point, outcome.calls[-1:])
