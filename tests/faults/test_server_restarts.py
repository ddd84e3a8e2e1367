"""Row 10: a database server that is killed and started again under a run that goes on: nothing is lost or doubled.

The servers are the test's own, started from the binaries of this machine; where there are none the test says so.
"""

from __future__ import annotations

import contextlib
import glob
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from model_checkpoint import ExperimentTracker
from tests.servers import run as run_sql

DEADLINE = 60.0  # seconds that a server may take to start


class Server:
    """A database server with a data folder of its own.

    Args:
        command: starts it in the foreground.
        user: as whom, or None.
        url: where it will be.
    """

    def __init__(self, command: list[str], user: str | None, url: str) -> None:
        self.url = url
        self._command, self._user = command, user
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            self._command, user=self._user, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + DEADLINE
        while True:
            try:
                run_sql(self.url, "SELECT 1")
                return
            except Exception:  # noqa: BLE001 - whatever the driver says of a server that is not up yet
                assert self.process.poll() is None, "the server did not start"
                assert time.monotonic() < deadline, "the server did not come up in time"
                threading.Event().wait(0.1)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(DEADLINE)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def account(*names: str) -> str | None:
    """An account that a server agrees to run as, where we are root."""
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in names if name in known), None) if os.geteuid() == 0 else None


@pytest.fixture
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    tools = sorted(glob.glob("/usr/lib/postgresql/*/bin")) or [os.path.dirname(shutil.which("postgres") or "")]
    if not os.path.exists(os.path.join(tools[-1], "initdb")):
        pytest.skip("no PostgreSQL binaries here (initdb, postgres); the Debian package postgresql brings them")
    user, port = account("postgres"), free_port()
    data = Path("/tmp") / f"mc-{os.getpid()}-{port}"  # an account of its own cannot reach pytest's folders
    data.mkdir(mode=0o700)
    if user:
        shutil.chown(data, user)
    initdb = [f"{tools[-1]}/initdb", "-D", data, "-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-sync"]
    subprocess.run(initdb, user=user, check=True, stdout=subprocess.DEVNULL)
    command = [f"{tools[-1]}/postgres", "-D", str(data), "-p", str(port), "-k", str(data), "-h", "127.0.0.1"]
    server = Server(command, user, f"postgresql://postgres@127.0.0.1:{port}/postgres")
    yield server
    server.kill()
    shutil.rmtree(data)


@pytest.fixture
def mysql() -> Iterator[Server]:
    if not shutil.which("mariadbd") or not shutil.which("mariadb-install-db"):
        pytest.skip(
            "no MariaDB binaries here (mariadbd, mariadb-install-db); the Debian package mariadb-server has them"
        )
    user, port = account("mysql"), free_port()
    data = Path("/tmp") / f"mc-{os.getpid()}-{port}"
    data.mkdir(mode=0o700)
    if user:
        shutil.chown(data, user)
    options = ["--no-defaults", f"--datadir={data}"]
    install = ["mariadb-install-db", *options, "--auth-root-authentication-method=normal", "--skip-test-db"]
    subprocess.run(install, user=user, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    command = [
        shutil.which("mariadbd") or "",
        *options,
        f"--port={port}",
        f"--socket={data}/s",
        "--bind-address=127.0.0.1",
    ]
    server = Server(command, user, f"mysql://root@127.0.0.1:{port}/mysql")
    run_sql(server.url, "CREATE DATABASE runs")
    server.url = f"mysql://root@127.0.0.1:{port}/runs"
    yield server
    server.kill()
    shutil.rmtree(data)


@pytest.mark.parametrize("kind", ["postgresql", "mysql"])
def test_a_server_that_is_killed_and_started_again_has_every_point_once(
    kind: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chance: random.Random,
    effort: Callable[[int, int], int],
    tried: Callable[[int], None],
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    server: Server = request.getfixturevalue(kind)
    tracker = ExperimentTracker("run", database_url=server.url)
    step, restarts = 0, effort(3, 20)

    def log(points: int) -> None:
        nonlocal step
        for _ in range(points):
            tracker.log_metrics({"loss": float(step), "acc": float(-step)}, step=step)
            step += 1
            if chance.random() < 0.05:
                tracker.flush()

    for _ in range(restarts):
        log(chance.randrange(50, 400))
        killer = threading.Timer(chance.uniform(0, 0.05), server.kill)
        killer.start()
        log(chance.randrange(400, 2000))
        killer.join()
        log(50)
        tracker.flush()  # into the file: the server is away
        server.start()
    log(50)
    points = tracker.get_metrics()
    assert [point["step"] for point in points if point["metric_name"] == "loss"] == list(range(step))
    assert [point["metric_value"] for point in points if point["metric_name"] == "acc"] == [
        float(-i) for i in range(step)
    ]
    assert not list((tmp_path / "model_checkpoint" / "spool").iterdir())
    tracker.close()
    tried(restarts)
