"""A dealer that cheats is caught when what it dealt is audited, nobody is framed, and no kept mask is opened."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from mpcinfer.dealer import dealing
from mpcinfer.errors import TamperingError
from mpcinfer.party import sacrifice, stepping
from mpcinfer.party.sacrifice import Coin, Dealt
from mpcinfer.protocol.cache import CachedProduct, CacheUse, RowMask
from mpcinfer.protocol.correlation import Kind, correction_bytes
from mpcinfer.protocol.linear import FixedProduct, WeightMask
from mpcinfer.protocol.lookup import OneHot
from mpcinfer.protocol.multiply import Triple
from mpcinfer.protocol.session import TapeKeys
from mpcinfer.protocol.tracing import Plan
from mpcinfer.protocol.truncate import Truncation
from mpcinfer.protocol.types import Weight
from mpcinfer.ring import prg
from mpcinfer.ring.domain import Z64
from mpcinfer.ring.kernels import Bilinear
from mpcinfer.wire.mesh import MAX_MESSAGE
from tests.dealer.test_dealing import KINDS, SLOT, plan_of
from tests.decoders_local import token_ids
from tests.inprocess import LIMITS, InProcess, Keys, mlp, plain, random_weights, reveal, wait_for
from tests.openings import Seen, View, assert_uniform
from tests.party.test_generation import CAPTURED, right, write
from tests.security.dealings import Table, flipped

MATMUL = Bilinear("matmul")
WEIGHT, PRODUCT = WeightMask("w", (4, 3)), FixedProduct(MATMUL, "w", (2, 4), (4, 3))
ROWS, LOOKED_UP = RowMask("k", (2, 3)), CachedProduct("k", (2, 3), (8, 3), True)
TRIPLE, TRUNCATION, HOT = Triple(MATMUL, (2, 3), (3, 4)), Truncation((7,), 16), OneHot((2,), 3)
PASSING = [item for item in KINDS if not item.kept and not item.operand]
# all that there is in one tape: what depends on kept masks, too, of which those of rows are dealt with it
PLAN = Plan(plan_of(*PASSING, PRODUCT, ROWS, LOOKED_UP, CachedProduct("k", (2, 8), (8, 3), False)).entries, "d")
MASKS = plan_of(WEIGHT, deployment="d")
DEALT = [*PASSING, *(item for _, item in PLAN.entries if item.operand and not item.kept)]


@pytest.fixture(scope="module", params=[2, 3], ids="n={}".format)
def keys(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"), request.param)


class Audit:
    """A table at which a weight's mask is dealt, and the tape that is about to be audited."""

    def __init__(self, keys: Keys) -> None:
        self.table = Table(keys, keys.cluster.n)
        self.last = self.table.n - 1
        self.weights: list[dict[str, Weight]] = []
        for tape in self.table.fetched(MASKS):
            assert not isinstance(tape, Exception) and tape.evidence is None  # nothing is dealt that could be wrong
            weight = Weight("w", torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3, dtype=torch.int64), 16)
            weight.mask = lambda kept=tape.kept: kept.share("w")
            self.weights.append({"w": weight})

    def fetch(self, plan: Plan = PLAN) -> list[Any]:
        self.tapes = self.table.fetched(plan, CacheUse(SLOT, (), 0) if plan.kept else None, self.weights)
        return self.tapes

    def found(self) -> set[str]:
        """What the parties say, without who says it first; empty if all are content."""
        if any(isinstance(tape, Exception) for tape in self.tapes):
            return {str(tape) for tape in self.tapes if isinstance(tape, TamperingError)}
        answers = self.table.audited(self.tapes)
        assert len({type(a) for a in answers}) == 1, "all parties end, or none"
        return {str(a) for a in answers if a is not None}


@pytest.fixture
def audit(keys: Keys) -> Audit:
    return Audit(keys)


# --- a cheating dealer -----------------------------------------------------------------------------------------------


def test_honest_tapes_pass(audit: Audit) -> None:
    for _ in range(2):
        audit.fetch()
        assert audit.found() == set()
        audit.table.dealer.forget(audit.table.epochs[0].id, [SLOT])


@pytest.mark.parametrize("item", [None, Truncation, FixedProduct], ids=["honest", "open", "closed"])
def test_tapes_larger_than_a_message_are_audited_like_others(audit: Audit, item: type[Kind] | None) -> None:
    """As those of models are."""
    large = Truncation((3 << 20,), 16)
    plan = Plan(plan_of(large, PRODUCT).entries, "d")
    assert correction_bytes(large) > MAX_MESSAGE
    for part in {batch.item for batch in plan.batches if type(batch.item) is item}:  # a large one is dealt in several
        audit.table.cheat(part)
    audit.fetch(plan)
    found = audit.found()
    assert len(found) == (item is not None) and all(f"a wrong {item.__name__}" in text for text in found)  # type: ignore[union-attr]


@pytest.mark.parametrize("item", DEALT, ids=[f"{type(k).__name__}-{i}" for i, k in enumerate(DEALT)])
def test_one_wrong_bit_is_found(audit: Audit, item: Kind) -> None:
    audit.table.cheat(item)
    audit.fetch()
    (text,) = audit.found()
    assert "the dealer has dealt" in text and type(item).__name__ in text


def test_products_with_rows_of_earlier_tapes_are_checked(keys: Keys) -> None:
    """Runs of rows, some of them left out, in the order in which a text has them."""
    audit, parts = Audit(keys), {}
    growing = plan_of(ROWS, LOOKED_UP)
    for count in (0, 2, 4):
        parts[count] = audit.table.fetched(growing, CacheUse(SLOT, (), count))

    def rows(party: int) -> Any:
        return lambda cache, runs: [
            parts[first - first % 2][party].kept.share(cache)[first % 2 : first % 2 + end - first]
            for first, end in runs
        ]

    use = CacheUse(SLOT, ((0, 2), (5, 6)), 6)
    for cheating in (False, True):
        if cheating:
            audit.table.cheat(LOOKED_UP)
            use = replace(use, count=8)
        tapes = audit.table.fetched(growing, use)
        found = audit.table.audited(tapes, [rows(party) for party in range(audit.table.n)])
        assert [type(f) for f in found] == [TamperingError if cheating else type(None)] * audit.table.n


# --- nobody is framed ------------------------------------------------------------------------------------------------


def alter(audit: Audit, party: int, **changes: Any) -> None:
    audit.tapes[party].evidence = replace(audit.tapes[party].evidence, **changes)


def test_a_last_party_that_shows_other_corrections_is_named(audit: Audit) -> None:
    audit.fetch()
    alter(audit, audit.last, corrections=bytearray(flipped(audit.tapes[-1].evidence.corrections)))
    (text,) = audit.found()
    assert f"party {audit.last} shows other corrections" in text


def test_a_party_that_shows_another_key_is_named(audit: Audit) -> None:
    for party in range(audit.table.n):
        audit.fetch(plan_of(TRIPLE))
        alter(audit, party, keys=TapeKeys(bytes(32), bytes(32)))
        (text,) = audit.found()
        assert f"party {party} shows" in text


@pytest.mark.parametrize("shown", ["of another tape", "without a certificate"])
def test_a_party_that_shows_what_is_no_statement_about_this_tape_is_named(audit: Audit, shown: str) -> None:
    audit.fetch(plan_of(TRIPLE))
    other = audit.tapes[0].evidence.statement
    audit.fetch(plan_of(TRIPLE))
    mine = audit.tapes[0].evidence.statement
    if shown == "without a certificate":
        other = replace(mine, certificate=b"x")
    alter(audit, 0, statement=other)
    honest = Dealt.vouched
    with pytest.MonkeyPatch.context() as patch:  # the liar itself goes on as if nothing were wrong
        patch.setattr(
            Dealt,
            "vouched",
            lambda self, e, s: honest(self, e, mine if e.mesh.index == 0 and s == other else s),
        )
        texts = {str(a) for a in audit.table.audited(audit.tapes)}
    assert texts and all("party 0 shows a statement that the dealer never made" in text for text in texts)


def sends_other(audit: Audit) -> None:
    """The dealer signs what is right and sends something else."""
    honest = audit.table.dealer._corrections

    def sent(*args: Any) -> Iterator[memoryview]:
        parts = honest(*args)
        yield flipped(next(parts))
        yield from parts

    audit.table.dealer._corrections = sent  # type: ignore[method-assign]


def test_what_the_dealer_has_not_signed_is_refused_on_delivery(audit: Audit) -> None:
    sends_other(audit)
    tapes = audit.fetch()
    assert isinstance(tapes[-1], TamperingError) and "signed something else than it has sent" in str(tapes[-1])


def test_without_that_check_the_last_party_would_be_framed(audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dealt, "check", lambda *_: None)
    sends_other(audit)
    audit.fetch()
    (text,) = audit.found()
    assert f"party {audit.last} shows" in text


def vouches(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any], int], None]) -> None:
    """The dealer states something else; its statements count in the order in which it signs them."""
    honest, count, lock = dealing.statement, [0], threading.Lock()

    def stated(*args: Any) -> dict[str, Any]:
        said = honest(*args)
        with lock:
            change(said, count[0])
            count[0] += 1
        return said

    monkeypatch.setattr(dealing, "statement", stated)


def test_a_dealer_that_vouches_for_other_keys_is_refused_on_delivery(
    audit: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    vouches(monkeypatch, lambda said, _: said.update(keys=["00" * 32] * audit.table.n))
    assert all(isinstance(tape, TamperingError) for tape in audit.fetch(plan_of(TRIPLE)))


def test_a_dealer_that_tells_the_parties_different_things_is_named(
    audit: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each party's own key is right: only together they see it."""

    def change(said: dict[str, Any], _: int) -> None:
        if not said["corrections"]:
            said["keys"][-1] = "00" * 32

    vouches(monkeypatch, change)
    audit.fetch(plan_of(TRIPLE))
    assert audit.found() and all("the dealer has signed different keys" in text for text in audit.found())


def test_a_dealer_that_does_not_sign_is_refused(audit: Audit) -> None:
    audit.table.dealer._signer = None
    assert all(isinstance(tape, Exception) for tape in audit.fetch(plan_of(TRIPLE)))


# --- checks that are taken away --------------------------------------------------------------------------------------


@pytest.mark.parametrize("item", [TRIPLE, HOT, TRUNCATION], ids=lambda item: type(item).__name__)
def test_without_dealing_again_a_wrong_correlation_passes(
    audit: Audit, item: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sacrifice, "_opened_wrongly", lambda *_: "")
    audit.table.cheat(item)
    audit.fetch(plan_of(item))
    assert audit.found() == set()


@pytest.mark.parametrize("item", [PRODUCT, LOOKED_UP], ids=lambda item: type(item).__name__)
def test_without_the_check_of_products_a_wrong_one_passes(
    audit: Audit, item: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sacrifice, "_products", lambda *_: "")
    audit.table.cheat(item)
    audit.fetch()
    assert audit.found() == set()


# --- what stays closed -----------------------------------------------------------------------------------------------

BIG = FixedProduct(MATMUL, "w", (1 << 15, 4), (4, 3))


def closed_words(audit: Audit) -> set[bytes]:
    """Every number of a kept mask, of a share of one, and of the last party's share of a product with one."""
    shares = [
        [tape.kept.share("k"), weights["w"].mask()] for tape, weights in zip(audit.tapes, audit.weights, strict=True)
    ]  # type: ignore[misc]
    masks = [x for share in shares for x in share] + [sum(parts) for parts in zip(*shares, strict=True)]
    evidence = audit.tapes[-1].evidence
    closed = b"".join(
        part for batch, part in evidence.parts(lambda batch: True, evidence.corrections) if batch.item.operand
    )
    data = closed + b"".join(bytes(Z64.pack(mask)) for mask in masks)
    return {data[at : at + 8] for at in range(0, len(data), 8)}


def test_no_kept_mask_and_no_product_with_one_is_opened(audit: Audit) -> None:
    """Looked for in all that the parties send each other, at every offset."""

    def leaked() -> set[bytes]:
        sent = b"|".join(payload for _, _, payload in audit.table.sent)
        keys = [tape.evidence.keys.kept for tape in audit.tapes]
        return {w for w in words if w in sent} | {k for k in keys if k in sent or k.hex().encode() in sent}

    audit.fetch()
    words = closed_words(audit)
    assert len(words) > 50
    assert audit.found() == set() and not leaked()
    audit.table.sent.append((0, 1, bytes(Z64.pack(audit.weights[0]["w"].mask()))))  # type: ignore[misc]
    assert leaked()


def shown_by(audit: Audit, party: int, to: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a party's share of the check says to another one that takes away all it knows; and A [B]_i, the secret."""
    payloads = [payload for i, j, payload in audit.table.sent if (i, j) == (party, to)]
    shape, evidence = BIG.derived()["c"].shape, [tape.evidence for tape in audit.tapes]
    size = 8 * shape[0] * shape[1]
    data = b"".join(payloads)
    value = next(
        Z64.unpack(data[at : at + size], shape) for at in [data.index(marker(payloads)) + len(marker(payloads))]
    )
    share = prg.expand(prg.derive(evidence[party].keys.passing, "node#0", "c"), shape, Z64)
    a = sum(prg.expand(prg.derive(e.keys.passing, "node#0", "a"), BIG.x, Z64) for e in evidence)
    return value + share, a @ audit.weights[party]["w"].mask()  # type: ignore[misc, operator]


def marker(payloads: list[bytes]) -> bytes:
    """What precedes the shares of the check in a direction: the statement, and nothing of a suspect."""
    return next(p for p in payloads if p.startswith(b"{"))


@pytest.mark.parametrize("keys", [3], indirect=True)  # of two shares that add up to 0 each says what the other one does
@pytest.mark.parametrize("removed", [False, True], ids=["zero", "no zero"])
def test_shares_of_the_check_hide_the_shares_of_the_mask(
    audit: Audit, removed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if removed:
        honest = sacrifice._hidden
        monkeypatch.setattr(sacrifice, "_hidden", lambda e, b, w, s, seeds: honest(e, b, w, s, {}))
    audit.fetch(Plan(plan_of(BIG).entries, "d"))
    assert audit.found() == set()
    shown, secret = shown_by(audit, 0, 2)
    assert bool((shown == secret).all()) == removed and bool((shown == secret).any()) == removed
    if not removed:
        assert_uniform([View(opened=[Seen("share of the check", Z64, shown - secret)])])


# --- the coin --------------------------------------------------------------------------------------------------------


def tossed(rate: float, *name: object) -> bool:
    """A toss of two parties, the first of which always says the same."""
    coins = [Coin(rate, "00"), Coin(rate, hashlib.sha256(repr(name).encode()).hexdigest())]
    return coins[0].falls(dict(enumerate(c.commitment for c in coins)), dict(enumerate(c.nonce for c in coins)))


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_a_dealer_that_cheats_one_time_in_a_hundred(rate: float) -> None:
    """Each wrong tape is caught with the rate's probability; (1 - p) / p of them are used before, on average."""
    trials, used, audits, tapes = 400, 0, 0, 0
    for trial in range(trials):
        for tape in range(100_000):
            if tape % 100:  # the others are audited too, and are right
                continue
            if tossed(rate, trial, tape):
                break
            used += 1
    expected = (1 - rate) / rate
    sigma = ((1 - rate) ** 0.5 / rate) / trials**0.5
    assert abs(used / trials - expected) < 4 * sigma
    for tape in range(20_000):
        audits += tossed(rate, "any", tape)
        tapes += 1
    assert abs(audits / tapes - rate) < 4 * (rate * (1 - rate) / tapes) ** 0.5
    assert not any(tossed(0.0, tape) for tape in range(100))


def test_nobody_changes_his_mind_about_a_coin() -> None:
    coins = [Coin(0.5, "aa"), Coin(0.5, "bb")]
    commitments = {i: coin.commitment for i, coin in enumerate(coins)}
    with pytest.raises(TamperingError, match="party 1"):
        coins[0].falls(commitments, {0: "aa", 1: "cc"})


# --- whole clusters --------------------------------------------------------------------------------------------------


class Tosses:
    """Decides all coins, the same at all parties, in turn; and counts the audits of party 0."""

    def __init__(self, patch: pytest.MonkeyPatch, *pattern: bool) -> None:
        self.audits = 0
        decided: dict[Any, bool] = {}
        turns, lock, honest, real = cycle(pattern), threading.Lock(), Coin.falls, sacrifice.audit

        def falls(coin: Coin, commitments: Any, nonces: Any) -> bool:
            honest(coin, commitments, nonces)
            with lock:
                key = tuple(sorted(nonces.items()))
                return decided[key] if key in decided else decided.setdefault(key, next(turns))

        def audit(epoch: Any, *rest: Any) -> None:
            self.audits += epoch.mesh.index == 0 and not epoch.mesh.shadow
            real(epoch, *rest)

        patch.setattr(Coin, "falls", falls)
        patch.setattr(stepping, "audit", audit)


AUDITED = replace(LIMITS, dealer_audit_rate=0.5)
PROGRAM, X = mlp(), torch.tensor([[1.0, -2.0, 0.5, 3.0]])
WEIGHTS = random_weights(PROGRAM)


@pytest.mark.parametrize(
    ("n", "item", "witnesses"),
    [
        (2, "FixedProduct", ()),
        (2, "Comparison", ()),
        (2, "Comparison", (0, 1)),
        pytest.param(3, "FixedProduct", (), marks=pytest.mark.slow),
        pytest.param(3, "Comparison", (), marks=pytest.mark.slow),
        pytest.param(2, "FixedProduct", (1,), marks=pytest.mark.slow),
    ],
)
def test_a_cluster_answers_until_its_dealer_cheats(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    n: int,
    item: str,
    witnesses: tuple[int, ...],
) -> None:
    tosses = Tosses(monkeypatch, True, False)
    with InProcess(tmp_path, n, AUDITED, witnesses=witnesses) as cluster:
        alice, bob = cluster.caller(), cluster.caller("client/bob")
        n += len(witnesses)
        assert [a.version for a in alice.deploy(PROGRAM, WEIGHTS)] == [1] * n
        for _ in range(4):  # tapes that are there before a request are audited like others
            assert (reveal(bob.infer(X)) - plain(WEIGHTS, X)).abs().max() < 0.01
        assert tosses.audits >= 3
        assert cluster.dealer is not None
        honest = cluster.dealer._dealt

        def dealt(batch: Any, keys: Any, fixed: Any) -> list[memoryview]:
            parts = list(honest(batch, keys, fixed))
            return [flipped(parts[0]), *parts[1:]] if type(batch.item).__name__ == item else parts

        renewed = cluster.new_epoch()
        cluster.dealer._dealt = dealt  # type: ignore[method-assign]
        answers = []
        while not any(isinstance(a, Exception) for a in answers):
            answers = bob.infer(X)
        assert [type(a) for a in answers] == [TamperingError] * n
        assert all(item in str(a) for a in answers)
        assert len([r for r in caplog.records if r.levelname == "ERROR" and "TAMPERING" in r.message]) == n
        renewed()
        cluster.dealer._dealt = honest  # type: ignore[method-assign]
        assert (reveal(bob.infer(X)) - plain(WEIGHTS, X)).abs().max() < 0.01


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_text_goes_on_with_rows_of_other_numbers_after_an_audit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    """What was dealt for a step is burnt, masks of new rows included; products with all rows are checked."""
    tosses = Tosses(monkeypatch, True, False, False)
    with InProcess(tmp_path, n, AUDITED) as cluster:
        caller = cluster.caller()
        assert [a.version for a in caller.deploy(CAPTURED.program, dict(CAPTURED.weights))] == [1] * n
        for text in (token_ids(5), token_ids(7)):
            *tokens, end = write(caller, text, most=4).rest()
            assert end is None and right(tokens, text)
        slots = {s.slot.id: s.slot for s in cluster.parties[0].sessions._sessions.values()}
        skipped = [slot.count - sum(end - first for first, end, _ in slot.masks) for slot in slots.values()]
        assert tosses.audits >= 3 and sum(skipped) >= 3
        assert cluster.dealer is not None
        honest = cluster.dealer._dealt

        def dealt(batch: Any, keys: Any, fixed: Any) -> list[memoryview]:
            parts = list(honest(batch, keys, fixed))
            return [flipped(parts[0]), *parts[1:]] if isinstance(batch.item, CachedProduct) else parts

        cluster.dealer._dealt = dealt  # type: ignore[method-assign]
        found = write(caller, token_ids(6), most=20).rest()
        assert found[-1] == ["TamperingError"] * n


def test_parties_with_different_rates_do_not_begin(tmp_path: Path) -> None:
    cluster = InProcess(tmp_path, 2, AUDITED)
    try:
        cluster.start_dealer()
        cluster.start_party(0)
        cluster.keys.limits = LIMITS
        cluster.start_party(1)
        wait_for(lambda: all("dealer_audit_rate" in party.lane.detail for party in cluster.parties.values()))
    finally:
        cluster.stop()
