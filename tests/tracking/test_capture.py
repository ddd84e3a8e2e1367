"""Reproducibility capture and system metrics, with real repositories, threads and processes."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from model_checkpoint import Capture, EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.database import EnhancedDatabaseConnection
from model_checkpoint.errors import ConfigurationError
from model_checkpoint.tracking import capture as capturing
from model_checkpoint.tracking import recording
from model_checkpoint.tracking.capture import SWITCH, at_once, folder, later
from model_checkpoint.tracking.system_metrics import SystemSampler
from model_checkpoint.utils.jsonable import to_jsonable

ROOT = Path(__file__).parents[2]
NEVER = 3600.0  # seconds; no sample is taken in a test
QUIET = Capture(git=False, packages=False, system_metrics=False)
OF_PROC = {"system/cpu_percent", "system/memory_percent", "system/process_memory_bytes"}
OF_PSUTIL = OF_PROC | {
    "system/disk_read_bytes",
    "system/disk_write_bytes",
    "system/network_sent_bytes",
    "system/network_received_bytes",
}


@pytest.fixture(autouse=True)
def _switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setattr(capturing, "_GIT_SECONDS", 20.0)  # the machine may be busy


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/e.db"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit, which is the working directory."""
    folder = tmp_path / "repository"
    folder.mkdir()
    monkeypatch.chdir(folder)
    git("init", "-q", "-b", "trunk")
    (folder / "train.py").write_text("lr = 1\n")
    git("add", "train.py")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "first")
    return folder


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def captured(capture: Capture) -> Any:
    return {**at_once(capture), **later(capture, folder())}


def of_git() -> Any:
    found = captured(Capture(command=False, packages=False, host=False))
    assert found.keys() == {"captured_at", "git"}
    return found["git"]


def stored(url: str, experiment_id: str) -> Any:
    database = EnhancedDatabaseConnection(url)
    found = database.experiments.captured(experiment_id)
    database.close()
    return found


def threads() -> set[threading.Thread]:
    """Return the threads of trackers; the one that looks after what is overdue is the process's and stays."""
    ours = {each for each in threading.enumerate() if each.name.startswith("model-checkpoint")}
    return {each for each in ours if each.name != "model-checkpoint-overdue"}


class Receiver:
    """Takes samples, and tells when the first one came."""

    def __init__(self) -> None:
        self.samples: list[Mapping[str, float]] = []
        self.came = threading.Event()

    def take(self, sample: Mapping[str, float]) -> None:
        self.samples.append(sample)
        self.came.set()


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when a tracker has logged a sample."""
    event = threading.Event()
    real = ExperimentTracker._log_system

    def log(self: ExperimentTracker, sample: Mapping[str, float]) -> None:
        real(self, sample)
        event.set()

    monkeypatch.setattr(ExperimentTracker, "_log_system", log)
    return event


def test_a_clean_repository(repository: Path) -> None:
    assert of_git() == {
        "commit": git("rev-parse", "HEAD"),
        "branch": "trunk",
        "remote": None,
        "dirty": False,
        "patch": "",
        "patch_truncated": False,
        "untracked": [],
    }


def test_the_patch_of_a_dirty_repository_brings_it_back(repository: Path) -> None:
    for setting in ("diff.noprefix", "diff.mnemonicPrefix", "diff.relative"):
        git("config", setting, "true")
    git("config", "color.ui", "always")
    git("config", "diff.external", "/bin/false")
    git("config", "status.showUntrackedFiles", "no")
    (repository / "train.py").write_text("lr = 2\n")
    (repository / "new.py").write_text("staged\n")
    git("add", "new.py")
    (repository / "notes with ü.txt").write_text("untracked\n")
    (repository / "below").mkdir()
    os.chdir(repository / "below")
    found = of_git()
    os.chdir(repository)
    assert found["dirty"]
    assert found["untracked"] == ["notes with ü.txt"]
    git("reset", "-q", "--hard")
    subprocess.run(["git", "apply"], input=found["patch"], text=True, check=True)
    assert (repository / "train.py").read_text() == "lr = 2\n"
    assert (repository / "new.py").read_text() == "staged\n"


@pytest.mark.parametrize("attributes", ["", "* diff\n"])
@pytest.mark.parametrize("content", [b"\0\1", b"caf\xe9\n", "café\n".encode()])
def test_a_patch_brings_back_every_byte_or_there_is_none(repository: Path, content: bytes, attributes: str) -> None:
    (repository / ".git" / "info" / "attributes").write_text(attributes)
    git("config", "diff.context", "0")
    (repository / "train.py").write_bytes(b"lr = 1\n" + content)
    found = of_git()
    assert found["dirty"]
    git("reset", "-q", "--hard")
    if found["patch"] is None:
        assert content == b"caf\xe9\n" or attributes
        return
    subprocess.run(["git", "apply"], input=found["patch"].encode(), check=True)
    assert (repository / "train.py").read_bytes() == b"lr = 1\n" + content


def test_a_patch_that_is_cut_within_a_character_is_kept(repository: Path) -> None:
    (repository / "train.py").write_text("lr = 1\n" + "".join(f"{'é' * n}\n" for n in range(2000)), encoding="utf-8")
    found = of_git()
    assert found["patch_truncated"]
    assert (1 << 20) - 1 <= len(found["patch"].encode()) <= 1 << 20


def test_a_slow_status_does_not_lose_the_commit(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git("remote", "add", "origin", "https://host/x.git")
    commit = git("rev-parse", "HEAD")
    real = shutil.which("git")
    (tmp_path / "git").write_text(f'#!/bin/sh\ncase "$*" in *status*) exit 9;; esac\nexec {real} "$@"\n')
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert of_git() == {
        "commit": commit,
        "branch": "trunk",
        "remote": "https://host/x.git",
        "dirty": None,
        "patch": "",
        "patch_truncated": False,
        "untracked": None,
    }


def test_what_is_long_is_cut(repository: Path) -> None:
    (repository / "train.py").write_text("x = 1\n" * 400_000)
    for number in range(150):
        (repository / f"{number:03}").touch()
    found = of_git()
    assert found["patch_truncated"]
    assert len(found["patch"]) == 1 << 20
    assert found["untracked"] == [f"{number:03}" for number in range(100)]


def test_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert of_git() is None


def test_a_repository_without_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    git("init", "-q", "-b", "trunk")
    assert (of_git()["commit"], of_git()["branch"]) == (None, "trunk")


def test_a_detached_head_has_no_branch(repository: Path) -> None:
    git("checkout", "-q", "--detach")
    assert (of_git()["commit"], of_git()["branch"]) == (git("rev-parse", "HEAD"), None)


@pytest.mark.parametrize(
    ("remote", "shown"),
    [
        ("https://me:p@ss@host/x.git", "https://host/x.git"),
        ("https://ghp_token@host/x.git", "https://host/x.git"),
        ("ssh://git@host:22/x.git", "ssh://host:22/x.git"),
        ("git@host:x.git", "git@host:x.git"),
        ("https://host/a@b.git", "https://host/a@b.git"),
    ],
)
def test_a_remote_is_stored_without_its_credentials(repository: Path, remote: str, shown: str) -> None:
    git("remote", "add", "another", "https://elsewhere/x.git")
    git("remote", "add", "origin", remote)
    assert of_git()["remote"] == shown


def test_without_git_the_rest_is_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with ExperimentTracker("n", database_url=url) as run:
        pass
    found = stored(url, run.experiment_id)
    assert found["git"] is None
    assert found["packages"]["versions"]["pytest"] == pytest.__version__
    assert found["host"]["pid"] == os.getpid()


def test_nobody_waits_for_a_git_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    (tmp_path / "git").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(capturing, "_GIT_SECONDS", 0.3)
    begun = time.monotonic()
    with ExperimentTracker("n", database_url=url) as run:
        pass
    assert time.monotonic() - begun < 10
    found = stored(url, run.experiment_id)
    assert found["git"] is None
    assert found["packages"] is not None


def test_secrets_are_never_stored(repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str) -> None:
    git("remote", "add", "origin", "https://me:hunter2@host/x.git")
    monkeypatch.setenv("MY_TOKEN", "hunter2")
    arguments = ["--password", "hunter2", "--token=hunter2", "--api-key", "hunter2", "--db.secret", "hunter2"]
    arguments += ["wandb.api_key=hunter2", "--apiKey=hunter2", "--use-token", "--hf_token", "hunter2"]
    arguments += ["--db", "postgresql://me:hunter2@host/x", "--url=https://hunter2@host"]
    arguments += ["+token=hunter2", "~token=hunter2", "++wandb.api_key=hunter2", "--env=HF_TOKEN=hunter2"]
    arguments += ["--HFToken=hunter2", "--dbpassword=hunter2", "--wandb_key", "hunter2", "--token=a=hunter2"]
    arguments += ["--url=https://h/x?token=hunter2", "postgresql://h/x?user=a&password=hunter2#x"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with ExperimentTracker("n", database_url=url) as run:
        pass
    found = stored(url, run.experiment_id)
    assert found["git"]["remote"] == "https://host/x.git"
    assert found["command"]["argv"][1:4] == ["--password", "***", "--token=***"]
    assert not any(b"hunter2" in path.read_bytes() for path in tmp_path.glob("e.db*"))


def test_arguments_that_are_no_secrets_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["train.py", "--max-tokens", "512", "--tokenizer=bert", "--lr", "0.1", "author=a", "--", "token", "x"]
    argv += ["--sort_key=a", "--env=LR=1", "--model=a==b", "https://h/x?max_tokens=5&page=2", "+HFTokenizer=x"]
    monkeypatch.setattr(sys, "argv", argv)
    assert captured(QUIET)["command"]["argv"] == argv


def test_only_named_variables_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEED", "7")
    monkeypatch.setenv("OTHER", "value-of-other")
    monkeypatch.delenv("MISSING", raising=False)
    assert captured(Capture(environment=("SEED", "MISSING")))["environment"] == {"SEED": "7", "MISSING": None}
    assert "value-of-other" not in json.dumps(captured(Capture()))


def test_the_command_is_that_of_the_moment_when_the_run_began(
    repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str
) -> None:
    """Some programs change their folder, and their arguments, as soon as they run."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "0.1"])
    with ExperimentTracker("n", database_url=url) as run:
        os.chdir(tmp_path)
        sys.argv = ["other"]
    found = stored(url, run.experiment_id)
    assert found["command"]["argv"] == ["train.py", "--lr", "0.1"]
    assert found["command"]["cwd"] == str(repository)
    assert found["command"]["executable"] == sys.executable
    assert found["git"]["branch"] == "trunk"


def test_everything_captured_can_be_stored(monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "\udcff", "a\0b", 3])
    found = captured(Capture())
    assert to_jsonable(found, "captured") == found
    assert found["command"]["argv"] == ["train.py", "\\udcff", "a\\0b", "3"]


def test_no_framework_is_imported(tmp_path: Path) -> None:
    script = "import sys; from model_checkpoint import Capture; from model_checkpoint.tracking.capture import later\n"
    script += (
        "print(later(Capture(), '/')['host']['cores'], {'torch', 'jax', 'numpy', 'tensorflow'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path).stdout
    assert shown.strip() == f"{len(os.sched_getaffinity(0))} set()"


@pytest.mark.parametrize("part", ["git", "command", "packages", "host"])
def test_each_part_can_be_turned_off(part: str, url: str) -> None:
    with ExperimentTracker("n", database_url=url, capture=Capture(**{part: False})) as run:
        pass
    parts = {"git", "command", "packages", "host"} - {part}
    assert stored(url, run.experiment_id).keys() == {"captured_at", *parts}


@pytest.mark.parametrize("by", ["variable", "argument"])
def test_everything_can_be_turned_off(by: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = threads()
    if by == "variable":
        monkeypatch.setenv(SWITCH, "OFF")
    for capture in (Capture.none(),) if by == "argument" else (None, Capture(interval=0.001)):
        with ExperimentTracker("n", database_url=url, capture=capture) as run:
            assert threads() == before
        with ExperimentTracker.resume(run.experiment_id, url, capture=capture):
            assert threads() == before
        assert stored(url, run.experiment_id) is None


def test_what_is_captured_is_no_part_of_the_users_metadata(url: str) -> None:
    with ExperimentTracker("n", database_url=url, metadata={"captured": "on tape"}) as run:
        pass
    with ExperimentTracker.resume(run.experiment_id, url) as run:
        assert run.record.metadata == {"captured": "on tape"}
        assert run.captured is not None
        assert run.captured["packages"]["versions"]["pytest"] == pytest.__version__


@pytest.mark.parametrize(
    "wrong", [{"environment": "HOME"}, {"environment": (1,)}, {"interval": 0}, {"interval": "1"}, {"interval": 1e10}]
)
def test_a_capture_that_cannot_be_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        Capture(**wrong)


def test_an_argument_that_is_no_capture_is_refused_before_anything_is_stored(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"Capture\.none\(\)"):
        ExperimentTracker("n", database_url=url, capture=False)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("e.db*"))


def test_resuming_adds_the_command_and_the_host(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExperimentTracker("n", database_url=url) as run:
        pass
    first = stored(url, run.experiment_id)
    for name in ("again", "once-more"):
        monkeypatch.setattr(sys, "argv", [name])
        ExperimentTracker.resume(run.experiment_id, url).close()
    now = stored(url, run.experiment_id)
    resumed = now.pop("resumed")
    assert now == first
    assert [each["command"]["argv"] for each in resumed] == [["again"], ["once-more"]]
    assert all(each.keys() == {"captured_at", "command", "host"} for each in resumed)


def test_a_run_that_captured_nothing_is_resumed_without_a_note(url: str) -> None:
    with ExperimentTracker("n", database_url=url, capture=Capture.none()) as run:
        pass
    ExperimentTracker.resume(run.experiment_id, url).close()
    assert stored(url, run.experiment_id) is None


def test_children_and_forks_capture_nothing(url: str, tmp_path: Path) -> None:
    with ExperimentTracker("n", database_url=url, capture=Capture(interval=NEVER)) as run:
        manager = EnhancedCheckpointManager(run, str(tmp_path / "c"))
        saved = manager.save_checkpoint({"n": 1})
        before = threads()
        with run.child("child") as child, run.fork_from(saved, "fork") as fork:
            assert child.captured is fork.captured is None
            assert threads() <= before
        manager.close()


def test_a_run_that_ends_at_once_without_being_closed_keeps_its_capture(url: str) -> None:
    script = f"from model_checkpoint import ExperimentTracker; run = ExperimentTracker('n', database_url={url!r})\n"
    script += "print(run.experiment_id)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=60)
    assert stored(url, done.stdout.strip()).keys() >= {"git", "packages", "host"}
    assert done.stderr == ""


def in_child(act: Callable[[], bool]) -> int:
    """Return the exit code of a forked child: 0 if ``act`` returns true there; it is killed after 30 seconds."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        code = 1
        try:
            code = 0 if act() else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_fork_in_the_middle_of_a_capture(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    release, begun, real = threading.Event(), threading.Event(), recording.later

    def later(capture: Capture, cwd: str | None) -> dict[str, Any]:
        begun.set()
        assert release.wait(60)
        return real(capture, cwd)

    monkeypatch.setattr(recording, "later", later)
    with ExperimentTracker("n", database_url=url, capture=Capture(interval=NEVER)) as run:
        assert begun.wait(30)

        def act() -> bool:
            run.log_metric("of_child", 1.0)
            run.close()
            return not threads()

        assert in_child(act) == 0
        release.set()
    assert stored(url, run.experiment_id).keys() >= {"git", "packages", "host"}
    with ExperimentTracker.resume(run.experiment_id, url, capture=Capture.none()) as again:
        assert len(again.get_metrics("of_child")) == 1


def test_a_capture_that_takes_too_long_does_not_hold_up_the_end(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(recording, "later", lambda *_: {"host": str(release.wait(60))})
    monkeypatch.setattr(recording, "_LONGEST_WAIT", 0.05)
    run = ExperimentTracker("n", database_url=url, capture=QUIET)
    thread = run._recording._capturing
    assert thread is not None
    run.close()
    assert thread.is_alive()
    release.set()
    thread.join(30)  # the database is closed by now: an unhandled error would fail the test
    assert stored(url, run.experiment_id).keys() == {"captured_at", "command"}


def test_the_thread_of_a_capture_imports_nothing(tmp_path: Path) -> None:
    """A fork during an import would leave the child unable to import that module."""
    script = f"""
import sys, threading
from model_checkpoint import ExperimentTracker
class Finder:
    def find_spec(self, name, path=None, target=None):
        if threading.current_thread().name == "model-checkpoint-capture":
            print(name)
sys.meta_path.insert(0, Finder())
ExperimentTracker("n", database_url="sqlite:///{tmp_path}/e.db").close()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    assert subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout == ""


def test_a_fork_waits_for_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    lock, inside, forking = threading.Lock(), threading.Event(), threading.Event()

    def count() -> None:
        with lock:  # psutil has one for these
            inside.set()
            forking.wait(30)

    monkeypatch.setitem(sys.modules, "psutil", SimpleNamespace(disk_io_counters=count))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    sampler = SystemSampler(Receiver().take, 0.01)
    real = sampler.before_fork

    def before_fork() -> None:
        forking.set()
        real()

    monkeypatch.setattr(sampler, "before_fork", before_fork)
    sampler.start()
    assert inside.wait(30)
    assert in_child(lambda: lock.acquire(blocking=False)) == 0
    sampler.stop()


@pytest.mark.parametrize("psutil", [True, False])
def test_the_machine_is_sampled(psutil: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if psutil:
        pytest.importorskip("psutil")
    else:
        monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    receiver = Receiver()
    sampler = SystemSampler(receiver.take, 0.2)
    sampler.start()
    assert receiver.came.wait(30)
    sampler.stop()
    found = receiver.samples[0]
    assert found.keys() == (OF_PSUTIL if psutil else OF_PROC)
    assert 0 <= found["system/cpu_percent"] <= 100
    assert 0 < found["system/memory_percent"] < 100
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert found["system/process_memory_bytes"] == pytest.approx(resident, rel=0.2)


def test_cpu_percent_is_the_share_of_busy_time() -> None:
    from model_checkpoint.tracking.system_metrics import _Cpu

    times = iter([(100.0, 50.0), (200.0, 75.0), (200.0, 75.0)])
    cpu = _Cpu(lambda: next(times))
    assert cpu() == {"system/cpu_percent": 75.0}
    assert cpu() == {}, "no time has gone by"


class NVMLError(Exception):
    pass


def nvml(**changes: Any) -> Any:
    """Something like pynvml on a machine with two GPUs, of which the second does not tell its utilisation."""

    def utilization(handle: int) -> Any:
        if handle:
            raise NVMLError("not supported")
        return SimpleNamespace(gpu=42)

    made = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_TEMPERATURE_GPU=0,
        open=0,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetName=lambda handle: b"A" if handle else "B",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=80 + handle, used=10 + handle),
        nvmlDeviceGetUtilizationRates=utilization,
        nvmlDeviceGetTemperature=lambda handle, sensor: 50 + handle,
    )
    made.nvmlInit = lambda: setattr(made, "open", made.open + 1)
    made.nvmlShutdown = lambda: setattr(made, "open", made.open - 1)
    vars(made).update(changes)
    return made


def test_gpus_are_described_and_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    pynvml = nvml()
    monkeypatch.setitem(sys.modules, "pynvml", pynvml)
    gpus = captured(QUIET)["host"]["gpus"]
    assert gpus == [{"name": "B", "memory_bytes": 80}, {"name": "A", "memory_bytes": 81}]
    receiver = Receiver()
    sampler = SystemSampler(receiver.take, 0.01)
    sampler.start()
    assert receiver.came.wait(30)
    sampler.stop()
    assert {name: value for name, value in receiver.samples[0].items() if "gpu" in name} == {
        "system/gpu0/utilization_percent": 42,
        "system/gpu0/memory_bytes": 10,
        "system/gpu0/temperature_celsius": 50,
        "system/gpu1/memory_bytes": 11,
        "system/gpu1/temperature_celsius": 51,
    }
    assert pynvml.open == 0


def test_a_gpu_that_cannot_be_opened_is_left_out_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def handle(number: int) -> int:
        if number == 0:
            raise NVMLError("no permission")
        return number

    def name(_: int) -> str:
        raise NVMLError("lost")

    pynvml = nvml(nvmlDeviceGetHandleByIndex=handle, nvmlDeviceGetName=name, nvmlShutdown=_no_driver)
    monkeypatch.setitem(sys.modules, "pynvml", pynvml)
    assert captured(QUIET)["host"]["gpus"] == [{"name": None, "memory_bytes": 81}]
    receiver = Receiver()
    sampler = SystemSampler(receiver.take, 0.01)
    sampler.start()
    assert receiver.came.wait(30)
    sampler.stop()
    assert "system/memory_percent" in receiver.samples[0]
    assert {key for key in receiver.samples[0] if "gpu" in key} == {
        "system/gpu1/memory_bytes",
        "system/gpu1/temperature_celsius",
    }


def test_a_broken_optional_package_counts_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    for name in ("pynvml", "psutil"):
        (tmp_path / f"{name}.py").write_text("raise OSError('wrong ELF class')\n")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with ExperimentTracker("n", database_url=url, capture=Capture(git=False, packages=False)) as run:
        run.log_metric("loss", 1.0)
    assert stored(url, run.experiment_id)["host"]["gpus"] == []


def _no_driver() -> None:
    raise NVMLError("no driver")


def test_without_a_driver_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(nvmlInit=_no_driver))
    assert captured(QUIET)["host"]["gpus"] == []
    receiver = Receiver()
    sampler = SystemSampler(receiver.take, 0.01)
    sampler.start()
    assert receiver.came.wait(30)
    sampler.stop()
    assert not any("gpu" in name for name in receiver.samples[0])


@pytest.mark.parametrize("running", [True, False])
def test_torch_is_asked_only_when_its_cuda_runs(running: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    cuda = SimpleNamespace(is_initialized=lambda: running, device_count=lambda: 1)
    cuda.get_device_properties = lambda _: SimpleNamespace(name="A", total_memory=80)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert captured(QUIET)["host"]["gpus"] == ([{"name": "A", "memory_bytes": 80}] if running else [])


def test_system_metrics_do_not_show_among_the_users_own(url: str, sampled: threading.Event) -> None:
    with ExperimentTracker("n", database_url=url, capture=Capture(interval=0.2)) as run:
        run.log_metric("loss", 0.5, step=1)
        assert sampled.wait(30)
        assert [each["metric_name"] for each in run.get_metrics()] == ["loss"]
        assert run.metric_summaries().keys() == {"loss"}
        found = run.get_metrics("system/cpu_percent")
        assert found[0].keys() == {"metric_name", "metric_value", "step", "timestamp"}
        assert 0 <= found[0]["metric_value"] <= 100
        assert found[0]["step"] is None
        assert run.metric_history("system/cpu_percent").values[0] == found[0]["metric_value"]


def test_system_metrics_alone_can_be_turned_off(url: str) -> None:
    before = threads()
    with ExperimentTracker("n", database_url=url, capture=QUIET) as run:
        assert {each.name for each in threads() - before} <= {"model-checkpoint-capture"}
    assert stored(url, run.experiment_id).keys() == {"captured_at", "command", "host"}


def test_a_tracker_that_is_closed_while_it_samples_leaves_no_thread(url: str, sampled: threading.Event) -> None:
    before = threads()
    for _ in range(10):
        sampled.clear()
        run = ExperimentTracker("n", database_url=url, capture=Capture(git=False, packages=False, interval=1e-4))
        assert sampled.wait(30)
        run.close()
        for ending in threads() - before:
            ending.join(30)  # the writer has let go of everything, and may be at its last line
        assert threads() <= before


def test_a_sampler_stops_at_once_and_starts_again() -> None:
    receiver = Receiver()
    sampler = SystemSampler(receiver.take, NEVER)
    before = threads()
    for _ in range(2):
        sampler.start()
        sampler.start()
        assert len(threads() - before) == 1
        begun = time.monotonic()
        sampler.stop()
        assert time.monotonic() - begun < 2  # it waits for three seconds for a thread that does not end
        assert threads() <= before
    assert not receiver.samples


def test_nothing_is_logged_after_a_stop() -> None:
    class Slow(Receiver):
        def take(self, sample: Mapping[str, float]) -> None:
            self.came.set()
            assert go.wait(30)
            self.samples.append(sample)

    go, receiver = threading.Event(), Slow()
    sampler = SystemSampler(receiver.take, 0.01)
    sampler.start()
    assert receiver.came.wait(30)
    stopping = threading.Thread(target=sampler.stop)
    stopping.start()
    go.set()
    stopping.join(30)
    assert len(receiver.samples) == 1


def test_an_error_while_logging_does_not_end_the_sampling() -> None:
    class Failing(Receiver):
        def take(self, sample: Mapping[str, float]) -> None:
            self.samples.append(sample)
            if len(self.samples) == 1:
                raise OSError("disk full")
            self.came.set()

    receiver = Failing()
    sampler = SystemSampler(receiver.take, 0.01)
    sampler.start()
    assert receiver.came.wait(30)
    sampler.stop()


def test_a_sampler_keeps_nobody_alive(url: str) -> None:
    before = threads()
    run = ExperimentTracker("n", database_url=url, capture=Capture(interval=NEVER))
    gone = weakref.ref(run)
    del run
    gc.collect()
    assert gone() is None
    assert threads() <= before


def test_a_forked_child_samples_when_it_is_told_to() -> None:
    receiver = Receiver()
    sampler = SystemSampler(receiver.take, 0.01)
    sampler.start()
    assert receiver.came.wait(30)

    def act() -> bool:
        receiver.came.clear()
        if threads():
            return False
        sampler.start()
        came = receiver.came.wait(20)
        sampler.stop()
        return came and not threads()

    assert in_child(act) == 0
    receiver.came.clear()
    assert receiver.came.wait(30), "the parent goes on"
    sampler.stop()
