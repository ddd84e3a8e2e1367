"""Messages that hooks send, on real servers of this machine."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from email import message_from_bytes, policy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.errors import ConfigurationError, HookRegistrationError, NotificationError
from model_checkpoint.hooks import HookEvent, HookManager
from model_checkpoint.hooks.notifications import EmailNotificationHook, WebhookNotificationHook

aiosmtpd_controller = pytest.importorskip("aiosmtpd.controller")
trustme = pytest.importorskip("trustme")

DEADLINE = 20.0
EVENT = HookEvent.ON_EXPERIMENT_END


class Received(BaseHTTPRequestHandler):
    """Answers what the server is told to, in turn, and notes what came."""

    server: WebServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append((self.path, dict(self.headers), body))
        answer = self.server.answers.pop(0) if self.server.answers else 200
        if answer == "hang up":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(int(answer))
        if 300 <= int(answer) < 400:
            self.send_header("Location", f"http://localhost:{self.server.server_port}/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class WebServer(ThreadingHTTPServer):
    """A web server of this machine."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Received)
        self.received: list[tuple[str, dict[str, str], bytes]] = []
        self.answers: list[int | str] = []
        self.url = f"http://127.0.0.1:{self.server_port}/hook/top-secret-token"


@pytest.fixture
def web() -> Iterator[WebServer]:
    server = WebServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(DEADLINE)


def webhook(web: WebServer, **options: Any) -> WebhookNotificationHook:
    return WebhookNotificationHook(web.url, ["127.0.0.1"], **{"delay": 0.001, **options})


def fire(hook: Any, **data: Any) -> HookManager:
    """Fire an event for the hook, and wait until that is done."""
    hooks = HookManager()
    hooks.register_hook(hook)
    hooks.fire_hook(EVENT, experiment_id="e-1", data=data)
    assert hooks.wait(DEADLINE)
    return hooks


def failures(hooks: HookManager) -> int:
    (stats,) = hooks.get_performance_stats().values()
    return stats["failed_calls"]


# --- webhooks -----------------------------------------------------------------------------------------------------


def test_an_event_arrives_as_json(web: WebServer) -> None:
    class Tensor:
        def __repr__(self) -> str:
            return "tensor(1.)"

    before = time.time()
    data = {"status": "failed", "loss": float("nan"), "limit": float("inf"), "best": ("a", 1), "x": Tensor(), 5: {1.5}}
    hooks = fire(webhook(web, headers={"Authorization": "Bearer b"}), **{str(k): v for k, v in data.items()})
    ((path, headers, body),) = web.received
    told = json.loads(body)
    assert path == "/hook/top-secret-token"
    assert headers["Content-Type"] == "application/json"
    assert headers["Authorization"] == "Bearer b"
    assert "X-Signature-256" not in headers
    assert (told["event"], told["experiment_id"], told["checkpoint_id"]) == ("on_experiment_end", "e-1", None)
    assert before <= told["time"] <= time.time()
    assert told["data"] == {
        "status": "failed", "loss": "nan", "limit": "inf", "best": ["a", 1], "x": "tensor(1.)", "5": [1.5]
    }  # fmt: skip
    assert failures(hooks) == 0


def test_the_signature_is_that_of_timestamp_and_body(web: WebServer) -> None:
    fire(webhook(web, secret="s3cret"), status="completed")
    ((_, headers, body),) = web.received
    signed = headers["X-Timestamp"].encode() + b"." + body
    expected = hmac.new(b"s3cret", signed, hashlib.sha256).hexdigest()
    assert headers["X-Signature-256"] == f"sha256={expected}"
    assert abs(int(headers["X-Timestamp"]) - time.time()) < 60


@pytest.mark.parametrize("answers", [[500, 503, 429], ["hang up", 408, 502]])
def test_what_may_pass_is_tried_again(web: WebServer, answers: list[int | str]) -> None:
    web.answers = list(answers)
    hooks = fire(webhook(web))
    assert len(web.received) == 4
    assert failures(hooks) == 0


def test_after_the_last_try_it_has_failed_and_the_log_has_no_secret(
    web: WebServer, caplog: pytest.LogCaptureFixture
) -> None:
    web.answers = [500] * 10
    with caplog.at_level(logging.DEBUG):
        hooks = fire(webhook(web, tries=3, secret="s3cret"))
    assert len(web.received) == 3
    assert failures(hooks) == 1
    assert "webhook at 127.0.0.1 answered 500" in caplog.text
    assert "top-secret-token" not in caplog.text
    assert "s3cret" not in caplog.text


@pytest.mark.parametrize("answer", [400, 401, 404, 301, 307])
def test_what_is_refused_for_good_or_leads_elsewhere_is_not_tried_again(web: WebServer, answer: int) -> None:
    web.answers = [answer]
    hooks = fire(webhook(web))
    assert [path for path, *_ in web.received] == ["/hook/top-secret-token"]
    assert failures(hooks) == 1


def test_a_host_that_is_not_there_is_an_error_that_names_it(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    hook = WebhookNotificationHook(f"http://localhost:{port}/x", ["localhost"], tries=2, delay=0.001)
    assert failures(fire(hook)) == 1
    assert "webhook at localhost" in caplog.text


def test_a_server_that_never_answers_ends_with_the_request_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        hook = WebhookNotificationHook(url, ["127.0.0.1"], tries=2, delay=0.001, request_timeout=0.05)
        assert failures(fire(hook)) == 1


@pytest.mark.parametrize(
    ("url", "hosts"),
    [
        ("http://evil.example/x", ["good.example"]),
        ("http://good.example@evil.example/x", ["good.example"]),
        ("http://good.example.evil.example/x", ["good.example"]),
        ("http://127.0.0.1/x", []),
        ("file:///etc/passwd", ["", "good.example"]),
        ("good.example/x", ["good.example"]),
        (None, ["good.example"]),
        ("http://good.example/x", "good.example"),
    ],
)
def test_messages_go_to_allowed_hosts_only(url: Any, hosts: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"webhook|allowed_hosts"):
        WebhookNotificationHook(url, hosts)


@pytest.mark.parametrize(
    "wrong",
    [
        {"headers": {"Authorization": "Bearer SEKRET\n"}},
        {"headers": {"A": None}},
        {"headers": {"Ä": "b"}},
        {"secret": ""},
        {"secret": 5},
        {"url": "http://127.0.0.1/SEKRET a"},
        {"url": "http://127.0.0.1/SEKRETä"},
        {"url": "http://user:SEKRET@127.0.0.1/x"},
        {"url": "http://127.0.0.1:99999/SEKRET"},
        {"url": "http://127.0.0.1:SEKRET/x"},
        {"url": "http://[::1/SEKRET"},
        {"allowed_hosts": [5]},
    ],
)
def test_what_cannot_be_sent_is_refused_when_it_is_given_without_telling_a_secret(wrong: dict[str, Any]) -> None:
    given: dict[str, Any] = {"url": "http://127.0.0.1/x", "allowed_hosts": ["127.0.0.1"], **wrong}
    with pytest.raises(ConfigurationError) as caught:
        WebhookNotificationHook(**given)
    assert "SEKRET" not in str(caught.value)


def drip(listener: socket.socket, begin: bytes, again: bytes, stop: threading.Event) -> None:
    """Answer every connection with ``begin``, and then with ``again`` for ever."""
    while not stop.is_set():
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        try:
            connection.sendall(begin)
            while not stop.wait(0.001):
                connection.sendall(again)
        except OSError:
            connection.close()


@pytest.fixture(params=["headers", "continue", "greeting"])
def endless(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    """A server whose answer never ends, of a kind, and its port."""
    begin, again = {
        "headers": (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
        "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        "greeting": (b"", b"220-and more\r\n" * 100),
    }[request.param]
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener, begin, again, stop), daemon=True)
        thread.start()
        yield request.param, listener.getsockname()[1]
        stop.set()
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(DEADLINE)


def test_an_answer_that_never_ends_is_cut_off(endless: tuple[str, int], caplog: pytest.LogCaptureFixture) -> None:
    kind, port = endless
    options: dict[str, Any] = {"tries": 2, "delay": 0.001, "request_timeout": 0.3}
    if kind == "greeting":
        hook: Any = EmailNotificationHook("127.0.0.1", port, "a@b.c", ["d@e.f"], security="none", **options)
    else:
        hook = WebhookNotificationHook(f"http://127.0.0.1:{port}/", ["127.0.0.1"], **options)
    assert failures(fire(hook)) == 1  # which waits for it
    assert "did not answer as one should" in caplog.text


@pytest.mark.parametrize(
    "options", [{"tries": 0}, {"delay": 0}, {"request_timeout": -1}, {"request_timeout": float("nan")}, {"delay": "1"}]
)
def test_what_cannot_be_tried_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises((ConfigurationError, HookRegistrationError), match=r"tries|times|delay|request_timeout"):
        WebhookNotificationHook("http://a.example/", ["a.example"], **options)


def test_training_does_not_wait_and_the_end_of_a_run_gets_out(web: WebServer, tmp_path: Path) -> None:
    with ExperimentTracker("run", database_url=f"sqlite:///{tmp_path}/runs.db") as tracker:
        tracker.hook_manager.register_hook(webhook(web))
        EnhancedCheckpointManager(tracker, tmp_path / "c").save_checkpoint({"a": b"1"}, loss=0.5)
    assert tracker.hook_manager.wait(DEADLINE)
    told = [json.loads(body) for _, _, body in web.received]
    assert sorted(each["event"] for each in told) == ["on_best_model_update", "on_experiment_end"]
    assert next(e["data"]["status"] for e in told if e["event"] == "on_experiment_end") == "completed"


# --- email --------------------------------------------------------------------------------------------------------


class Mailbox:
    """What the mail server has taken, and what it answers instead."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.envelopes: list[Any] = []
        self.answers: list[str] = []
        self.logins: list[tuple[bytes, bytes]] = []

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        if self.answers:
            return self.answers.pop(0)
        self.envelopes.append(envelope)
        self.messages.append(message_from_bytes(envelope.content, policy=policy.default))
        return "250 taken"

    async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: Any) -> str:
        if address.startswith("nobody@"):
            return "550 there is none"
        envelope.rcpt_tos.append(address)
        return "250 OK"


@pytest.fixture
def mailbox() -> Mailbox:
    return Mailbox()


@pytest.fixture
def authority() -> Any:
    return trustme.CA()


def contexts(authority: Any) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return those of a server on localhost, and of a client that trusts it."""
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return server, client


ENCRYPTED = pytest.mark.parametrize("mail", ["starttls", "ssl"], indirect=True)


@pytest.fixture(params=["none", "starttls", "ssl"])
def mail(request: pytest.FixtureRequest, mailbox: Mailbox, authority: Any) -> Iterator[dict[str, Any]]:
    """A mail server, and the arguments that reach it."""
    from aiosmtpd.smtp import AuthResult, LoginPassword

    def log_in(server: Any, session: Any, envelope: Any, mechanism: str, data: Any) -> Any:
        assert isinstance(data, LoginPassword)
        mailbox.logins.append((data.login, data.password))
        return AuthResult(success=data.password == b"right", handled=False)

    server, client = contexts(authority)
    options: dict[str, Any] = {"hostname": "localhost", "port": free_port(), "authenticator": log_in}
    if request.param == "starttls":
        options |= {"tls_context": server, "require_starttls": True}
    if request.param == "ssl":
        options |= {"ssl_context": server, "auth_require_tls": False}
    controller = aiosmtpd_controller.Controller(mailbox, **options)
    controller.start()
    yield {
        "host": "localhost",
        "port": controller.port,
        "sender": "engine@example.org",
        "recipients": ["me@example.org", "you@example.org"],
        "security": request.param,
        "tls": client,
        "delay": 0.001,
    }
    controller.stop()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port


def test_an_event_arrives_as_an_email(mail: dict[str, Any], mailbox: Mailbox) -> None:
    hooks = fire(EmailNotificationHook(**mail), status="failed", loss=float("nan"), note="grüße")
    assert failures(hooks) == 0
    (message,), (envelope,) = mailbox.messages, mailbox.envelopes
    assert message["Subject"] == "on_experiment_end: e-1"
    assert message["Date"]
    assert message["Message-ID"]
    assert (message["From"], message["To"]) == ("engine@example.org", "me@example.org, you@example.org")
    assert envelope.rcpt_tos == ["me@example.org", "you@example.org"]
    text = message.get_content()
    for line in ("event: on_experiment_end", "experiment: e-1", "status: failed", "loss: nan", "note: grüße"):
        assert line in text.splitlines()


def test_no_login_goes_out_without_encryption() -> None:
    with pytest.raises(ConfigurationError, match="without encryption"):
        EmailNotificationHook("a", 25, "a@b.c", ["d@e.f"], username="me", password="right", security="none")


@ENCRYPTED
def test_a_login_goes_out_encrypted(mail: dict[str, Any], mailbox: Mailbox) -> None:
    assert failures(fire(EmailNotificationHook(**mail, username="me", password="right"))) == 0
    assert mailbox.logins == [(b"me", b"right")]
    assert len(mailbox.messages) == 1


@ENCRYPTED
def test_a_wrong_password_is_not_tried_again_and_not_logged(
    mail: dict[str, Any], mailbox: Mailbox, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "model_checkpoint"):
        assert failures(fire(EmailNotificationHook(**mail, username="me", password="wr0ng"))) == 1
    assert 1 <= len(mailbox.logins) <= 2  # the client goes through the ways of logging in, once
    assert "call 1 of" not in caplog.text
    assert "answered 535" in caplog.text
    assert "wr0ng" not in caplog.text


def test_a_mail_server_that_is_busy_is_tried_again_and_one_that_refuses_is_not(
    mail: dict[str, Any], mailbox: Mailbox
) -> None:
    mailbox.answers = ["451 later", "421 later"]
    assert failures(fire(EmailNotificationHook(**mail))) == 0
    assert len(mailbox.messages) == 1
    mailbox.answers = ["554 never"]
    assert failures(fire(EmailNotificationHook(**mail))) == 1
    assert (mailbox.answers, len(mailbox.messages)) == ([], 1)
    assert failures(fire(EmailNotificationHook(**{**mail, "recipients": ["nobody@example.org"]}))) == 1


def test_a_recipient_that_is_refused_beside_others_is_told(
    mail: dict[str, Any], mailbox: Mailbox, caplog: pytest.LogCaptureFixture
) -> None:
    hook = EmailNotificationHook(**{**mail, "recipients": ["me@example.org", "nobody@example.org"]})
    assert failures(fire(hook)) == 1
    assert [envelope.rcpt_tos for envelope in mailbox.envelopes] == [["me@example.org"]]
    assert "nobody@example.org (550" in caplog.text


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": "x"},
        {"host": None},
        {"tls": "x"},
        {"recipients": [""]},
        {"sender": None},
        {"password": "p"},
        {"username": "u"},
    ],
)
def test_what_no_mail_server_takes_is_refused(wrong: dict[str, Any]) -> None:
    given: dict[str, Any] = {"host": "localhost", "port": 25, "sender": "a@b.c", "recipients": ["d@e.f"], **wrong}
    with pytest.raises(ConfigurationError):
        EmailNotificationHook(**given)


@ENCRYPTED
def test_a_certificate_that_nobody_vouches_for_is_refused(mail: dict[str, Any], mailbox: Mailbox) -> None:
    hooks = HookManager()
    errors: list[BaseException] = []
    hook = EmailNotificationHook(**{**mail, "tls": None})
    hooks.register_hook("mail", hook.execute, [EVENT], error_handler=lambda error, context: errors.append(error))
    hooks.fire_hook(EVENT)
    assert isinstance(errors[0], NotificationError)
    assert "certificate" in str(errors[0])
    assert mailbox.messages == []


def test_line_breaks_cannot_add_headers(mail: dict[str, Any], mailbox: Mailbox) -> None:
    hooks = HookManager()
    hooks.register_hook(EmailNotificationHook(**mail))
    hooks.fire_hook(
        EVENT, experiment_id="e\r\nBcc: evil@example.org\r\n\r\nbody", data={"a": "x\r\n.\r\nMAIL FROM:<b>"}
    )
    assert hooks.wait(DEADLINE)
    (message,), (envelope,) = mailbox.messages, mailbox.envelopes
    assert message["Bcc"] is None
    assert envelope.rcpt_tos == ["me@example.org", "you@example.org"]
    for wrong in (
        {"sender": "a@b\r\nBcc: c@d"},
        {"recipients": ["a@b\nX: y"]},
        {"recipients": "a@b"},
        {"security": "tls"},
    ):
        with pytest.raises(ConfigurationError):
            EmailNotificationHook(**{**mail, **wrong})
