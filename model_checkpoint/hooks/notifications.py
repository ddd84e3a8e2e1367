"""Built-in hooks that send messages: webhooks and email. They run in the background, so training does not wait.

Errors and logs name the host and never the whole address: the path of a webhook is often its password.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import smtplib
import ssl
import time
from collections.abc import Collection, Mapping, Sequence
from email.message import EmailMessage
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from model_checkpoint.errors import ConfigurationError, NotificationError
from model_checkpoint.hooks.base_hook import BaseHook, HookContext, HookEvent, HookPriority
from model_checkpoint.hooks.decorators import retry_on_failure

__all__ = ["EmailNotificationHook", "WebhookNotificationHook"]

_NEWS = (
    HookEvent.ON_EXPERIMENT_END,
    HookEvent.ON_BEST_MODEL_UPDATE,
    HookEvent.ON_CHECKPOINT_SAVE_FAILED,
    HookEvent.ON_INTEGRITY_FAILURE,
    HookEvent.ON_METRIC_THRESHOLD,
)
_SECURITY = ("ssl", "starttls", "none")


class _TryAgainError(NotificationError):
    """A message that may get through at another try."""


class _Notification(BaseHook):
    """A message for each event; subclasses say how one is sent."""

    events = _NEWS

    def __init__(
        self,
        name: str | None,
        events: Sequence[HookEvent] | None,
        tries: int,
        delay: float,
        request_timeout: float,
    ) -> None:
        super().__init__(name, events, HookPriority.BACKGROUND, async_execution=True)
        for argument, value in (("delay", delay), ("request_timeout", request_timeout)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ConfigurationError(f"{argument} must be a positive number of seconds, not {value!r}")
        self._seconds = request_timeout
        self._send_with_retries = retry_on_failure(tries, delay, errors=_TryAgainError)(self._send)

    def execute(self, context: HookContext) -> Any:
        """Send the message."""
        return self._send_with_retries(context)

    def _send(self, context: HookContext) -> Any:
        """Send it once; raises _TryAgainError where it is worth another try."""
        raise NotImplementedError


class WebhookNotificationHook(_Notification):
    """Sends each event as JSON to an address, by POST.

    The body is an object of ``event``, ``checkpoint_id``, ``experiment_id``, ``time`` (Unix seconds) and ``data``, the
    event's payload, in which NaN and the infinities are text, and what JSON does not know is as Python prints it.

    With a ``secret``, the request carries ``X-Timestamp`` and ``X-Signature-256``: ``sha256=`` and the hexadecimal
    HMAC-SHA256 of the timestamp, a dot, and the body. Whoever receives it computes the same and refuses old timestamps.

    Args:
        url: ``https://`` or ``http://``.
        allowed_hosts: the hosts that messages may go to, as they stand in addresses; ``url`` must have one of them. An
            address that comes from a config file can so not send them elsewhere. Redirects are not followed.
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
        events: Sequence[HookEvent] | None = None,
        headers: Mapping[str, str] | None = None,
        tries: int = 4,
        delay: float = 1.0,
        request_timeout: float = 10.0,
        name: str | None = None,
    ) -> None:
        super().__init__(name, events, tries, delay, request_timeout)
        parts = urlsplit(url) if isinstance(url, str) else None
        if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigurationError("url of a webhook must begin with https:// or http:// and a host")
        if isinstance(allowed_hosts, str):
            raise ConfigurationError(f"allowed_hosts must be a list of hosts, not the text {allowed_hosts!r}")
        if parts.hostname not in {host.lower() for host in allowed_hosts}:
            raise ConfigurationError(
                f"url of a webhook goes to {parts.hostname}, which is not among allowed_hosts: "
                f"{', '.join(allowed_hosts) or 'none'}"
            )
        self._url, self._host = url, parts.hostname
        self._secret = secret.encode() if isinstance(secret, str) else secret
        self._headers = {"Content-Type": "application/json", "User-Agent": "model-checkpoint", **(headers or {})}
        self._opener = build_opener(_NoRedirects)

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
        try:
            with self._opener.open(Request(self._url, body, headers), timeout=self._seconds) as answer:
                return {"status": answer.status}
        except HTTPError as error:
            error.close()
            text = f"webhook at {self._host} answered {error.code} {error.reason}"
            if error.code in (408, 425, 429) or error.code >= 500:
                raise _TryAgainError(text) from None
            raise NotificationError(f"{text}; it is not sent again") from None
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            raise _TryAgainError(f"webhook at {self._host}: {getattr(error, 'reason', error)!r}") from None


class _NoRedirects(HTTPRedirectHandler):
    """Lets a redirect be the answer: it may lead to a host that nobody has allowed."""

    def redirect_request(self, *_: Any) -> None:
        return None


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
        events: Sequence[HookEvent] | None = None,
        tries: int = 4,
        delay: float = 1.0,
        request_timeout: float = 10.0,
        name: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(name, events, tries, delay, request_timeout)
        if isinstance(recipients, str) or not recipients:
            raise ConfigurationError(f"recipients must be a list of addresses, not {recipients!r}")
        if security not in _SECURITY:
            raise ConfigurationError(f"security must be one of {', '.join(_SECURITY)}, not {security!r}")
        if username is not None and security == "none":
            raise ConfigurationError("a password is not sent without encryption; use security='starttls' or 'ssl'")
        self._host, self._port, self._security = host, port, security
        self._login = None if username is None else (username, password or "")
        self._tls = tls
        self._sender, self._recipients = sender, list(recipients)
        self._message("check", "")  # addresses that are none are refused now

    def _message(self, subject: str, text: str) -> EmailMessage:
        message = EmailMessage()
        try:
            message["From"], message["To"] = self._sender, ", ".join(self._recipients)
        except ValueError as error:
            raise ConfigurationError(f"sender or recipients cannot be used: {error}") from None
        message["Subject"] = " ".join(subject.split())  # a line break would begin another header
        message.set_content(text)
        return message

    def _send(self, context: HookContext) -> None:
        about = context.experiment_id or "model_checkpoint"
        lines = [f"{name}: {value}" for name, value in _plain(context.data).items()]
        head = [f"event: {context.event.value}", f"experiment: {context.experiment_id}"]
        head += [f"checkpoint: {context.checkpoint_id}"] if context.checkpoint_id else []
        message = self._message(f"{context.event.value}: {about}", "\n".join([*head, "", *lines, ""]))
        try:
            self._deliver(message)
        except smtplib.SMTPResponseException as error:
            text = f"mail server {self._host} answered {error.smtp_code} {_text(error.smtp_error)}"
            raise (NotificationError if error.smtp_code >= 500 else _TryAgainError)(text) from None
        except smtplib.SMTPRecipientsRefused as error:
            refused = {who: f"{code} {_text(why)}" for who, (code, why) in error.recipients.items()}
            for_good = all(code >= 500 for code, _ in error.recipients.values())
            raise (NotificationError if for_good else _TryAgainError)(f"mail server {self._host}: {refused}") from None
        except ssl.SSLCertVerificationError as error:
            raise NotificationError(f"mail server {self._host}: {error.verify_message}") from None
        except (OSError, smtplib.SMTPException) as error:
            raise _TryAgainError(f"mail server {self._host}: {error!r}") from None

    def _deliver(self, message: EmailMessage) -> None:
        tls = self._tls or (ssl.create_default_context() if self._security != "none" else None)
        if self._security == "ssl":
            server: smtplib.SMTP = smtplib.SMTP_SSL(self._host, self._port, timeout=self._seconds, context=tls)
        else:
            server = smtplib.SMTP(self._host, self._port, timeout=self._seconds)
        with server:
            if self._security == "starttls":
                server.starttls(context=tls)
            if self._login is not None:
                server.login(*self._login)
            server.send_message(message)


def _plain(value: Any) -> Any:
    """Return ``value`` as JSON knows it."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return repr(value)[:1000]


def _text(answer: bytes | str) -> str:
    return answer.decode("utf-8", "replace") if isinstance(answer, bytes) else answer
