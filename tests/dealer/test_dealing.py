"""What the dealer deals, to whom, how often, and what it forgets."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

import mpcinfer.dealer.session as held
from mpcinfer.dealer.dealing import Dealer
from mpcinfer.errors import (
    AbortedError,
    AgreementError,
    ConflictError,
    DeadlineError,
    InputError,
    MpcInferError,
    NotFoundError,
)
from mpcinfer.protocol import correlation
from mpcinfer.protocol.cache import CachedProduct, CacheUse, RowMask
from mpcinfer.protocol.coarse import SHORT, CoarseContest
from mpcinfer.protocol.compare import Comparison
from mpcinfer.protocol.contest import Contest
from mpcinfer.protocol.correlation import Kind, Tensors
from mpcinfer.protocol.exponential import Exponential
from mpcinfer.protocol.gumbel import Gumbel
from mpcinfer.protocol.lift import Lift
from mpcinfer.protocol.linear import FixedProduct, WeightMask
from mpcinfer.protocol.lookup import OneHot
from mpcinfer.protocol.multiply import SquarePair, Triple
from mpcinfer.protocol.octaves import TruncatedComparison
from mpcinfer.protocol.piecewise import Pieces
from mpcinfer.protocol.polynomial import TruncatedPowers
from mpcinfer.protocol.powers import BoundedPower
from mpcinfer.protocol.rerandomise import ZeroSharing
from mpcinfer.protocol.scaled import TruncatedScaling
from mpcinfer.protocol.session import KeyChain, TapeKeys, session_keys
from mpcinfer.protocol.tracing import Plan
from mpcinfer.protocol.truncate import Truncation
from mpcinfer.protocol.truncated_product import ProductOfTruncated, TruncatedProduct
from mpcinfer.ring.kernels import Bilinear
from mpcinfer.ring.sharing import combine

CLUSTER = b"c" * 32
MATMUL = Bilinear("matmul")
CONV = Bilinear("conv", ((1, 1), (1, 1), (1, 1), 1))
MASK = WeightMask("w", (4, 3))
SLOT = b"s" * 16
KINDS: list[Kind] = [
    CachedProduct("k", (2, 3), (8, 3), True),
    CachedProduct("k", (2, 8), (8, 3), False),
    BoundedPower((3,), 30, 19),
    CoarseContest((2,), 4, SHORT, 20),
    Comparison((5,)),
    Comparison((2, 3), thresholds=3, products=True),
    Comparison((3,), width=48),
    Contest((3,), 4, others=1),
    Contest((3,), 4, 48, others=1, other_bits=8),
    Lift((4,), 8),
    Contest((2, 2), 3, width=36),
    Comparison((2,), width=32, thresholds=2),
    Comparison((2,), width=17, thresholds=3, numbers=True, d=5),
    Exponential((40,), 16, 42),
    Exponential((3,), 20, 39, ceiling=True, width=48),
    Exponential((3,), 16, 42, width=45, d=19),
    FixedProduct(MATMUL, "w", (2, 4), (4, 3)),
    Gumbel((40,), 16),
    OneHot((2,), 3),
    Pieces((2, 3), 48, 4, 47),
    Pieces((2, 3), 48, 8, 47, 16, True),
    RowMask("other", (2, 3)),
    SquarePair((3, 2)),
    Triple(Bilinear("mul"), (4,), (4,)),
    Triple(MATMUL, (2, 3), (3, 4)),
    Triple(CONV, (1, 2, 4, 4), (3, 2, 3, 3)),
    TruncatedPowers((6,), 16, 3),
    TruncatedScaling((2, 3), (3,), 16),
    TruncatedComparison((3,), 4, 8),
    TruncatedComparison((3,), 4, 0),
    TruncatedProduct((2, 1), (3,), 16),
    ProductOfTruncated((2, 1), (3,), 16, 9),
    Truncation((7,), 16),
    WeightMask("other", (2, 2)),
    ZeroSharing((5,)),
]
PLAN = Plan((("t#0", Truncation((4,), 16)), ("r#0", Comparison((4,), products=True))))


def plan_of(*items: Kind, deployment: str = "") -> Plan:
    return Plan(tuple((f"node#{i}", item) for i, item in enumerate(items)), deployment)


@dataclass
class Session:
    """All parties' side of one session."""

    dealer: Dealer
    id: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    nonces: list[bytes] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # as they were at the beginning
    chains: list[KeyChain] = field(default_factory=list)
    tape_keys: dict[bytes, list[TapeKeys]] = field(default_factory=dict)

    def join(self, timeout: float = 20) -> Session:
        n = self.dealer.parties
        self.nonces = self.nonces or [secrets.token_bytes(32) for _ in range(n)]
        private = [X25519PrivateKey.generate() for _ in range(n)]
        with ThreadPoolExecutor(n) as pool:
            answers = list(
                pool.map(
                    lambda i: self.dealer.join(
                        self.id, i, self.nonces[i], private[i].public_key().public_bytes_raw(), timeout
                    ),
                    range(n),
                )
            )
        self.dealer_nonces = [a[0] for a in answers]
        self.seen_nonces = [a[2] for a in answers]
        self.chains = [
            session_keys(
                private[i].exchange(X25519PublicKey.from_public_bytes(answers[i][1])),
                index=i,
                session=self.id,
                cluster=CLUSTER,
                public_keys=(private[i].public_key().public_bytes_raw(), answers[i][1]),
                party_nonces=answers[i][2],
                dealer_nonce=answers[i][0],
            )
            for i in range(n)
        ]
        self.keys = [chain._key for chain in self.chains]
        return self

    def ask(
        self,
        index: int,
        tape: bytes,
        plan: Plan = PLAN,
        *,
        told: bool = False,
        timeout: float = 20,
        alive: Callable[[], bool] = lambda: True,
        use: CacheUse | None = None,
    ) -> bytes:
        """What one party gets for a tape."""
        data = b"" if told else plan.to_bytes()
        parts = self.dealer.deal(self.id, index, tape, plan.digest(), data, timeout, alive, use)
        return b"".join(bytes(part) for part in parts)

    def asks(
        self,
        tape: bytes,
        plans: Plan | Sequence[Plan] = PLAN,
        uses: CacheUse | Sequence[CacheUse | None] | None = None,
        **options: Any,
    ) -> list[Any]:
        """All parties ask at once: their bytes or errors."""
        n = self.dealer.parties
        each = [plans] * n if isinstance(plans, Plan) else plans
        use = [uses] * n if uses is None or isinstance(uses, CacheUse) else uses

        def one(i: int) -> bytes | MpcInferError:
            try:
                return self.ask(i, tape, each[i], use=use[i], **options)
            except MpcInferError as error:
                return error

        before = self.dealer.tapes_dealt
        with ThreadPoolExecutor(n) as pool:
            answers = list(pool.map(one, range(n)))
        if self.dealer.tapes_dealt > before:
            digest = use[0].digest(each[0].digest()) if use[0] is not None else each[0].digest()
            self.tape_keys[tape] = [chain.next(tape, digest) for chain in self.chains]
        return answers

    def shares(self, tape: bytes, plan: Plan, corrections: bytes) -> list[dict[str, Tensors]]:
        """All parties' shares of all correlations."""
        n = self.dealer.parties
        result = []
        for i, key in enumerate(self.tape_keys[tape]):
            rest, shares = memoryview(corrections), dict[str, Tensors]()
            for batch in plan.batches:
                size, last = batch.correction_bytes, i == n - 1
                members = batch.expand(key.of(batch.item.kept), last=last, correction=rest[:size] if last else None)
                shares |= dict(zip(batch.names, members, strict=True))
                rest = rest[size:]
            result.append(shares)
        return result

    def values(self, tape: bytes, plan: Plan, corrections: bytes) -> dict[str, Tensors]:
        """What the shares of all correlations add up to."""
        shares = self.shares(tape, plan, corrections)
        return {
            name: {
                f: combine([s[name][f] for s in shares], declared.ring)
                for f, declared in (item.free() | item.derived()).items()
            }
            for name, item in plan.entries
        }


@pytest.fixture
def dealer() -> Dealer:
    return Dealer(2, CLUSTER)


@pytest.fixture
def session(dealer: Dealer) -> Session:
    return Session(dealer).join()


def tape() -> bytes:
    return secrets.token_bytes(16)


def started(work: Callable[[], Any], until: Callable[[], object]) -> Future[Any]:
    """Start something in a thread; return once it has come so far."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work)
    pool.shutdown(wait=False)
    end = time.monotonic() + 20
    while not until():
        assert time.monotonic() < end
        time.sleep(0.005)
    return future


# --- sessions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 5])
def test_all_parties_and_the_dealer_agree_and_only_then(n: int) -> None:
    dealer = Dealer(n, CLUSTER)
    assert not dealer.ready
    session = Session(dealer).join()
    assert dealer.ready
    assert session.seen_nonces == [session.nonces] * n
    assert len(set(session.dealer_nonces)) == 1 and len(session.dealer_nonces[0]) == 32
    assert len(set(session.keys)) == n
    assert dealer._session is not None and [chain._key for chain in dealer._session.keys] == session.keys


def test_a_key_depends_on_the_secret_and_not_on_nonces_alone(dealer: Dealer) -> None:
    """The same session id and the same nonces of the parties at two dealers, as an observer might replay them."""
    first = Session(dealer).join()
    again = Session(Dealer(2, CLUSTER), first.id, first.nonces).join()
    assert again.seen_nonces == first.seen_nonces
    assert not set(first.keys) & set(again.keys)
    assert first.dealer_nonces[0] != again.dealer_nonces[0]


def test_who_waits_for_the_others_is_told_that_they_did_not_come(dealer: Dealer) -> None:
    public = X25519PrivateKey.generate().public_key().public_bytes_raw()
    with pytest.raises(DeadlineError):
        dealer.join(tape(), 0, bytes(32), public, 0.05)
    assert not dealer.ready


def test_bad_introductions_are_refused(dealer: Dealer, session: Session) -> None:
    public = X25519PrivateKey.generate().public_key().public_bytes_raw()
    for id_, index, nonce, key in [
        (b"short", 0, bytes(32), public),
        (tape(), 2, bytes(32), public),
        (tape(), -1, bytes(32), public),
        (tape(), 0, b"", public),
        (tape(), 0, bytes(32), b"no key"),
    ]:
        with pytest.raises(InputError):
            dealer.join(id_, index, nonce, key, 0.05)
    assert dealer.ready
    with pytest.raises(ConflictError):
        dealer.join(session.id, 0, bytes(32), public, 0.05)


def test_a_new_session_ends_the_one_before_and_a_past_one_never_returns(dealer: Dealer, session: Session) -> None:
    ended = tape()
    waiting = started(lambda: session.ask(0, ended), lambda: dealer._session and dealer._session.tapes)
    again = Session(dealer).join()
    with pytest.raises(AbortedError):
        waiting.result(20)
    with pytest.raises(AbortedError):
        session.ask(0, tape())
    for old in (session, Session(dealer, session.id)):
        with pytest.raises(AbortedError):
            old.join(1)
    assert not isinstance(again.asks(tape())[1], Exception)


def test_a_party_that_waits_in_a_session_that_ends_is_told(dealer: Dealer) -> None:
    public = X25519PrivateKey.generate().public_key().public_bytes_raw()
    waiting = started(lambda: dealer.join(tape(), 0, bytes(32), public, 20), lambda: dealer._session)
    Session(dealer).join()
    with pytest.raises(AbortedError):
        waiting.result(20)


def test_any_restart_changes_all_streams(dealer: Dealer) -> None:
    """The same plan and the same tape id in a new session: nothing that masks anything is the same."""
    plan, same = plan_of(*KINDS[2:4], MASK), tape()
    seen: list[torch.Tensor] = []
    for _ in range(3):
        session = Session(dealer).join()
        corrections = session.asks(same, plan)[-1]
        shares = session.shares(same, plan, corrections)
        seen += [session.values(same, plan, corrections)["node#2"]["b"], *(s["node#2"]["b"] for s in shares)]
    words = [int(w) for t in seen for w in t.reshape(-1)]
    assert len(set(words)) == len(words)


# --- tapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("item", KINDS, ids=[f"{type(k).__name__}-{i}" for i, k in enumerate(KINDS)])
def test_shares_add_up_to_what_the_kind_says(n: int, item: Kind) -> None:
    session = Session(Dealer(n, CLUSTER)).join()
    plan, one = plan_of(MASK, item, RowMask("k", (4, 3)), deployment="d"), tape()
    answers = session.asks(one, plan, CacheUse(SLOT, (), 0))
    assert answers[:-1] == [b""] * (n - 1)
    assert len(answers[-1]) == plan.correction_bytes() == session.dealer.bytes_sent
    values = session.values(one, plan, answers[-1])
    fixed = {"w": values["node#0"]["b"], "k": values["node#2"]["b"]}
    expected = item.derive({name: values["node#1"][name] for name in item.free()}, fixed.__getitem__)
    for name, declared in item.derived().items():
        assert torch.equal(values["node#1"][name], declared.ring.reduce(expected[name].to(declared.ring.dtype)))
    for name, declared in item.free().items():  # so few bits that they are all equal now and then say nothing
        assert values["node#1"][name].unique().numel() > 1 or declared.count * declared.ring.bits < 48


def test_every_kind_is_among_those_tested() -> None:
    assert {type(k).__name__ for k in KINDS} == {
        name for name, kind in correlation._KINDS.items() if kind.__module__.startswith("mpcinfer.")
    }


def test_a_tape_is_dealt_once(session: Session) -> None:
    one = tape()
    first = session.asks(one)
    assert len(first[1]) == PLAN.correction_bytes()
    for again in (session.asks(one), session.asks(one, told=True)):
        assert [type(a) for a in again] == [ConflictError] * 2
    assert session.dealer.tapes_dealt == 1 and session.dealer.bytes_sent == PLAN.correction_bytes()


def test_two_plans_for_one_tape_burn_it(session: Session) -> None:
    one, other = tape(), plan_of(Truncation((5,), 16))
    answers = session.asks(one, [PLAN, other], timeout=10)
    assert {type(a) for a in answers} == {AgreementError, AbortedError}
    for plan in (PLAN, other):
        assert [type(a) for a in session.asks(one, plan)] == [ConflictError] * 2
    assert session.dealer.tapes_dealt == 0 and session.dealer.bytes_sent == 0
    assert not isinstance(session.asks(tape())[1], Exception)


def test_a_party_that_asks_twice_burns_the_tape(session: Session) -> None:
    one = tape()
    waiting = started(
        lambda: session.ask(1, one), lambda: session.dealer._session and one in session.dealer._session.tapes
    )
    with pytest.raises(ConflictError):
        session.ask(1, one)
    with pytest.raises(AbortedError):
        waiting.result(20)
    with pytest.raises(ConflictError):
        session.ask(0, one)


def test_a_time_out_burns_the_tape(session: Session) -> None:
    one = tape()
    with pytest.raises(DeadlineError):
        session.ask(0, one, timeout=0.05)
    assert [type(a) for a in session.asks(one)] == [ConflictError] * 2


def test_a_caller_who_goes_while_waiting_burns_the_tape(session: Session) -> None:
    one, here = tape(), [True]
    waiting = started(
        lambda: session.ask(0, one, alive=lambda: here[0]),
        lambda: session.dealer._session and one in session.dealer._session.tapes,
    )
    session.dealer.wake()
    time.sleep(0.05)
    assert not waiting.done()
    here[0] = False
    session.dealer.wake()
    with pytest.raises(AbortedError):
        waiting.result(20)
    with pytest.raises(ConflictError):
        session.ask(1, one)
    assert session.dealer.tapes_dealt == 0


def test_a_plan_must_have_its_digest_and_be_known(session: Session) -> None:
    one = tape()
    with pytest.raises(InputError):
        list(session.dealer.deal(session.id, 0, one, b"x" * 32, PLAN.to_bytes(), 1))
    with pytest.raises(InputError):
        list(session.dealer.deal(session.id, 0, one, PLAN.digest(), b"no plan", 1))
    with pytest.raises(NotFoundError):
        session.ask(0, one, told=True)
    for index, id_ in ((2, one), (-1, one), (0, b"short")):
        with pytest.raises(InputError):
            session.ask(index, id_)
    # none of these has touched the tape
    assert not isinstance(session.asks(one)[1], Exception)
    assert not isinstance(session.asks(tape(), told=True)[1], Exception)


def test_plans_that_were_not_used_for_long_are_forgotten(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "_MAX_PLANS", 2)
    plans = [plan_of(Truncation((k,), 16)) for k in (1, 2, 3)]
    session.asks(tape(), plans[0])
    session.asks(tape(), plans[1])
    session.asks(tape(), plans[0], told=True)
    session.asks(tape(), plans[2])
    assert not isinstance(session.asks(tape(), plans[0], told=True)[1], Exception)
    assert [type(a) for a in session.asks(tape(), plans[1], told=True)] == [NotFoundError] * 2


def test_tapes_that_are_over_take_little_memory(session: Session) -> None:
    for _ in range(5):
        session.asks(tape())
    inner = session.dealer._session
    assert inner is not None and not inner.tapes and len(inner.spent) == 5


# --- masks of weights ----------------------------------------------------------------------------------------------

PRODUCT = FixedProduct(MATMUL, "w", (2, 4), (4, 3))


def test_lasting_masks_serve_the_deployment_they_were_dealt_for(session: Session) -> None:
    masks, products = plan_of(MASK, deployment="d"), plan_of(PRODUCT, deployment="d")
    one = tape()
    b = session.values(one, masks, session.asks(one, masks)[1])["node#0"]["b"]
    for _ in range(2):
        one = tape()
        value = session.values(one, products, session.asks(one, products)[1])["node#0"]
        assert torch.equal(value["c"], value["a"] @ b)
    answers = session.asks(tape(), plan_of(PRODUCT, deployment="e"))
    assert isinstance(answers[1], AbortedError) and "masks" in str(answers[1])


def test_lasting_masks_are_forgotten_with_the_session(dealer: Dealer, session: Session) -> None:
    session.asks(tape(), plan_of(MASK, deployment="d"))
    again = Session(dealer).join()
    assert isinstance(again.asks(tape(), plan_of(PRODUCT, deployment="d"))[1], AbortedError)
    assert dealer._session is not None and not dealer._session.fixed


def test_lasting_masks_are_forgotten_with_their_deployment_but_not_by_what_is_under_way(
    dealer: Dealer, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks, products, one = plan_of(MASK, deployment="d"), plan_of(PRODUCT, deployment="d"), tape()
    b = session.values(one, masks, session.asks(one, masks)[1])["node#0"]["b"]
    session.asks(tape(), plan_of(MASK, deployment="e"))
    real = dealer._corrections

    def late(*args: Any) -> Any:
        dealer.forget(session.id, [], "d")
        return real(*args)

    monkeypatch.setattr(dealer, "_corrections", late)
    one = tape()
    value = session.values(one, products, session.asks(one, products)[1])["node#0"]
    assert torch.equal(value["c"], value["a"] @ b)
    monkeypatch.undo()
    assert isinstance(session.asks(tape(), products)[1], AbortedError)
    dealer.forget(session.id, [], "")
    assert dealer._session is not None and {deployment for deployment, _ in dealer._session.fixed} == {"e"}


def test_opening_a_deployment_again_uses_another_mask(session: Session) -> None:
    masks, products = plan_of(MASK, deployment="d"), plan_of(PRODUCT, deployment="d")
    seen = []
    for _ in range(2):
        one = tape()
        seen.append(session.values(one, masks, session.asks(one, masks)[1])["node#0"]["b"])
    assert not (seen[0] == seen[1]).any()
    one = tape()
    value = session.values(one, products, session.asks(one, products)[1])["node#0"]
    assert torch.equal(value["c"], value["a"] @ seen[1])


# --- masks of rows -------------------------------------------------------------------------------------------------

GROW = plan_of(
    RowMask("k", (2, 3)), CachedProduct("k", (1, 3), (8, 3), True), CachedProduct("k", (1, 8), (8, 3), False)
)


def grown(session: Session, use: CacheUse, plan: Plan = GROW) -> dict[str, Tensors]:
    """What a tape of some rows and of products with them deals."""
    one = tape()
    return session.values(one, plan, session.asks(one, plan, use)[-1])


def right_products(values: dict[str, Tensors], rows: torch.Tensor) -> bool:
    """Whether products are with these masks, with zeros where there is none."""
    scores, back = values["node#1"], values["node#2"]
    wanted = torch.zeros(1, 8, dtype=torch.int64)
    wanted[:, : len(rows)] = scores["a"] @ rows.T
    return torch.equal(scores["c"], wanted) and torch.equal(back["c"], back["a"][:, : len(rows)] @ rows)


@pytest.mark.parametrize("n", [2, 3])
def test_products_are_with_the_rows_that_are_named(n: int) -> None:
    session = Session(Dealer(n, CLUSTER)).join()
    masks = torch.empty(0, 3, dtype=torch.int64)
    for runs in ((), ((0, 2),), ((0, 1),), ((0, 1), (4, 6)), ((1, 2), (3, 4), (7, 8))):
        values = grown(session, CacheUse(SLOT, runs, len(masks)))
        new = values["node#0"]["b"]
        assert right_products(values, torch.cat([*(masks[a:b] for a, b in runs), new]))
        masks = torch.cat([masks, new])
    assert len(masks.unique()) == masks.numel()  # no mask of a row is that of another


@pytest.mark.parametrize("n", [2, 3])
def test_runs_of_one_tape_each_take_in_the_rows_of_those_before(n: int) -> None:
    session = Session(Dealer(n, CLUSTER)).join()
    masks = grown(session, CacheUse(SLOT, (), 0))["node#0"]["b"]
    use = CacheUse(SLOT, ((1, 2),), 2, times=3)
    one, plan = tape(), GROW.repeated(3)
    values = session.values(one, plan, session.asks(one, GROW, use)[-1])
    seen = masks[1:2]
    for run in range(3):
        names = {name.partition("/")[2]: fields for name, fields in values.items() if name.startswith(f"{run}/")}
        seen = torch.cat([seen, names["node#0"]["b"]])
        assert right_products(names, seen)
    masks = torch.cat([masks, seen[1:]])
    assert len(masks.unique()) == masks.numel()
    assert use.after(6) == CacheUse(SLOT, ((1, 8),), 8)
    values = grown(session, CacheUse(SLOT, ((3, 5),), 8))
    assert right_products(values, torch.cat([masks[3:5], values["node#0"]["b"]]))


BOTH = plan_of(
    RowMask("k", (2, 2, 3)),
    CachedProduct("k", (2, 1, 3), (2, 8, 3), True),
    CachedProduct("k", (2, 1, 8), (2, 8, 3), False),
)


@pytest.mark.parametrize("n", [2, 3])
def test_texts_side_by_side_have_rows_of_their_own(n: int) -> None:
    session = Session(Dealer(n, CLUSTER)).join()
    masks = [grown(session, CacheUse(SLOT, (), 0))["node#0"]["b"], torch.empty(0, 3, dtype=torch.int64)]
    use = CacheUse(SLOT, ((0, 2),), 2, beside=(CacheUse(b"t" * 16, (), 0),))
    values = grown(session, use, BOTH)
    for text in range(2):
        masks[text] = torch.cat([masks[text], values["node#0"]["b"][text]])
        shown = torch.cat([torch.zeros(4 - len(masks[text]), 3, dtype=torch.int64), masks[text]])
        assert right_products({name: {f: x[text] for f, x in own.items()} for name, own in values.items()}, shown)
    # then each goes on alone
    for text, slot in enumerate((SLOT, b"t" * 16)):
        count = len(masks[text])
        alone = grown(session, CacheUse(slot, ((0, count),), count))
        masks[text] = torch.cat([masks[text], alone["node#0"]["b"]])
        assert right_products(alone, masks[text])
    every = torch.cat(masks)
    assert len(every.unique()) == every.numel()


@pytest.mark.parametrize(
    ("beside", "plan"),
    [
        ((CacheUse(b"t" * 16, (), 0),), GROW),
        ((CacheUse(b"t" * 16, (), 0), CacheUse(b"u" * 16, (), 0)), BOTH),
        ((CacheUse(SLOT, (), 0),), BOTH),
    ],
)
def test_another_number_of_texts_is_refused(session: Session, beside: tuple[CacheUse, ...], plan: Plan) -> None:
    assert refused(session, [CacheUse(SLOT, (), 0, beside=beside)] * 2, plan) <= {
        InputError,
        ConflictError,
        AbortedError,
    }


def test_a_text_beside_another_that_the_dealer_knows_less_of_is_refused(session: Session) -> None:
    use = CacheUse(SLOT, (), 0, beside=(CacheUse(b"t" * 16, (), 3),))
    assert AgreementError in refused(session, [use] * 2, BOTH)


def test_another_number_of_runs_is_another_tape(session: Session) -> None:
    assert refused(session, [CacheUse(SLOT, (), 0, times=2), CacheUse(SLOT, (), 0)]) == {AgreementError}


def test_slots_have_nothing_in_common(session: Session) -> None:
    first, second = grown(session, CacheUse(SLOT, (), 0)), grown(session, CacheUse(b"t" * 16, (), 0))
    assert not (first["node#0"]["b"] == second["node#0"]["b"]).any()
    assert right_products(second, second["node#0"]["b"])


def refused(session: Session, uses: Sequence[CacheUse | None], plan: Plan = GROW) -> set[type]:
    """What the parties are told; nothing is dealt, the tape is burnt, and the slot is as it was."""
    held = session.dealer._session
    assert held is not None
    one, before = tape(), session.dealer.tapes_dealt
    counts = {name: store.count for name, store in held.slots.get(SLOT, {}).items()}
    answers = session.asks(one, plan, uses, timeout=10)
    assert not [a for a in answers if not isinstance(a, Exception)]
    assert session.dealer.tapes_dealt == before and session.dealer.bytes_sent in (0, before * GROW.correction_bytes())
    assert {name: store.count for name, store in held.slots.get(SLOT, {}).items()} == counts
    assert one in held.spent and not held.tapes
    assert [type(a) for a in session.asks(one, PLAN)] == [ConflictError] * len(answers)
    return {type(a) for a in answers} - {AbortedError, ConflictError}


@pytest.mark.parametrize(
    "plan", [GROW, plan_of(RowMask("k", (2, 3))), plan_of(CachedProduct("k", (1, 3), (8, 3), True))]
)
def test_rows_of_nobody_are_refused(session: Session, plan: Plan) -> None:
    assert refused(session, [None, None], plan) == {InputError}


@pytest.mark.parametrize("count", [0, 1, 3, 1 << 62])
def test_another_number_of_rows_is_refused(session: Session, count: int) -> None:
    """As after a dealer has forgotten: rows are never numbered from the beginning again."""
    grown(session, CacheUse(SLOT, (), 0))
    assert refused(session, [CacheUse(SLOT, (), count)] * 2) == {AgreementError}
    values = grown(session, CacheUse(SLOT, (), 2))
    assert right_products(values, values["node#0"]["b"])
    assert refused(session, [CacheUse(b"t" * 16, (), 1)] * 2) == {AgreementError}


@pytest.mark.parametrize(
    "other",
    [
        CacheUse(SLOT, ((0, 2),), 2),
        CacheUse(SLOT, ((0, 1), (1, 2)), 2),  # the same rows, told in another way
        CacheUse(SLOT, (), 2),
        CacheUse(b"t" * 16, (), 0),
        None,
    ],
)
def test_parties_that_mean_other_rows_are_refused(session: Session, other: CacheUse | None) -> None:
    grown(session, CacheUse(SLOT, (), 0))
    assert refused(session, [CacheUse(SLOT, ((0, 1),), 2), other]) <= {AgreementError, InputError}


def test_a_plan_appends_to_a_cache_once(session: Session) -> None:
    twice = plan_of(RowMask("k", (2, 3)), RowMask("k", (2, 3)))
    assert refused(session, [CacheUse(SLOT, (), 0)] * 2, twice) == {InputError}


def test_caches_of_a_slot_have_as_many_rows_each(session: Session) -> None:
    grown(session, CacheUse(SLOT, (), 0))
    both = plan_of(RowMask("k", (2, 3)), RowMask("v", (2, 3)))
    assert refused(session, [CacheUse(SLOT, (), 2)] * 2, both) == {AgreementError}


def test_rows_are_not_appended_by_a_tape_that_fails(session: Session) -> None:
    with pytest.raises(DeadlineError):
        session.ask(0, tape(), GROW, timeout=0.05, use=CacheUse(SLOT, (), 0))
    assert session.dealer._session is not None and not session.dealer._session.slots
    values = grown(session, CacheUse(SLOT, (), 0))
    assert right_products(values, values["node#0"]["b"])


def test_masks_of_rows_are_forgotten_when_told_and_with_the_session(dealer: Dealer, session: Session) -> None:
    others = b"t" * 16
    for slot in (SLOT, others):
        grown(session, CacheUse(slot, (), 0))
    dealer.forget(tape(), [SLOT])  # of another session
    assert dealer._session is not None and set(dealer._session.slots) == {SLOT, others}
    dealer.forget(session.id, [SLOT, b"u" * 16])
    assert set(dealer._session.slots) == {others}
    assert refused(session, [CacheUse(SLOT, ((0, 2),), 2)] * 2) == {AgreementError}
    assert grown(session, CacheUse(others, ((0, 2),), 2))
    again = Session(dealer).join()
    assert not dealer._session.slots
    assert refused(again, [CacheUse(others, ((0, 2),), 4)] * 2) == {AgreementError}


def test_what_all_have_asked_for_is_dealt_though_its_masks_are_forgotten_before(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A party that has its part may tell of it before the last one's is begun."""
    first, real = grown(session, CacheUse(SLOT, (), 0)), session.dealer._corrections

    def late(*args: Any) -> Any:
        session.dealer.forget(session.id, [SLOT])
        return real(*args)

    monkeypatch.setattr(session.dealer, "_corrections", late)
    second = grown(session, CacheUse(SLOT, ((0, 2),), 2))
    assert right_products(second, torch.cat([first["node#0"]["b"], second["node#0"]["b"]]))
    assert session.dealer._session is not None and not session.dealer._session.slots


def test_a_dealer_without_a_session_forgets_nothing(dealer: Dealer) -> None:
    dealer.forget(tape(), [SLOT])


def test_masks_of_rows_stay_out_of_texts(session: Session) -> None:
    rows = grown(session, CacheUse(SLOT, (), 0))["node#0"]["b"]
    assert not [word for word in rows.reshape(-1).tolist() if str(word) in repr(session.dealer._session)]


def test_what_the_dealer_keeps_opens_no_earlier_tape(session: Session) -> None:
    """Whoever seizes the dealer now and has recorded everything has no key of a tape that was dealt before."""
    one = tape()
    session.asks(one)
    held = session.dealer._session
    assert held is not None and not held.secrets and not held.tapes
    kept = [chain._key for chain in held.keys]
    assert not set(kept) & set(session.keys)
    later = {KeyChain(key).next(one, PLAN.digest()) for key in kept}
    assert not {k for e in later for k in (e.passing, e.kept)} & {
        k for e in session.tape_keys[one] for k in (e.passing, e.kept)
    }
    assert all(key.hex() not in repr(held) and repr(key) not in repr(held) for key in kept)


def test_seeds_stay_out_of_logs(dealer: Dealer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        session = Session(dealer).join()
        session.asks(tape())
        session.asks(tape(), [PLAN, plan_of(MASK)])
    for key in session.keys:
        assert key.hex()[:16] not in caplog.text and repr(key)[2:20] not in caplog.text


# --- witnesses -----------------------------------------------------------------------------------------------------


def test_a_witness_has_its_party_s_key_once_and_before_the_first_tape(dealer: Dealer) -> None:
    session = Session(dealer).join()
    key, nonce, nonces = dealer.witness(session.id, 1, 5)
    assert (key, nonce, nonces) == (session.keys[1], session.dealer_nonces[0], session.nonces)
    with pytest.raises(ConflictError):
        dealer.witness(session.id, 1, 5)
    session.asks(tape(), PLAN)
    with pytest.raises(AbortedError, match="too late"):
        dealer.witness(session.id, 0, 5)


def test_a_witness_waits_for_the_parties_and_is_not_served_in_another_session(dealer: Dealer) -> None:
    with pytest.raises(DeadlineError):
        dealer.witness(tape(), 0, 0.05)
    first = Session(dealer).join()
    Session(dealer).join()
    with pytest.raises(AbortedError):
        dealer.witness(first.id, 0, 5)


@pytest.mark.parametrize("n", [2, 3])
def test_the_last_party_s_witness_is_told_the_digest_of_its_corrections(n: int) -> None:
    dealer = Dealer(n, CLUSTER, witnessed=True)
    session, id_ = Session(dealer).join(), tape()
    asked = started(lambda: dealer.corrected(session.id, id_, 20), lambda: True)
    corrections = session.asks(id_, PLAN)[-1]
    assert asked.result(20) == hashlib.sha256(corrections).digest()
    with pytest.raises(DeadlineError):
        dealer.corrected(session.id, id_, 0.05)  # once
    with pytest.raises(AbortedError):
        dealer.corrected(tape(), id_, 5)


def test_without_witnesses_nothing_is_kept_for_them(dealer: Dealer) -> None:
    session = Session(dealer).join()
    session.asks(tape(), PLAN)
    assert dealer._session is not None and not dealer._session.corrected
