"""Evidence: quotes of real processors, and everything that can be wrong with them; kinds that others add."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import dcap_qvl
import pytest

from mpcinfer.errors import ConfigError, ManifestError
from mpcinfer.trust import evidence
from mpcinfer.trust.evidence import Evidence, Expected, find, quotes, register, report_data
from mpcinfer.trust.facts import code_digest

QUOTES = Path(__file__).with_name("quotes")
JUNE_2025 = 1750400000  # the collateral was fetched a day before


@dataclass(frozen=True)
class Sample:
    """A quote of a real processor, what it is bound to, and what was pinned of it."""

    kind: Evidence
    quote: bytes
    bound: bytes
    expected: Expected

    def verified(self, **change: object) -> dict[str, str]:
        """What it measures, something of it changed."""
        parts = {"quote": self.quote, "bound": self.bound, "expected": self.expected, **change}
        return self.kind.verify(parts["quote"], parts["bound"], parts["expected"])  # type: ignore[arg-type]


@pytest.fixture(params=["tdx", "sgx"])
def sample(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Sample:
    monkeypatch.setattr(quotes, "now", lambda: JUNE_2025)
    quote = (QUOTES / f"{request.param}.quote").read_bytes()
    first = Expected("party/0", None, str(QUOTES / f"{request.param}.json"))
    bound = dcap_qvl.parse_quote(quote).report.report_data
    measured = find(request.param).verify(quote, bound, first)
    return Sample(find(request.param), quote, bound, Expected("party/0", measured, first.collateral))


def test_a_real_quote_holds(sample: Sample) -> None:
    found = sample.verified()
    assert found == sample.expected.measured
    if isinstance(sample.kind, quotes.Tdx):
        assert found["tcb"] == "UpToDate" and found["mr_td"].startswith("91eb2b44") and len(found) == 7
    else:
        assert found["tcb"] == "ConfigurationAndSWHardeningNeeded" and found["mr_enclave"].startswith("33d8736d")


def test_it_is_bound_to_keys_and_nonce(sample: Sample) -> None:
    pin, key, nonce = "sha256:" + "0" * 64, bytes(32), bytes(32)
    others = [
        report_data(pin, key, nonce),
        report_data(pin, key, b"\1" + nonce[1:]),
        report_data(pin, b"\1" + key[1:], nonce),
        report_data("sha256:" + "1" * 64, key, nonce),
    ]
    assert len(set(others)) == 4 and {len(other) for other in others} == {64}
    for other in [*others, sample.bound[:-1], b""]:
        with pytest.raises(ManifestError, match="of party/0 is not bound to its keys and to this connection"):
            sample.verified(bound=other)


def test_without_the_comparison_an_unbound_quote_holds(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: nothing but the comparison of report data refuses the quote of another host."""
    monkeypatch.setattr(quotes.hmac, "compare_digest", lambda a, b: True)
    assert sample.verified(bound=bytes(64)) == sample.expected.measured


def test_another_measurement(sample: Sample) -> None:
    assert sample.expected.measured is not None
    for name, value in sample.expected.measured.items():
        pinned = {**sample.expected.measured, name: "f1" + value[2:] if name != "tcb" else "OutOfDate"}
        expected = Expected("party/0", pinned, sample.expected.collateral)
        if (name, value) == ("tcb", "UpToDate"):
            assert sample.verified(expected=expected)["tcb"] == "UpToDate"  # it has only got better
            continue
        with pytest.raises(ManifestError, match=f"measures another {name} than was pinned"):
            sample.verified(expected=expected)


def test_debug(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    tdx = isinstance(sample.kind, quotes.Tdx)
    at = 48 + (120 if tdx else 48)  # the attributes, after the header
    report = dcap_qvl.parse_quote(sample.quote).report
    attributes = report.td_attributes if tdx else report.attributes
    assert sample.quote[at : at + len(attributes)] == attributes
    debug = bytearray(sample.quote)
    debug[at] |= 1 if tdx else 2
    with pytest.raises(ManifestError, match="is of a debug"):
        sample.verified(quote=bytes(debug))
    monkeypatch.setattr(type(sample.kind), "is_debug", lambda self, report: False)
    with pytest.raises(ManifestError, match="does not hold"):  # the processor has not signed this
        sample.verified(quote=bytes(debug))


@pytest.mark.parametrize("part", ["header", "measurement", "signature", "certificate"])
def test_a_changed_byte(sample: Sample, part: str) -> None:
    at = {"header": 12, "measurement": 200, "signature": 48 + 384 + 4 + 200, "certificate": len(sample.quote) - 1200}
    changed = bytearray(sample.quote)
    changed[at[part]] ^= 1
    with pytest.raises(ManifestError):
        sample.verified(quote=bytes(changed))


@pytest.mark.parametrize("length", [0, 1, 47, 48, 300, 432, 700, 2000])
def test_a_truncated_quote(sample: Sample, length: int) -> None:
    with pytest.raises(ManifestError, match="no quote, or was cut short"):
        sample.verified(quote=sample.quote[:length])


def test_a_quote_of_the_other_kind(sample: Sample) -> None:
    other = find("sgx" if isinstance(sample.kind, quotes.Tdx) else "tdx")
    with pytest.raises(ManifestError, match="is one of"):
        other.verify(sample.quote, sample.bound, sample.expected)


def test_collateral(sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Path(sample.expected.collateral).read_text()
    (tmp_path / "party-0.json").write_text(good)
    assert sample.verified(expected=Expected("party/0", None, str(tmp_path)))
    (tmp_path / "other.json").write_text("{}")
    for where in (tmp_path / "missing.json", tmp_path / "other.json"):
        with pytest.raises(ManifestError, match="no collateral for the quote of party/0"):
            sample.verified(expected=Expected("party/0", None, str(where)))
    with pytest.raises(ManifestError, match="cannot be checked without collateral"):
        sample.verified(expected=Expected("party/0", None, ""))
    asked: list[str] = []

    async def get_collateral(url: str, quote: bytes) -> object:
        asked.append(url)
        return dcap_qvl.QuoteCollateralV3.from_json(good)

    async def in_a_loop() -> None:
        assert sample.verified(expected=Expected("party/0", None, "https://pccs.example"))

    monkeypatch.setattr(dcap_qvl, "get_collateral", get_collateral)
    asyncio.run(in_a_loop())
    assert asked == ["https://pccs.example"]
    monkeypatch.setattr(quotes, "now", lambda: JUNE_2025 + 10**8)
    with pytest.raises(ManifestError, match="does not hold.*newer collateral"):
        sample.verified()


def test_hosts_without_such_processors_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotes.Tdx, "reports", tmp_path / "nowhere")
    monkeypatch.setattr(quotes.Sgx, "device", tmp_path / "nowhere")
    for kind in ("tdx", "sgx"):
        with pytest.raises(ManifestError, match=f"makes no {kind.upper()} quotes"):
            find(kind).produce(bytes(64))


def test_where_quotes_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotes.Sgx, "device", tmp_path)
    (tmp_path / "quote").write_bytes(b"quote")
    assert find("sgx").produce(b"\7" * 64) == b"quote"
    assert (tmp_path / "user_report_data").read_bytes() == b"\7" * 64


def test_what_a_party_says_itself() -> None:
    digest = bytes.fromhex(code_digest())
    kind = find("code-digest")
    assert kind.produce(bytes(64)) == digest
    assert kind.verify(digest, bytes(64), Expected("party/0", {"code": digest.hex()})) == {"code": digest.hex()}
    with pytest.raises(ManifestError, match="party/0 reports the code digest"):
        kind.verify(bytes(32), bytes(64), Expected("party/0", {"code": digest.hex()}))
    with pytest.raises(ManifestError, match='calls it "none"'):
        find("none").verify(b"something", bytes(64), Expected("party/0"))


def test_kinds_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "_KINDS", dict(evidence._KINDS))
    with pytest.raises(ConfigError, match="no kind of evidence 'sev'.*code-digest, none, sgx, tdx"):
        find("sev")
    register("sev", type(find("none")))
    assert find("sev").produce(b"") == b""
    with pytest.raises(ConfigError, match="two kinds of evidence 'sev'"):
        register("sev", type(find("tdx")))
