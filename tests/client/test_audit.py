"""Which canaries a client sends before its own requests, and how it judges the answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from mpcinfer.client import audit as audit_module
from mpcinfer.client.audit import Audit, batched
from mpcinfer.client.canaries import from_examples, from_prompts
from mpcinfer.client.data import Client
from mpcinfer.client.generation import Settings
from mpcinfer.client.model import Model
from mpcinfer.errors import ConfigError, ForbiddenError, InputError, NotFoundError, SignatureError, TamperingError
from mpcinfer.trust import canaries
from mpcinfer.trust.canaries import CanarySet, Example, Text
from tests.client.fakes import FakeCluster, info, spec
from tests.decoders_local import plain_logits, tiny_decoder, token_ids

ROWS = [spec("x", -1, 3)], [spec("y", -1, 2)]
WHOLE = [spec("x", 2, 3)], [spec("y", 2, 2)]
MODULE = nn.Linear(3, 2).eval().requires_grad_(False)
X = torch.linspace(-1, 1, 12).reshape(4, 3)


def model(*described: list[object], **more: object) -> Model:
    return Model.parse(info("m", *(described or ROWS), **more))


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each coin says yes, twice, then no."""
    said = iter([0, 0, audit_module._COIN - 1] * 100)
    monkeypatch.setattr(audit_module.secrets, "randbelow", lambda limit: next(said))


# --- what the owner makes --------------------------------------------------------------------------------------------


def test_numbers_with_a_tolerance() -> None:
    found = from_examples(model(), MODULE, [X[:3], X[3:]])
    assert [tuple(e.inputs[0].shape) for e in found.examples] == [(1, 3)] * 4
    answers = torch.cat([e.outputs[0] for e in found.examples]).double() / 65536
    assert torch.allclose(answers, MODULE(X).double(), atol=1e-4)
    assert found.tolerances == (round((float(answers.abs().max()) / 128 + 1 / 512) * 65536),)
    assert from_examples(model(), MODULE, [X], tolerance=0.5).tolerances == (32768,)
    whole = from_examples(model(*WHOLE), MODULE, [X[:2], (X[2:],)])
    assert [tuple(e.outputs[0].shape) for e in whole.examples] == [(2, 2)] * 2


@pytest.mark.parametrize("last", [nn.Identity(), nn.Softmax(-1)])
def test_indices_that_are_beyond_doubt(last: nn.Module) -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.2, 0.0], [0.0, 0.1, 5.0]])
    of = lambda reveal, *shape: model([spec("x", -1, 3)], [spec("y", -1, *shape, frac_bits=0)], reveal=reveal)  # noqa: E731
    found = from_examples(of("argmax"), last, [logits])
    assert [e.outputs[0].tolist() for e in found.examples] == [[0], [2]] and found.tolerances == (0,)
    found = from_examples(of("top-k", 2), last, [logits])
    assert [e.outputs[0].tolist() for e in found.examples] == [[[0, 2]]]
    assert len(from_examples(of("argmax"), last, [logits], margin=0.1).examples) == 3
    with pytest.raises(InputError, match="0.25 ahead"):
        from_examples(of("argmax"), last, [logits[1:2]])
    probabilities = model([spec("x", -1, 3)], [spec("y", -1, 3)], reveal="probabilities")
    (first, *_) = from_examples(probabilities, last, [logits]).examples
    assert torch.allclose(first.outputs[0] / 65536, logits[:1].softmax(-1), atol=1e-4)


def test_what_no_canary_can_be_made_of() -> None:
    with pytest.raises(InputError, match="reveal argmax"):
        from_examples(model([spec("x", -1, 3)], [spec("y", -1, frac_bits=0)]), MODULE, [X])
    with pytest.raises(InputError, match="2 outputs, this module 1"):
        from_examples(model(ROWS[0], [spec("y", -1, 2), spec("z", -1, 2)]), MODULE, [X])


def test_texts_end_before_a_doubtful_token() -> None:
    decoder, prompt = tiny_decoder(layers=1), token_ids(5)
    sure = from_prompts(model(), decoder, [prompt], 4, margin=0.0).texts[0]
    tokens, gaps = list(prompt), []
    for token in sure.tokens:
        best = plain_logits(decoder, tokens).topk(2)
        assert int(best.indices[0]) == token
        gaps.append(float(best.values[0] - best.values[1]))
        tokens.append(token)
    assert len(sure.tokens) == 4 and sure.prompt == tuple(prompt)
    smallest = gaps.index(min(gaps))
    if smallest:
        (cut,) = from_prompts(model(), decoder, [prompt], 4, margin=min(gaps) + 1e-6).texts
        assert cut.tokens == sure.tokens[:smallest]
    with pytest.raises(InputError, match="none of these prompts"):
        from_prompts(model(), decoder, [prompt], 4, margin=1e6)


def test_a_set_survives_its_file_and_shows_no_values(world: FakeCluster, tmp_path: Path) -> None:
    world.deploy(info("m", *ROWS))
    from mpcinfer.client.owner import ModelOwner

    with ModelOwner.connect(world.cluster, world.issue("owner/o")) as owner:
        canaries.write(owner.canaries("m", MODULE, [X]), tmp_path / "canaries.json")
        assert (tmp_path / "canaries.json").stat().st_mode & 0o077 == 0
        with pytest.raises(NotFoundError):
            owner.canaries("m", MODULE, [X], version=2)
    with ModelOwner.connect(world.cluster, world.issue("owner/other")) as other, pytest.raises(ForbiddenError):
        other.canaries("m", MODULE, [X])
    with Client.connect(world.cluster, world.issue("client/a")) as client:
        read = client.canaries(tmp_path / "canaries.json")
        with pytest.raises(ConfigError, match="cannot read"):
            client.canaries(tmp_path / "none.json")
    made = from_examples(model(), MODULE, [X])
    assert replace(read, examples=()) == replace(made, examples=())
    for a, b in zip(read.examples, made.examples, strict=True):
        assert torch.equal(a.inputs[0], b.inputs[0]) and torch.equal(a.outputs[0], b.outputs[0])
    assert "tensor" not in repr(read) and "1" not in repr(Text((11,), (12,)))


# --- what the client sends -------------------------------------------------------------------------------------------


def canary_set(**more: object) -> CanarySet:
    of = model()
    example = Example((torch.tensor([[1, 2, 3]]),), (torch.tensor([[5, -5]]),))
    whose = of.name, of.version, of.deployment_id, of.owner
    return replace(CanarySet(*whose, (2,), (example,), (Text((1, 2, 3), (4, 5, 6)),)), **more)  # type: ignore[arg-type]


def test_as_many_rows_as_the_request(always: None) -> None:
    chosen = list(Audit(0.5, canary_set()).examples(model(), [torch.zeros(4, 3)]))
    assert len(chosen) == 2
    for example in chosen:
        assert example.inputs[0].tolist() == [[1, 2, 3]] * 4 and example.outputs[0].tolist() == [[5, -5]] * 4
    assert batched(model()) and not batched(model(*WHOLE))


def test_a_text_of_the_same_length(always: None) -> None:
    texts = Audit(0.5, canary_set()).texts(model(), 3, Settings(max_new_tokens=2))
    assert list(texts) == [Text((1, 2, 3), (4, 5))] * 2


def test_refused_before_any_coin_is_tossed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module.secrets, "randbelow", lambda limit: pytest.fail("a coin"))
    audit = Audit(0.5, canary_set())
    with pytest.raises(InputError, match=r"shape \(1, 4\); those of this set have \(1, 3\)"):
        audit.examples(model(), [torch.zeros(2, 4)])
    with pytest.raises(InputError, match="shape"):
        audit.examples(model(*WHOLE), [torch.zeros(2, 3)])
    for length, most in ((2, 2), (3, 4)):
        with pytest.raises(InputError, match=f"prompt of {length} tokens and an answer of {most}; .* 3x3"):
            audit.texts(model(), length, Settings(max_new_tokens=most))
    for settings in (Settings(2, temperature=0.5), Settings(2, repetition_penalty=1.1)):
        with pytest.raises(InputError, match="greedy"):
            audit.texts(model(), 3, settings)
    for change in ({"model": "n"}, {"version": 2}, {"deployment": "00"}, {"owner": "owner/eve"}):
        with pytest.raises(SignatureError, match="not of the"):
            Audit(0.5, canary_set(**change)).examples(model(), [torch.zeros(2, 3)])
    for rate in (0.0, -1.0, 0.95, float("nan")):
        with pytest.raises(InputError, match="rate"):
            Audit(rate, canary_set())


def test_answers_are_judged_within_the_tolerance() -> None:
    audit, example = Audit(0.5, canary_set()), canary_set().examples[0]
    audit.check_example(example, [torch.tensor([[7, -7]])])
    for wrong in ([[8, -5]], [[5, -8]], [[5 - 2**63, -5]], [[5, -5], [5, -5]]):
        with pytest.raises(TamperingError, match="canary alarm"):
            audit.check_example(example, [torch.tensor(wrong)])
    audit.check_text(Text((1,), (4, 5)), [4, 5])
    for tokens in ([4], [4, 6], [4, 5, 6]):
        with pytest.raises(TamperingError, match="canary alarm"):
            audit.check_text(Text((1,), (4, 5)), tokens)
