"""What a run needs to be repeated: commit and patch, command, packages, host. Secrets are taken out before storing."""

from __future__ import annotations

import importlib.metadata
import logging
import math
import os
import platform
import pwd
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from model_checkpoint.errors import ConfigurationError
from model_checkpoint.tracking.gpus import described, find_nvml

log = logging.getLogger(__name__)

Found = TypeVar("Found")

SWITCH = "MODEL_CHECKPOINT_CAPTURE"  # an environment variable; "off" turns everything off
_GIT_SECONDS = 2.0  # for all calls of git together
_MAX_PATCH = 1 << 20  # 1 MiB
_MAX_UNTRACKED = 100  # names
_HIDDEN = "***"
_SECRET = re.compile(  # whole words: --max-tokens and --tokenizer are none
    r"(^|[-_.])(passwords?|passwd|passphrase|pwd|secrets?|token|credentials?|auth|"
    r"api[-_.]?keys?|(access|private)[-_.]?keys?)($|[-_.])"
)
_CREDENTIALS = re.compile(r"://[^/\s]*@")
# What "git apply" takes, whatever the user has configured; no program of his is run.
_PLAIN_DIFF: tuple[str, ...] = (
    "-c",
    "diff.noprefix=false",
    "-c",
    "diff.mnemonicPrefix=false",
    "-c",
    "diff.relative=false",
)
_PLAIN_DIFF += ("diff", "--no-ext-diff", "--no-textconv", "--no-color", "--submodule=short")
_QUIET = {
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_NO_LAZY_FETCH": "1",  # a partial clone would go to the network
}


@dataclass(frozen=True)
class Capture:
    """What is captured of a run, everything by default. ``MODEL_CHECKPOINT_CAPTURE=off`` turns all of it off.

    Attributes:
        git: of the repository that the process runs in: commit, branch, remote URL, whether tracked files differ from
            the commit and the patch of it (1 MiB at most), and the names of untracked files (100 at most).
        command: arguments, interpreter, working directory, script. The values of options whose names look like
            secrets, ``--token`` or ``--db-password``, are hidden; others are not, nor are positional arguments.
        packages: the version of Python and of every installed package.
        host: its name, user, CPU, memory and GPUs.
        system_metrics: whether the machine is watched while the run goes on; see ``SystemSampler``.
        environment: the names of the environment variables to store. There are no others.
        interval: seconds between two samples of the system metrics.

    Raises:
        ConfigurationError: ``environment`` holds no names, or ``interval`` is no positive number.
    """

    git: bool = True
    command: bool = True
    packages: bool = True
    host: bool = True
    system_metrics: bool = True
    environment: tuple[str, ...] = ()
    interval: float = 10.0

    def __post_init__(self) -> None:
        if type(self.environment) is not tuple or not all(isinstance(name, str) for name in self.environment):
            raise ConfigurationError(f"environment must be a tuple of names, not {self.environment!r}")
        if not (isinstance(self.interval, (int, float)) and 0 < self.interval < math.inf):
            raise ConfigurationError(f"interval must be a number of seconds above 0, not {self.interval!r}")

    @classmethod
    def none(cls) -> Capture:
        """Return the one that captures nothing."""
        return cls(git=False, command=False, packages=False, host=False, system_metrics=False)

    @property
    def stores(self) -> bool:
        """Whether there is anything to store beside metrics."""
        return self.git or self.command or self.packages or self.host or bool(self.environment)

    @property
    def again(self) -> Capture:
        """What is captured when the run is resumed: the command and the host."""
        return replace(self, git=False, packages=False, environment=())


def in_force(capture: Capture | None) -> Capture:
    """Return what is to be captured: the default for None, and nothing where the environment forbids it.

    Raises:
        ConfigurationError: it is no Capture.
    """
    if capture is not None and not isinstance(capture, Capture):
        raise ConfigurationError(f"capture must be a Capture, not {capture!r}; Capture.none() turns it off")
    if os.environ.get(SWITCH, "").strip().lower() == "off":
        return Capture.none()
    return Capture() if capture is None else capture


def captured(capture: Capture) -> dict[str, Any]:
    """Return what is captured, as JSON values; a part that cannot be found out is None, and the log says so (DEBUG).

    Takes up to three seconds; it never asks for anything, and imports no framework.
    """
    return {**at_once(capture), **later(capture, folder())}


def folder() -> str | None:
    """Return the working directory; None where it was removed."""
    try:
        return os.getcwd()
    except OSError:
        return None


def at_once(capture: Capture) -> dict[str, Any]:
    """Return the parts that the program itself may change soon, in well under a millisecond; see ``captured``."""
    parts: dict[str, Any] = {"captured_at": time.time()}
    if capture.command:
        parts["command"] = _part("command", _command)
    if capture.environment:
        parts["environment"] = {name: os.environ.get(name) for name in capture.environment}
    return _storable(parts)  # type: ignore[no-any-return]


def later(capture: Capture, cwd: str | None) -> dict[str, Any]:
    """Return the parts that take a while; see ``captured``.

    Args:
        capture: which.
        cwd: the folder whose repository is meant.
    """
    parts: dict[str, Any] = {}
    if capture.host:
        parts["host"] = _part("host", _host)
    if capture.packages:
        parts["packages"] = _part("packages", _packages)
    if capture.git:
        parts["git"] = _part("git", lambda: _git(cwd))
    return _storable(parts)  # type: ignore[no-any-return]


def _part(name: str, find: Callable[[], Found]) -> Found | None:
    try:
        return find()
    except Exception as error:  # noqa: BLE001 - of any system and any installation; the run goes on
        log.debug("%s of the run cannot be captured: %s", name, error)
        return None


def _command() -> dict[str, Any]:
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    return {
        "argv": list(_without_secrets([str(argument) for argument in sys.argv])),
        "executable": sys.executable,
        "cwd": folder(),
        "script": os.path.abspath(script) if script else None,
    }


def _without_secrets(argv: list[str]) -> Iterator[str]:
    before = ""
    for argument in argv:
        name, equals, _ = argument.partition("=")
        if before.startswith("-") and "=" not in before and _is_secret(before):
            yield _HIDDEN
        elif equals and _is_secret(name):  # Hydra's arguments have no dashes
            yield f"{name}={_HIDDEN}"
        else:
            yield _CREDENTIALS.sub(f"://{_HIDDEN}@", argument)
        before = argument


def _is_secret(option: str) -> bool:
    words = re.sub(r"([a-z])([A-Z])", r"\1-\2", option)  # apiKey
    return _SECRET.search(words.lower()) is not None


def _packages() -> dict[str, Any]:
    found: dict[str, str] = {}
    for each in importlib.metadata.distributions():
        about = each.metadata  # read once: it is parsed anew each time
        if about is not None and about["Name"]:
            found.setdefault(about["Name"], about["Version"])  # the first one on the path is the one imported
    return {"python": sys.version, "versions": dict(sorted(found.items()))}


def _host() -> dict[str, Any]:
    return {
        "hostname": socket.gethostname(),
        "user": _user(),
        "pid": os.getpid(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": _part("gpus", lambda: described(find_nvml())),
    }


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())  # containers run as users that have no name


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _git(cwd: str | None) -> dict[str, Any]:
    deadline = time.monotonic() + _GIT_SECONDS
    about = _call_git(
        cwd, deadline, "status", "--porcelain=v2", "--branch", "-z", "--no-renames", "--untracked-files=normal"
    )
    entries = about.decode("utf-8", "replace").split("\0")
    headers = dict(entry[2:].split(" ", 1) for entry in entries if entry.startswith("# branch."))
    untracked = [entry[2:] for entry in entries if entry.startswith("? ")]
    dirty = any(entry[:2] in ("1 ", "u ") for entry in entries)  # changed, in conflict
    commit = headers["branch.oid"] if headers["branch.oid"] != "(initial)" else None
    branch = headers["branch.head"] if headers["branch.head"] != "(detached)" else None
    patch = _part("patch", lambda: _patch(cwd, deadline)) if dirty and commit else {"patch": ""}
    return {
        "commit": commit,
        "branch": branch,
        "remote": _remote(cwd, deadline),
        "dirty": dirty,
        "patch": None,
        "patch_truncated": False,
        **(patch or {}),
        "untracked": untracked[:_MAX_UNTRACKED],
    }


def _patch(cwd: str | None, deadline: float) -> dict[str, Any]:
    patch = _call_git(cwd, deadline, *_PLAIN_DIFF, "HEAD")
    return {"patch": patch[:_MAX_PATCH].decode("utf-8", "replace"), "patch_truncated": len(patch) > _MAX_PATCH}


def _remote(cwd: str | None, deadline: float) -> str | None:
    """Return the URL of ``origin``, or of the first remote."""
    try:
        listed = _call_git(cwd, deadline, "config", "-z", "--get-regexp", r"^remote\..*\.url$")
    except subprocess.CalledProcessError:
        return None  # it has none
    urls = dict(entry.split("\n", 1) for entry in listed.decode("utf-8", "replace").split("\0") if "\n" in entry)
    url = urls.get("remote.origin.url", next(iter(urls.values()), None))
    return None if url is None else _CREDENTIALS.sub("://", url)


def _call_git(cwd: str | None, deadline: float, *arguments: str) -> bytes:
    return subprocess.run(
        ["git", "-c", "core.fsmonitor=false", *arguments],
        cwd=cwd,
        env={**os.environ, **_QUIET},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
        timeout=max(0.05, deadline - time.monotonic()),
    ).stdout


def _storable(value: Any) -> Any:
    """Return ``value`` with what no database stores in a text, NUL and bytes that are no UTF-8, written as escapes."""
    if isinstance(value, dict):
        return {_storable(name): _storable(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_storable(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    return value
