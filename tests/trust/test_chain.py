"""Logs in which nothing can be changed unnoticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mpcinfer.errors import StoreError, TamperingError
from mpcinfer.trust import chain
from mpcinfer.trust.chain import Head, compare, linked, read


def lines(party: str, *more: dict[str, Any]) -> tuple[list[bytes], list[Head]]:
    """A log of a party with these lines, and its heads."""
    found, heads = [], [Head()]
    for content in ({"action": "begin", "party": party}, *more):
        line, head = linked(heads[-1], content)
        found.append(line)
        heads.append(head)
    return found, heads[1:]


def written(path: Path, content: list[bytes]) -> Path:
    path.write_bytes(b"".join(content))
    return path


SOME: tuple[dict[str, Any], ...] = ({"action": "a", "n": 1.5}, {"action": "b", "who": "client/\u00e9"})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    content, heads = lines("party/0", *SOME)
    log = read(written(tmp_path / "log", content))
    assert (log.party, log.head) == ("party/0", heads[-1]) and [e["action"] for e in log.entries] == ["begin", "a", "b"]


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    content, _ = lines("party/0", *SOME)
    data = b"".join(content)
    for at in range(len(data)):
        for change in (1, 0x20, 0x80):
            altered = data[:at] + bytes([data[at] ^ change]) + data[at + 1 :]
            with pytest.raises(StoreError, match="not as it was written"):
                read(written(tmp_path / "log", [altered]))
        for other in (data[:at] + data[at + 1 :], data[:at] + b" " + data[at:]):
            with pytest.raises(StoreError):
                read(written(tmp_path / "log", [other]))


@pytest.mark.parametrize("order", [(0, 2), (1, 2), (0, 2, 1), (0, 1, 1, 2), (0, 1, 2, 0)], ids=str)
def test_lines_that_are_left_out_moved_or_repeated_are_found(tmp_path: Path, order: tuple[int, ...]) -> None:
    content, _ = lines("party/0", *SOME)
    with pytest.raises(StoreError):
        read(written(tmp_path / "log", [content[i] for i in order]))


def test_it_is_the_hashes_that_find_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, _ = lines("party/0", *SOME)
    changed = [content[0], content[1].replace(b"1.5", b"2.5"), content[2]]
    with pytest.raises(StoreError):
        read(written(tmp_path / "log", changed))
    monkeypatch.setattr(chain, "_hash", lambda body: f"{body['sequence']:064d}")
    content, heads = lines("party/0", *SOME)
    changed = [content[0], content[1].replace(b"1.5", b"2.5"), content[2]]
    assert (
        read(written(tmp_path / "log", [content[0], content[1].replace(b"1.5", b"2.5"), content[2]])).head == heads[-1]
    )


def test_an_empty_file_and_another_one_are_no_logs(tmp_path: Path) -> None:
    for content in ([], [linked(Head(), {"action": "x"})[0]], [b"\n"], [b"{}\n"], [b"[" * 100_000 + b"\n"]):
        with pytest.raises(StoreError):
            read(written(tmp_path / "log", content))
    with pytest.raises(StoreError, match="cannot be read"):
        read(tmp_path / "none")


def test_a_log_that_was_cut_off_or_written_anew_does_not_fit_the_others(tmp_path: Path) -> None:
    content, heads = lines("party/0", *SOME)
    other = read(
        written(
            tmp_path / "other",
            lines("party/1", {"action": "epoch", "heads": {"party/0": heads[2].to_json(), "party/2": [7, "0" * 64]}})[
                0
            ],
        )
    )
    assert compare(read(written(tmp_path / "log", content)), other) == 1
    with pytest.raises(TamperingError, match="was rewritten: it ends before line 2"):
        compare(read(written(tmp_path / "log", content[:2])), other)
    anew, _ = lines("party/0", SOME[0], {"action": "nothing happened"})
    with pytest.raises(TamperingError, match="was rewritten: it has another line 2"):
        compare(other, read(written(tmp_path / "log", anew)))
