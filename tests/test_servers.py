"""Without a database server its tests are skipped, with a line that says how to start one; in CI they fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import servers


@pytest.fixture(params=servers.KINDS[1:])
def missing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A kind of server that nobody listens as."""
    kind = str(request.param)
    monkeypatch.setenv(f"MODEL_CHECKPOINT_TEST_{kind.upper()}_URL", f"{kind}://nobody@127.0.0.1:1/test")
    servers._server.cache_clear()
    yield kind
    servers._server.cache_clear()


def test_the_skip_is_one_line_that_says_how_to_start_a_server(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MODEL_CHECKPOINT_REQUIRE_SERVERS", raising=False)
    with pytest.raises(pytest.skip.Exception) as caught, servers.new_database(missing, tmp_path):
        pass
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"no {missing} server for tests (")
    assert f"set MODEL_CHECKPOINT_TEST_{missing.upper()}_URL, or start one: docker run " in line


def test_where_servers_are_required_their_absence_is_a_failure(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_CHECKPOINT_REQUIRE_SERVERS", "1")
    with pytest.raises(pytest.fail.Exception, match=f"no {missing} server"), servers.new_database(missing, tmp_path):
        pass
