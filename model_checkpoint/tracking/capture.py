"""What a run needs to be repeated: commit and patch, command, packages, host.

Secrets in arguments and URLs are hidden where a name tells that they are some. The patch is stored as it is.
"""

from __future__ import annotations

import codecs
import importlib.metadata
import logging
import os
import platform
import pwd
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from model_checkpoint.errors import ConfigurationError
from model_checkpoint.tracking.gpus import described, loaded_nvml

log = logging.getLogger(__name__)

Found = TypeVar("Found")

SWITCH = "MODEL_CHECKPOINT_CAPTURE"  # an environment variable; "off" turns everything off
_GIT_SECONDS = 2.0  # for all calls of git together
_MAX_PATCH = 1 << 20  # 1 MiB
_MAX_UNTRACKED = 100  # names
_HIDDEN = "***"
_SECRET = re.compile(  # whole words: --max-tokens, --tokenizer and --sort-key are none; Hydra has +token and ~token
    r"(^|[-_.+~])([a-z]*passwords?|passwd|passphrase|pwd|secrets?|token|credentials?|auth|"
    r"(api|access|private|signing|encryption|wandb|openai|anthropic|comet|neptune|hf|aws|azure)[-_.]?keys?)($|[-_.])"
)
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # between the words of apiKey, HFToken
_FIELD = re.compile(r"^(Name|Version): *(.*?) *$", re.MULTILINE)
_CREDENTIALS = re.compile(r"://[^/\s]*@")
_QUERY = re.compile(r"(?<=[?&])([^?&=\s]+)=[^&#\s]*")
# What "git apply" takes, whatever the user has configured. No program of his is run but the filters through which git
# reads his files, filter.<name>.clean: without them every file of theirs would count as changed.
_PLAIN_DIFF: tuple[str, ...] = (
    "-c",
    "diff.noprefix=false",
    "-c",
    "diff.mnemonicPrefix=false",
    "-c",
    "diff.relative=false",
)
_PLAIN_DIFF += ("diff", "--no-ext-diff", "--no-textconv", "--no-color", "--submodule=short", "--binary", "--unified=3")
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
            the commit and the patch of it (1 MiB at most; with whatever secrets are in those files; None where one is
            no UTF-8), and the names of untracked files (100 at most).
        command: arguments, interpreter, working directory, script. The values of options and of parts of URLs whose
            names look like secrets, ``--token`` or ``?password=``, are hidden; others are not, nor are positional
            arguments.
        packages: the version of Python and of every installed package.
        host: its name, user, CPU, memory and GPUs.
        system_metrics: whether the machine is watched while the run goes on; see ``SystemSampler``.
        environment: the names of the environment variables to store. There are no others.
        interval: seconds between two samples of the system metrics.

    Raises:
        ConfigurationError: ``environment`` holds no names, or ``interval`` is no positive number that a thread can
            wait for.
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
        if not (isinstance(self.interval, (int, float)) and 0 < self.interval <= threading.TIMEOUT_MAX):
            raise ConfigurationError(
                f"interval must be a number of seconds above 0, {threading.TIMEOUT_MAX:.0f} at most, not "
                f"{self.interval!r}; Capture(system_metrics=False) takes no samples"
            )

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


def folder() -> str | None:
    """Return the working directory; None where it was removed."""
    try:
        return os.getcwd()
    except OSError:
        return None


def at_once(capture: Capture) -> dict[str, Any]:
    """Return the parts that the program itself may change soon, in well under a millisecond; see ``later``."""
    parts: dict[str, Any] = {"captured_at": time.time()}
    if capture.command:
        parts["command"] = _part("command", _command)
    if capture.environment:
        parts["environment"] = {name: os.environ.get(name) for name in capture.environment}
    return _storable(parts)  # type: ignore[no-any-return]


def later(capture: Capture, cwd: str | None) -> dict[str, Any]:
    """Return the parts that take a while, up to three seconds, as JSON values.

    A part that cannot be found out is None, and the log says so (DEBUG). It never asks for anything, and imports no
    framework.

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
        if before.startswith("-") and "=" not in before and _is_secret(before):
            yield _HIDDEN
        else:
            yield _without_value(_public(argument, f"://{_HIDDEN}@"))
        before = argument


def _without_value(argument: str) -> str:
    """Hide the value of ``token=x``, also within ``--env=token=x``; Hydra's arguments have no dashes."""
    *names, _ = parts = argument.split("=")
    secret = next((index for index, name in enumerate(names) if _is_secret(name)), None)
    return argument if secret is None else "=".join([*parts[: secret + 1], _HIDDEN])


def _public(text: str, instead: str) -> str:
    """Return ``text`` with ``instead`` in place of the credentials of URLs, and the secrets of their queries hidden."""
    hidden = _QUERY.sub(lambda found: f"{found[1]}={_HIDDEN}" if _is_secret(found[1]) else found[0], text)
    return _CREDENTIALS.sub(instead, hidden)


def _is_secret(option: str) -> bool:
    return _SECRET.search(_CAMEL.sub("-", option).lower()) is not None


def _packages() -> dict[str, Any]:
    found: dict[str, str | None] = {}
    for each in importlib.metadata.distributions():
        # Not by its ``metadata``, which parses a page of text about each: 1 ms that training waits for.
        about = (each.read_text("METADATA") or each.read_text("PKG-INFO") or "").partition("\n\n")[0]
        fields = dict(_FIELD.findall(about))
        if "Name" in fields:
            found.setdefault(fields["Name"], fields.get("Version"))  # the first one on the path is the one imported
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
        "gpus": _part("gpus", lambda: described(loaded_nvml())),
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
    # The cheap ones first: in a large tree the others may take all the time there is.
    deadline = time.monotonic() + _GIT_SECONDS
    commit = _line(cwd, deadline, "rev-parse", "--verify", "--quiet", "HEAD")
    branch = _part("branch", lambda: _line(cwd, deadline, "symbolic-ref", "--quiet", "HEAD"))
    remote = _part("remote", lambda: _remote(cwd, deadline))
    dirty = _part("status", lambda: _status(cwd, deadline, "no") != [])
    patch = _part("patch", lambda: _patch(cwd, deadline)) if commit and dirty is not False else {"patch": ""}
    untracked = _part("untracked files", lambda: _status(cwd, deadline, "normal"))
    return {
        "commit": commit,
        "branch": branch and branch.removeprefix("refs/heads/"),
        "remote": remote,
        "dirty": dirty,
        "patch": None,
        "patch_truncated": False,
        **(patch or {}),
        "untracked": untracked and [entry[2:] for entry in untracked if entry.startswith("? ")][:_MAX_UNTRACKED],
    }


def _line(cwd: str | None, deadline: float, *arguments: str) -> str | None:
    """Return what git answers; None where it says quietly that there is nothing."""
    try:
        return _call_git(cwd, deadline, *arguments).decode("utf-8", "replace").rstrip("\n")
    except subprocess.CalledProcessError as error:
        if error.returncode == 1:
            return None
        raise


def _status(cwd: str | None, deadline: float, untracked: str) -> list[str]:
    """Return an entry for each file that was changed, is in conflict or untracked."""
    about = _call_git(cwd, deadline, "status", "--porcelain=v2", "-z", "--no-renames", f"--untracked-files={untracked}")
    return [entry for entry in about.decode("utf-8", "replace").split("\0") if entry]


def _patch(cwd: str | None, deadline: float) -> dict[str, Any]:
    patch = _call_git(cwd, deadline, *_PLAIN_DIFF, "HEAD")
    text = codecs.getincrementaldecoder("utf-8")().decode(patch[:_MAX_PATCH])  # it may be cut within a character
    if "\0" in text:
        raise ValueError("it holds NUL, which no database stores in a text")
    return {"patch": text, "patch_truncated": len(patch) > _MAX_PATCH}


def _remote(cwd: str | None, deadline: float) -> str | None:
    """Return the URL of ``origin``, or of the first remote."""
    try:
        listed = _call_git(cwd, deadline, "config", "-z", "--get-regexp", r"^remote\..*\.url$")
    except subprocess.CalledProcessError:
        return None  # it has none
    urls = dict(entry.split("\n", 1) for entry in listed.decode("utf-8", "replace").split("\0") if "\n" in entry)
    url = urls.get("remote.origin.url", next(iter(urls.values()), None))
    return None if url is None else _public(url, "://")


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
