"""Users' tokens: where they come from, and that each call shows the one that holds now, to all parties the same."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mpcinfer.client.aio import AsyncClient
from mpcinfer.client.data import Client
from mpcinfer.client.tokens import TokenFile, read_token, source
from mpcinfer.errors import ConfigError, TamperingError
from tests.client.fakes import FakeCluster, info, spec
from tests.inprocess import wait_for

X = torch.ones(1, 3)
SAME = info("same", [spec("x", -1, 3)], [spec("y", -1, 3)])


def put(path: Path, token: str, mode: int = 0o600) -> Path:
    """Replace a file as a careful program does: at once."""
    fresh = path.with_name("fresh")
    fresh.write_text(token)
    fresh.chmod(mode)
    os.replace(fresh, path)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return put(tmp_path / "user.jwt", "first.token\n")


def test_a_file_is_read_again_when_it_changes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = TokenFile(file)
    assert token() == read_token(file) == "first.token"
    put(file, "other.token\n")  # of the same length
    assert token() == "other.token"
    file.write_text("third.token of another length\n")  # in place
    assert token() == "third.token of another length"
    monkeypatch.setattr("mpcinfer.client.tokens._read", lambda path: pytest.fail("it has not changed"))
    assert token() == "third.token of another length"
    assert "third" not in repr(token)


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        ("first.token", 0o644, "chmod 600"),
        ("first.token", 0o620, "chmod 600"),
        ("", 0o600, "holds no token"),
        ("first\ntoken", 0o600, "holds no token"),
        ("fir\u017ft", 0o600, "holds no token"),
    ],
)
def test_files_that_are_not_as_they_must_be(file: Path, content: str, mode: int, message: str) -> None:
    token = TokenFile(file)
    put(file, content, mode)
    for read in (token, lambda: TokenFile(file), lambda: read_token(file)):
        with pytest.raises(ConfigError, match=message) as error:
            read()
        assert "first" not in str(error.value)
    put(file, "good.token")
    assert token() == "good.token"


def test_a_file_that_is_gone(file: Path) -> None:
    token = TokenFile(file)
    file.unlink()
    for read in (token, lambda: TokenFile(file)):
        with pytest.raises(ConfigError, match="cannot read"):
            read()
    put(file, "good.token")
    assert token() == "good.token"


def test_rights_that_are_given_away_later_are_noticed(file: Path) -> None:
    token = TokenFile(file)
    file.chmod(0o604)
    with pytest.raises(ConfigError, match="chmod 600"):
        token()


def test_where_tokens_come_from(file: Path) -> None:
    found: list[Any] = [source("a.b.c"), source(lambda: "d.e.f"), source(file)]
    assert [each() for each in found] == ["a.b.c", "d.e.f", "first.token"] and source(None) is None


def shown(world: FakeCluster) -> list[set[str]]:
    """By party, the tokens it was shown since it was last looked at."""
    found = [{token for _, token in party.tokens} for party in world.parties]
    for party in world.parties:
        party.tokens.clear()
    return found


def test_each_call_shows_the_token_that_holds(world: FakeCluster, file: Path) -> None:
    world.deploy(SAME)
    with Client.connect(world.cluster, world.issue("client/a"), token=file) as client:
        client.infer("same", X)
        assert shown(world) == [{"first.token"}] * 2
        put(file, "other.token")
        client.infer("same", X)
        assert shown(world) == [{"other.token"}] * 2
        client._connection.forget_session(b"s" * 16)  # does not wait; to the gateway itself the session does not exist
        wait_for(lambda: all(party.tokens == [("EndSession", "other.token")] for party in world.parties))
        file.unlink()
        with pytest.raises(ConfigError, match="cannot read"):
            client.infer("same", X)
        client._connection.forget_session(b"s" * 16)  # nothing that could be shown, and nobody to tell


def test_asyncio_shows_tokens_too(world: FakeCluster, file: Path) -> None:
    world.deploy(SAME)

    async def main(token: Any) -> None:
        async with await AsyncClient.connect(world.cluster, world.issue("client/a"), token=token) as client:
            assert len(await client.models()) == 1
            await client.infer("same", X)

    for token, expected in ((file, "first.token"), ("a.b.c", "a.b.c"), (lambda: "d.e.f", "d.e.f")):
        asyncio.run(main(token))
        assert shown(world) == [{expected}] * 2
    asyncio.run(main(None))
    assert shown(world) == [set()] * 2
    with pytest.raises(ConfigError, match="cannot read"):
        asyncio.run(main(file.with_name("none")))


def test_a_receipt_for_the_gateway_itself_is_none_for_its_user(
    world: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parties that drop the token and work for the gateway are noticed."""
    world.deploy(SAME)
    monkeypatch.setattr("tests.client.fakes.SUBJECT", "client/a")
    with Client.connect(world.cluster, world.issue("client/a"), token="a.b.c") as client:
        with pytest.raises(TamperingError, match="client differ"):
            client.infer("same", X)
