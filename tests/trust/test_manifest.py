"""What parties say of themselves to each other and to clients; pins in files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpcinfer.errors import ConfigError, ManifestError, SignatureError
from mpcinfer.trust.evidence import report_data
from mpcinfer.trust.facts import Facts, code_digest, digest
from mpcinfer.trust.manifest import check, introduce, introduced, state
from mpcinfer.trust.pin import Member, Pin
from mpcinfer.trust.signing import Signer
from tests.inprocess import Keys

NONCE, EPOCH = b"n" * 32, b"e" * 32


class Parties:
    """Keys of two parties, and what they say."""

    def __init__(self, directory: Path) -> None:
        self.cluster = (keys := Keys(directory, 2)).cluster
        self.signers = [Signer(keys.identity(f"party/{i}")) for i in (0, 1)]
        self.facts = [Facts.of(s, self.cluster, operator=s.role, evidence="code-digest") for s in self.signers]

    def states(self, facts: list[Facts] | None = None, nonce: bytes = NONCE) -> Any:
        facts = facts or self.facts
        return [state(s, f, digest(facts), nonce) for s, f in zip(self.signers, facts, strict=True)]

    def pin(self) -> Pin:
        return Pin(check(self.states(), self.cluster, NONCE, None).members)


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> Parties:
    return Parties(tmp_path_factory.mktemp("keys"))


# --- between parties -------------------------------------------------------------------------------------------------


def test_parties_introduce_themselves(parties: Parties) -> None:
    shown = introduce(parties.signers[1], parties.facts[1], EPOCH)
    assert introduced(shown, parties.cluster, "party/1", EPOCH) == parties.facts[1]
    with pytest.raises(ManifestError, match="party/0 shows the facts of party/1 as its own"):
        introduced(shown, parties.cluster, "party/0", EPOCH)
    with pytest.raises(ManifestError, match="signed for another epoch"):
        introduced(shown, parties.cluster, "party/1", b"f" * 32)
    with pytest.raises(SignatureError, match="signature of party/1 does not hold"):
        introduced(replace(shown, signature=bytes(64)), parties.cluster, "party/1", EPOCH)


@pytest.mark.parametrize("name", ["role", "cluster", "key_pin", "signing_key", "dealer", "protocol"])
def test_nobody_can_be_somebody_else(parties: Parties, name: str) -> None:
    value: Any = 9 if name == "protocol" else "party/0" if name == "role" else "0" * 64
    shown = introduce(parties.signers[1], replace(parties.facts[1], **{name: value}), EPOCH)
    with pytest.raises(ManifestError, match=f"party/1 signs that its {name} is another"):
        introduced(shown, parties.cluster, "party/1", EPOCH)


@pytest.mark.parametrize("operator", ["two\nlines", "\x1b[31mred", "x" * 301, 7, None])
def test_facts_are_plain_text(parties: Parties, operator: Any) -> None:
    with pytest.raises(ManifestError, match="operator is not what it can be"):
        Facts.from_json({**parties.facts[0].to_json(), "operator": operator})
    with pytest.raises(ManifestError, match="incomplete"):
        Facts.from_json({"operator": "me"})


# --- to clients ------------------------------------------------------------------------------------------------------


def test_a_manifest_is_what_all_say(parties: Parties) -> None:
    manifest = check(parties.states(), parties.cluster, NONCE, None)
    assert [m.facts for m in manifest.members] == parties.facts and not manifest.pinned
    assert manifest.digest == digest(parties.facts) != digest(parties.facts[::-1])
    assert manifest.members[0].evidence == "code-digest: self-reported, not proven"
    assert manifest.members[0].measured == {"code": code_digest()}
    assert check(parties.states(), parties.cluster, NONCE, parties.pin()).pinned
    with pytest.raises(SignatureError, match="1 have signed the manifest, all 2 must"):
        check(parties.states()[:1], parties.cluster, NONCE, None)
    with pytest.raises(SignatureError, match="party/0 shows a statement of party/1"):
        check(parties.states()[::-1], parties.cluster, NONCE, None)
    with pytest.raises(ManifestError, match="party/0 was not made for this connection"):
        check(parties.states(nonce=bytes(32)), parties.cluster, NONCE, None)


def test_evidence_that_is_not_known_here(parties: Parties) -> None:
    facts = [parties.facts[0], replace(parties.facts[1], evidence="sev")]
    own = {"facts": facts[1].to_json(), "manifest": digest(facts).hex(), "nonce": NONCE.hex(), "evidence": ""}
    statements = [parties.states(facts[:1] + parties.facts[1:])[0], parties.signers[1].sign("manifest", own)]
    with pytest.raises(ManifestError, match="party/1 shows evidence that cannot be checked: no kind"):
        check(statements, parties.cluster, NONCE, None)
    del own["evidence"]
    with pytest.raises(ManifestError, match="party/1 has no evidence in it"):
        check([statements[0], parties.signers[1].sign("manifest", own)], parties.cluster, NONCE, None)


def test_what_is_bound_is_one_connection_of_one_party(parties: Parties) -> None:
    pins = [facts.key_pin for facts in parties.facts]
    assert report_data(pins[0], parties.signers[0].key, NONCE) != report_data(pins[1], parties.signers[0].key, NONCE)


# --- pins ------------------------------------------------------------------------------------------------------------


def test_a_pin_is_read_as_it_was_written(parties: Parties, tmp_path: Path) -> None:
    file, pin = tmp_path / "manifest.pin", parties.pin()
    pin.save(file)
    assert Pin.load(file) == pin and pin.changes(Pin.load(file)) == []
    unchecked = Pin((pin.members[0], Member(pin.members[1].facts, None)))
    with pytest.raises(ManifestError, match="evidence of party/1 .* was not checked, so it cannot be pinned"):
        unchecked.save(file)
    assert Pin.load(file) == pin
    with pytest.raises(ConfigError, match="cannot write"):
        pin.save(tmp_path / "nowhere" / "manifest.pin")


def test_a_pin_remembers_whom_it_has_replaced(parties: Parties, tmp_path: Path) -> None:
    file = tmp_path / "manifest.pin"

    def pinned(code: str) -> Pin:
        return Pin(tuple(Member(replace(f, code=code), {}) for f in parties.facts))

    def manifest(code: str) -> str:
        return digest([m.facts for m in pinned(code).members]).hex()

    pinned("aa").after(None, 1.0).save(file)
    pinned("aa").after(Pin.load(file), 2.0).save(file)  # the same as before
    assert Pin.load(file).earlier == () and Pin.load(file).find(manifest("bb")) is None
    for now, code in ((3.0, "bb"), (4.0, "aa"), (5.0, "cc"), (6.0, "dd")):
        pinned(code).after(Pin.load(file), now).save(file)
    loaded = Pin.load(file)
    assert [(e.members[0].facts.code, e.until) for e in loaded.earlier] == [("bb", 4.0), ("aa", 5.0), ("cc", 6.0)]
    found = {code: loaded.find(manifest(code)) for code in ("aa", "bb", "cc", "dd", "ee")}
    assert {code: each and each.until for code, each in found.items()} == {
        **{"aa": 5.0, "bb": 4.0, "cc": 6.0},
        **{"dd": math.inf, "ee": None},
    }
    # for connections the newest alone counts
    with pytest.raises(ManifestError, match="is not what was pinned"):
        loaded.check(pinned("aa").members[0].facts)


def test_what_was_pinned_before_is_read_with_care(parties: Parties, tmp_path: Path) -> None:
    file = tmp_path / "manifest.pin"
    parties.pin().save(file)
    good = json.loads(file.read_text())
    for wrong in (1, [1], [{}], [{"until": 1.0, "parties": []}], [{"until": "x", "parties": good["parties"]}]):
        file.write_text(json.dumps(good | {"earlier": wrong}))
        with pytest.raises(ConfigError, match="is no pin of this release"):
            Pin.load(file)
    del good["earlier"]  # as it was written before there was anything to remember
    file.write_text(json.dumps(good))
    assert Pin.load(file) == parties.pin()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 2, "parties": []}', '{"format": 1, "parties": [{}]}'])
def test_what_is_no_pin_is_no_reason_to_go_on(tmp_path: Path, content: str) -> None:
    file = tmp_path / "manifest.pin"
    with pytest.raises(ConfigError, match="cannot read the pin"):
        Pin.load(file)
    file.write_text(content)
    with pytest.raises(ConfigError, match="is no pin of this release"):
        Pin.load(file)


def test_a_pin_says_what_has_changed(parties: Parties) -> None:
    pin = parties.pin()
    changed = replace(parties.facts[1], operator="", code="ab" * 32)
    with pytest.raises(ManifestError) as caught:
        pin.check(changed)
    assert "its operator was 'party/1' and is now not said; its code digest was" in str(caught.value)
    assert json.loads(json.dumps(pin.changes(Pin((pin.members[0], Member(changed, {"code": "cd"})))))) == [
        "party/1: its operator was 'party/1' and is now not said",
        f"party/1: its code digest was '{code_digest()}' and is now '{'ab' * 32}'",
        f"party/1: its code was '{code_digest()}' and is now 'cd'",
    ]
    other = replace(parties.facts[1], role="party/2")
    with pytest.raises(ManifestError, match="party/2 is not among the parties that were pinned"):
        pin.check(other)
    assert pin.changes(Pin((*pin.members, Member(other, {})))) == ["party/2 is new"]
