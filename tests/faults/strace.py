"""Faults at system calls: a child under ``strace`` that is killed or refused at one call.

Run as a program this file is a nursery: it imports and warms up the engine once, then forks a child for each task. So
strace sees the calls of the operation alone, and a point costs tens of milliseconds.

strace counts the calls of each name by thread. A point is therefore a name and a number: the third ``write`` of
whichever thread comes to its third one first.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import resource
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.errors import ModelCheckpointError

ROOT = Path(__file__).parents[2]
DEADLINE = 60.0  # seconds after which a child counts as hung
LARGE = 1000  # epochs from here on have states of 19 MB: threads, reserved room and early write-back are worth it
MANY = 2000  # epochs from here on have 1,500 arrays, of which one is of 800 kB: long headers
WIDE = 3000  # epochs from here on have 400 numbers: long manifests, if each is a shard
LAST = 10**6 - 2  # the epoch that is saved to show that saving works
ENDED = "ended"
# Everything that can change a file system; a kill at any other call leaves what a kill at the next of these leaves.
CHANGING = (
    "?open,openat,?creat,write,pwrite64,writev,pwritev,pwritev2,sendfile,copy_file_range,fsync,fdatasync,sync,syncfs,"
    "sync_file_range,fallocate,?rename,?renameat,renameat2,?mkdir,mkdirat,?rmdir,?unlink,unlinkat,?link,linkat,"
    "?symlink,symlinkat,truncate,ftruncate"
)
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
Step = list[Any]  # the name of a method of ``Actor`` and its arguments
Word = list[Any]  # what a child says, through a socket: no call of ``CHANGING`` is needed for that


def loss_of(epoch: int) -> float:
    """Return the loss of an epoch; even epochs do better, so that the newest is not always the best."""
    return (1 + epoch % 2) / epoch


def state_of(epoch: int) -> dict[str, Any]:
    """Return model and optimizer of an epoch; every number tells which."""
    count = 1_200_000 if LARGE <= epoch < MANY else 60
    model: dict[str, Any] = {"w": array("d", [epoch]) * count, "n": epoch}
    if MANY <= epoch < LAST:
        layers = 1500 if epoch < WIDE else 400
        model = {f"layer {i}": array("d", [epoch + i]) * (100_000 if i == 700 else 1) for i in range(layers)}
    return {"model": model, "optimizer": {"m": array("d", [-epoch]) * count}}


class Actor:
    """What a child can be told to do, through public calls only; it says what it begins and what was acknowledged."""

    def __init__(self, task: dict[str, Any], say: Any) -> None:
        self.task, self.say = task, say
        self.manager: EnhancedCheckpointManager | None = None

    def open(self, **options: Any) -> None:
        options = {"max_checkpoints": None, "io_threads": 2, "database_url": self.task["url"], **options}
        self.manager = EnhancedCheckpointManager(None, self.task["directory"], **options)

    def create(self) -> None:
        with ExperimentTracker("made", database_url=self.task["url"]) as tracker:
            self.task["experiment"] = tracker.experiment_id
        self.say("created", self.task["experiment"])

    def save(self, epoch: int, **options: Any) -> None:
        assert self.manager is not None
        self.say("saving", epoch)
        state = state_of(epoch)
        told = {"epoch": epoch, "loss": loss_of(epoch), "experiment_id": self.task["experiment"], **options}
        saved = self.manager.save_checkpoint(state["model"], state["optimizer"], **told)
        self.manager.wait()
        self.say("saved", saved, epoch)

    def delete(self, checkpoint_id: str) -> None:
        assert self.manager is not None
        self.say("deleting", checkpoint_id)
        self.manager.delete_checkpoint(checkpoint_id)
        self.say("deleted", checkpoint_id)

    def pin(self, checkpoint_id: str) -> None:
        assert self.manager is not None
        self.manager.pin(checkpoint_id)
        self.say("pinned", checkpoint_id)

    def limit(self, size: int) -> None:
        """Let no file grow beyond ``size`` bytes: the last write within is short, the next one fails."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def close(self) -> None:
        if self.manager is not None:
            self.manager.close()

    def act(self, steps: Sequence[Step]) -> None:
        """Take every step, also after one that failed, and say what it raised."""
        for verb, *arguments in steps:
            options = arguments.pop() if arguments and isinstance(arguments[-1], dict) else {}
            try:
                getattr(self, verb)(*arguments, **options)
                self.say("done", verb)
            except Exception as error:  # noqa: BLE001 - whatever it is, the parent judges it
                self.say("failed", verb, told_of(error))


def told_of(error: BaseException) -> dict[str, Any]:
    return {
        "type": type(error).__name__,
        "typed": isinstance(error, ModelCheckpointError),
        "errno": getattr(error, "errno", None),
        "path": getattr(error, "filename", None),
        "text": str(error),
        "cause": error.__cause__ and told_of(error.__cause__),
        "trace": "".join(traceback.format_exception(error)[-3:]),
    }


def serve() -> None:
    """Be the nursery: a task comes as a line, a forked child does it, what it says goes out through the socket."""
    out = socket.socket(fileno=1)

    def say(*words: Any) -> None:
        out.sendall(json.dumps(words).encode() + b"\n")

    with tempfile.TemporaryDirectory() as folder:  # whatever the engine loads on first use is loaded now
        warm = {"directory": f"{folder}/warm", "url": f"sqlite:///{folder}/warm.db"}
        actor = Actor(warm, lambda *words: None)
        actor.act([["create"], ["open"], ["save", 1], ["save", LARGE, {"blocking": False}], ["close"]])
    for line in iter(sys.stdin.buffer.readline, b""):
        child = os.fork()
        if child == 0:
            live(json.loads(line), say)
        say(ENDED, os.waitpid(child, 0)[1])


def live(task: dict[str, Any], say: Any) -> NoReturn:
    try:
        os.setpgid(0, 0)
        for module, name in task["mutants"]:
            getattr(importlib.import_module(module), name)()
        actor = Actor(task, say)
        actor.act(task["before"])
        say("ready", os.getpid())
        os.read(0, 1)  # until strace has hold of us
        actor.act(task["steps"])
    except BaseException:  # noqa: BLE001 - nothing may get back into the nursery's loop
        say("failed", "child", {"text": traceback.format_exc(), "typed": False})
    finally:
        os._exit(0)


@dataclass
class Call:
    """A system call as strace saw it; ``number`` counts those of its name in its thread, from 1."""

    thread: str
    name: str
    number: int
    text: str
    injected: bool = False

    @property
    def paths(self) -> list[str]:
        return [of or name for of, name in re.findall(r'\d<(/[^>]*)>|"(/[^"]*)"', self.text)]

    @property
    def changes(self) -> bool:
        return not self.name.startswith("open") or "O_CREAT" in self.text

    @property
    def point(self) -> tuple[str, int]:
        return self.name, self.number


def calls_in(log: str) -> list[Call]:
    """Return the calls of a log of ``strace -f -y``, in the order in which they began."""
    calls: list[Call] = []
    last: dict[str, Call] = {}
    numbers: dict[tuple[str, str], int] = {}
    for line in log.splitlines():
        thread, _, text = line.partition(" ")
        text = text.strip()
        if begun := re.match(r"(\w+)\(", text):
            key = thread, begun[1]
            numbers[key] = numbers.get(key, 0) + 1
            last[thread] = Call(thread, begun[1], numbers[key], text)
            calls.append(last[thread])
        if "(INJECTED)" in text and thread in last:
            last[thread].injected = True
    return calls


class Outcome(NamedTuple):
    """How a child ended: what it said, its wait status, and its calls."""

    words: list[Word]
    status: int
    calls: list[Call]

    @property
    def failures(self) -> list[tuple[str, dict[str, Any]]]:
        return [(word[1], word[2]) for word in self.words if word[0] == "failed"]

    @property
    def injected(self) -> list[Call]:
        return [call for call in self.calls if call.injected]


def sample(whole: Outcome, chance: random.Random, most: int) -> list[tuple[str, int]]:
    """Return at most so many of the points of an undisturbed run, each a call that changes something, in its order."""
    points = list(dict.fromkeys(call.point for call in whole.calls if call.changes))
    kept = set(chance.sample(points, min(most, len(points))))
    return [point for point in points if point in kept]


class Nursery:
    """Children for one test; a ``with`` block ends the process that forks them.

    Args:
        folder: for logs, outside every store.
    """

    def __init__(self, folder: Path) -> None:
        self._log = folder / "strace.log"
        self._ours, theirs = socket.socketpair()
        self._errors = tempfile.TemporaryFile()
        path = os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=theirs,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": path},
            bufsize=0,
        )
        theirs.close()
        self._said = b""

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._ours.close()
        self._errors.close()

    def _hear(self) -> Word:
        while b"\n" not in self._said:
            ready = select.select([self._ours], [], [], DEADLINE)[0]
            part = self._ours.recv(1 << 16) if ready else b""
            if not part:
                self._errors.seek(0)
                problem = "ended" if ready else "hangs"
                raise AssertionError(f"the child {problem}: {self._errors.read().decode()}")
            self._said += part
        line, _, self._said = self._said.partition(b"\n")
        word: Word = json.loads(line)
        return word

    def _put(self, data: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(data)

    def run(
        self,
        address: dict[str, str],
        steps: Sequence[Step],
        before: Sequence[Step] = (),
        inject: Sequence[str] = (),
        mutants: Sequence[tuple[str, str]] = (),
        traced: str = CHANGING,
    ) -> Outcome:
        """Let a child take ``before``, then ``steps`` under strace with these injections.

        Args:
            address: where: ``directory``, ``url`` of the database, and ``experiment``.
            steps, before: for ``Actor.act``.
            inject: as after ``-e inject=``.
            mutants: module and name of functions that break the child's engine.
            traced: names of the calls to be seen; none of them: without strace.
        """
        task = {"steps": steps, "before": before, "mutants": mutants, **address}
        self._put(json.dumps(task).encode() + b"\n")
        words: list[Word] = []
        while not words or words[-1][0] not in ("ready", ENDED):
            words.append(self._hear())
        assert words[-1][0] == "ready", words
        if not traced:
            self._put(b"g")
            return Outcome(*self._end(words[:-1]), [])
        command = ["strace", "-f", "-y", "-o", str(self._log), "-e", f"trace={traced}"]
        command += [part for what in inject for part in ("-e", "inject=" + what)]
        with subprocess.Popen([*command, "-p", str(words[-1][1])], stderr=subprocess.PIPE) as strace:
            assert strace.stderr is not None
            line = strace.stderr.readline()
            assert b"attached" in line, line + strace.stderr.read()
            self._put(b"g")
            said, status = self._end(words[:-1])
            strace.communicate(timeout=DEADLINE)
        return Outcome(said, status, calls_in(self._log.read_text(errors="replace")))

    def _end(self, words: list[Word]) -> tuple[list[Word], int]:
        while not words or words[-1][0] != ENDED:
            words.append(self._hear())
        return words[:-1], words[-1][1]


if __name__ == "__main__":
    serve()
