"""Built-in hooks that send messages: webhooks and email. They run in the background, so training does not wait.

Errors and logs name the host and never the whole address: the path of a webhook is often its password. A message has
all of the event's payload in it; of a failed save that is its config and notes, too.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import smtplib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from typing import Any
from urllib.parse import SplitResult, urlsplit

from model_checkpoint.errors import ConfigurationError, NotificationError
from model_checkpoint.hooks.base_hook import BaseHook, HookContext, HookEvent, HookPriority
from model_checkpoint.hooks.decorators import retry_on_failure
from model_checkpoint.utils.checks import check_count, check_positive

__all__ = ["EmailNotificationHook", "WebhookNotificationHook"]

_NEWS = (
    HookEvent.ON_EXPERIMENT_END,
    HookEvent.ON_BEST_MODEL_UPDATE,
    HookEvent.ON_CHECKPOINT_SAVE_FAILED,
    HookEvent.ON_INTEGRITY_FAILURE,
    HookEvent.ON_METRIC_THRESHOLD,
)
_SECURITY = ("ssl", "starttls", "none")
_MOST_BYTES = 1 << 20  # of answers; a server that says more is none
_DEEPEST = 20  # lists and dicts within one another


class _TryAgainError(NotificationError):
    """A message that may get through at another try."""


class _Notification(BaseHook):
    """A message for each event; subclasses say how one is sent."""

    events = _NEWS

    def __init__(
        self,
        name: str | None,
        events: HookEvent | Sequence[HookEvent] | None,
        tries: int,
        delay: float,
        request_timeout: float,
    ) -> None:
        super().__init__(name, events, HookPriority.BACKGROUND, async_execution=True)
        check_count(tries=tries)
        check_positive(delay=delay, request_timeout=request_timeout)
        self._seconds = request_timeout
        self._send_with_retries = retry_on_failure(tries, delay, errors=_TryAgainError)(self._send)

    def execute(self, context: HookContext) -> Any:
        """Send the message.

        Raises:
            NotificationError: it did not get through.
        """
        try:
            return self._send_with_retries(context)
        except _TryAgainError as error:
            raise NotificationError(f"{error}; that was the last try") from None

    def _send(self, context: HookContext) -> Any:
        """Send it once; raises _TryAgainError where it is worth another try."""
        raise NotImplementedError


@contextmanager
def _within(seconds: float, connected: Callable[[], socket.socket | None]) -> Iterator[None]:
    """Cut a connection off that is not done in time: a server may answer for ever, a bit at a time."""

    done = threading.Event()

    def cut() -> None:
        pause = seconds
        while not done.wait(pause):
            pause = 0.1  # there may be no socket yet, or another one in a moment, with TLS
            found = connected()
            if found is not None:
                with suppress(OSError):
                    found.shutdown(socket.SHUT_RDWR)

    threading.Thread(target=cut, name="model-checkpoint-deadline", daemon=True).start()
    try:
        yield
    finally:
        done.set()


class WebhookNotificationHook(_Notification):
    """Sends each event as JSON to an address, by POST.

    The body is an object of ``event``, ``checkpoint_id``, ``experiment_id``, ``time`` (Unix seconds) and ``data``, the
    event's payload, in which NaN and the infinities are text, and what JSON does not know is as Python prints it.

    With a ``secret``, the request carries ``X-Timestamp`` and ``X-Signature-256``: ``sha256=`` and the hexadecimal
    HMAC-SHA256 of the timestamp, a dot, and the body. Whoever receives it computes the same and refuses old timestamps.

    Args:
        url: ``https://`` or ``http://``.
        allowed_hosts: the hosts that messages may go to, as they stand in addresses; ``url`` must have one of them. An
            address that comes from a config file can so not send them elsewhere. Redirects are not followed, and
            proxies of the environment are not used.
        secret: for the signature; None sends none.
        events: which events; ends, new bests, failures, damage and thresholds unless given.
        headers: further headers, such as ``{"Authorization": "Bearer ..."}``.
        tries: how often at most: after an answer of 408, 425, 429 or from 500, or where nobody answers.
        delay: seconds before the second try; the double before each one after that.
        request_timeout: seconds for each.
        name: see ``BaseHook``.

    Raises:
        ConfigurationError: an argument that cannot be used.
    """

    def __init__(  # noqa: PLR0913 - what a request has
        self,
        url: str,
        allowed_hosts: Collection[str],
        secret: str | bytes | None = None,
        events: HookEvent | Sequence[HookEvent] | None = None,
        headers: Mapping[str, str] | None = None,
        tries: int = 4,
        delay: float = 1.0,
        request_timeout: float = 10.0,
        name: str | None = None,
    ) -> None:
        super().__init__(name, events, tries, delay, request_timeout)
        parts = _parts(url)
        if isinstance(allowed_hosts, str) or not all(isinstance(host, str) for host in allowed_hosts):
            raise ConfigurationError(f"allowed_hosts must be a list of hosts, not {allowed_hosts!r}")
        if parts.hostname not in {host.lower() for host in allowed_hosts}:
            raise ConfigurationError(
                f"url of a webhook goes to {parts.hostname}, which is not among allowed_hosts: "
                f"{', '.join(allowed_hosts) or 'none'}"
            )
        if secret is not None and (not isinstance(secret, (str, bytes)) or not secret):
            raise ConfigurationError(
                "secret of a webhook must be text or bytes, and not empty; None sends no signature"
            )
        for key, value in (headers or {}).items():
            if not all(isinstance(each, str) and each.isascii() and each.isprintable() for each in (key, value)):
                raise ConfigurationError(
                    f"headers of a webhook must be printable ASCII; {key!r} is not (is there a line break at its end?)"
                )
        self._host, self._port, self._secure = str(parts.hostname), parts.port, parts.scheme == "https"
        self._path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._secret = secret.encode() if isinstance(secret, str) else secret
        self._headers = {"Content-Type": "application/json", "User-Agent": "model-checkpoint", **(headers or {})}

    def _send(self, context: HookContext) -> dict[str, Any]:
        now = time.time()
        told = {name: getattr(context, name) for name in ("checkpoint_id", "experiment_id")}
        content = {"event": context.event.value, **told, "time": now, "data": _plain(context.data)}
        body = json.dumps(content, allow_nan=False).encode()
        headers = dict(self._headers)
        if self._secret is not None:
            stamp = str(int(now))
            digest = hmac.new(self._secret, stamp.encode() + b"." + body, hashlib.sha256).hexdigest()
            headers |= {"X-Timestamp": stamp, "X-Signature-256": f"sha256={digest}"}
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self._seconds)
        try:
            with _within(self._seconds, lambda: connection.sock):
                connection.request("POST", self._path, body, headers)
                status = connection.getresponse().status
        except ssl.SSLCertVerificationError as error:
            raise NotificationError(f"webhook at {self._host}: {error.verify_message}") from None
        except (OSError, http.client.HTTPException) as error:
            raise _TryAgainError(f"webhook at {self._host} did not answer as one should: {_short(error)}") from None
        finally:
            connection.close()
        if 200 <= status < 300:
            return {"status": status}
        text = f"webhook at {self._host} answered {status}"
        if status in (408, 425, 429) or status >= 500:
            raise _TryAgainError(text)
        raise NotificationError(f"{text}; it is not sent again")


def _parts(url: object) -> SplitResult:
    """Return the parts of a webhook's address; its text is in no error, for it is a secret."""
    try:
        parts = urlsplit(url) if isinstance(url, str) else None
        good = parts is not None and parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good or not isinstance(url, str) or parts is None:
        raise ConfigurationError("url of a webhook must begin with https:// or http:// and a host")
    if not (url.isascii() and url.isprintable()) or " " in url or parts.username is not None:
        raise ConfigurationError(
            "url of a webhook must be printable ASCII without spaces and without a user; write others like %20, "
            "and give a password in headers"
        )
    return parts


class EmailNotificationHook(_Notification):
    """Sends each event as an email.

    Args:
        host, port: of the mail server.
        sender: the address that it comes from.
        recipients: the addresses that it goes to.
        username, password: to log in with; None does not log in, and neither goes out without encryption.
        security: ``ssl`` (usual on port 465), ``starttls`` (587) or ``none``.
        events: which events; ends, new bests, failures, damage and thresholds unless given.
        tries, delay, request_timeout: as of ``WebhookNotificationHook``; a refusal for good (5xx) is not tried again.
        name: see ``BaseHook``.
        tls: a context to connect with; None checks certificates as the system does.

    Raises:
        ConfigurationError: an argument that cannot be used.
    """

    def __init__(  # noqa: PLR0913 - what a mail server wants to know
        self,
        host: str,
        port: int,
        sender: str,
        recipients: Sequence[str],
        username: str | None = None,
        password: str | None = None,
        security: str = "starttls",
        events: HookEvent | Sequence[HookEvent] | None = None,
        tries: int = 4,
        delay: float = 1.0,
        request_timeout: float = 10.0,
        name: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(name, events, tries, delay, request_timeout)
        check_count(port=port)
        if not isinstance(host, str) or not host:
            raise ConfigurationError(f"host must be the name of the mail server, not {host!r}")
        addresses = [] if isinstance(recipients, str) else [sender, *recipients]
        if len(addresses) < 2 or not all(isinstance(address, str) and "@" in address for address in addresses):
            raise ConfigurationError(f"sender and recipients must be addresses, not {sender!r} and {recipients!r}")
        if security not in _SECURITY:
            raise ConfigurationError(f"security must be one of {', '.join(_SECURITY)}, not {security!r}")
        if tls is not None and not isinstance(tls, ssl.SSLContext):
            raise ConfigurationError(f"tls must be an ssl.SSLContext or None, not {tls!r}")
        if (username is None) != (password is None):
            raise ConfigurationError("username and password of a mail server go together; give both or neither")
        if username is not None and security == "none":
            raise ConfigurationError("a password is not sent without encryption; use security='starttls' or 'ssl'")
        self._host, self._port, self._security = host, port, security
        self._login = None if username is None or password is None else (username, password)
        self._tls = tls
        self._sender, self._recipients = sender, list(recipients)
        self._message("check", "")  # addresses that are none are refused now

    def _message(self, subject: str, text: str) -> EmailMessage:
        message = EmailMessage()
        try:
            message["From"], message["To"] = self._sender, ", ".join(self._recipients)
        except (ValueError, AttributeError, TypeError) as error:
            raise ConfigurationError(f"sender or recipients cannot be used: {error}") from None
        message["Subject"] = " ".join(_encodable(subject).split())  # a line break would begin another header
        message["Date"], message["Message-ID"] = formatdate(localtime=True), make_msgid(domain="model-checkpoint")
        message.set_content(_encodable(text))
        return message

    def _send(self, context: HookContext) -> None:
        about = context.experiment_id or "model_checkpoint"
        lines = [f"{name}: {value}" for name, value in _plain(context.data).items()]
        head = [f"event: {context.event.value}", f"experiment: {context.experiment_id}"]
        head += [f"checkpoint: {context.checkpoint_id}"] if context.checkpoint_id else []
        message = self._message(f"{context.event.value}: {about}", "\n".join([*head, "", *lines, ""]))
        server = f"mail server {self._host}"
        try:
            refused = self._deliver(message)
        except smtplib.SMTPResponseException as error:
            kind = NotificationError if error.smtp_code >= 500 else _TryAgainError
            raise kind(f"{server} answered {error.smtp_code} {_short(error.smtp_error)}") from None
        except smtplib.SMTPRecipientsRefused as error:
            for_good = all(code >= 500 for code, _ in error.recipients.values())
            kind = NotificationError if for_good else _TryAgainError
            raise kind(f"{server} refuses {_refusals(error.recipients)}") from None
        except smtplib.SMTPNotSupportedError as error:
            raise NotificationError(f"{server} cannot do what is asked of it: {_short(error)}") from None
        except ssl.SSLCertVerificationError as error:
            raise NotificationError(f"{server}: {error.verify_message}") from None
        except (OSError, smtplib.SMTPException) as error:
            raise _TryAgainError(f"{server} did not answer as one should: {_short(error)}") from None
        if refused:
            raise NotificationError(f"{server} sent it to the others, but refuses {_refusals(refused)}")

    def _deliver(self, message: EmailMessage) -> dict[str, tuple[int, bytes]]:
        """Send it; returns the recipients that were refused, if others were not."""
        tls = self._tls or (ssl.create_default_context() if self._security != "none" else None)
        deadline, me = (
            time.monotonic() + self._seconds,
            socket.gethostname(),
        )  # no search for a full name: it may take long
        if self._security == "ssl":
            server: smtplib.SMTP = _SecureServer(local_hostname=me, timeout=self._seconds, context=tls)
        else:
            server = _Server(local_hostname=me, timeout=self._seconds)
        server._host = self._host  # type: ignore[attr-defined] # what certificates are compared with, which only its constructor sets
        try:
            with _within(self._seconds, lambda: server.sock):
                server.connect(self._host, self._port)
                if self._security == "starttls":
                    server.starttls(context=tls)
                if self._login is not None:
                    server.login(*self._login)
                refused = server.send_message(message)
                if time.monotonic() < deadline:
                    server.quit()
                return refused
        finally:
            server.close()


class _Bounded:
    """What a server says, up to so many bytes: smtplib keeps every line of an answer."""

    def __init__(self, file: Any) -> None:
        self._file, self._left = file, _MOST_BYTES

    def readline(self, size: int) -> bytes:
        line: bytes = self._file.readline(size)
        self._left -= len(line)
        if self._left < 0:
            raise OSError(f"it says more than {_MOST_BYTES:,} bytes")
        return line

    def close(self) -> None:
        self._file.close()


class _Server(smtplib.SMTP):
    """A mail server whose answers are bounded."""

    _answers: Any = None

    @property
    def file(self) -> Any:
        return self._answers

    @file.setter
    def file(self, opened: Any) -> None:
        self._answers = None if opened is None else _Bounded(opened)


class _SecureServer(_Server, smtplib.SMTP_SSL):
    """The same by TLS."""


def _plain(value: Any, depth: int = 0) -> Any:
    """Return ``value`` as JSON knows it."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else str(value)
    if depth < _DEEPEST and isinstance(value, Mapping):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if depth < _DEEPEST and isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item, depth + 1) for item in value]
    return repr(value)[:1000]


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _short(answer: object) -> str:
    """Return what a server said, so that it can do no harm in a log."""
    text = answer.decode("utf-8", "replace") if isinstance(answer, bytes) else str(answer)
    return ascii(text[:200])


def _refusals(refused: Mapping[str, tuple[int, bytes]]) -> str:
    return ", ".join(f"{who} ({code} {_short(why)})" for who, (code, why) in refused.items())
