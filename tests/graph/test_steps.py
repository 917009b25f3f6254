"""Decoders, step by step over caches: the right logits, at the planned cost, whatever way the text was cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

from mpcinfer.errors import InputError, MpcInferError, UnsupportedError
from mpcinfer.graph.capture import Captured, capture
from mpcinfer.graph.plan import Planner
from mpcinfer.graph.program import Cache, Program
from mpcinfer.graph.step import CHUNK, ROOM, capacity
from mpcinfer.models.decoder import Decoder
from mpcinfer.nn.sampling import Choice
from mpcinfer.protocol.tracing import outermost_scope
from tests.decoders_local import (
    GREEDY,
    STYLES,
    VOCABULARY,
    LocalText,
    captured_decoder,
    decoder,
    plain_logits,
    tiny_decoder,
    token_ids,
)

ERROR = 2e-3


@pytest.fixture(params=STYLES, scope="module")
def style(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def follow(model: Decoder, captured: Captured, parties: int, chunks: list[int], more: int) -> LocalText:
    """Take in a text in chunks, then choose tokens that are fed back as they are: all logits as the model's own."""
    text, tokens = LocalText(captured, parties), token_ids(sum(chunks), 1)
    at, done = 0, []
    for chunk in chunks:
        done = text.take_in(tokens[at : at + chunk], GREEDY if at + chunk == len(tokens) else None)
        at += chunk
    for _ in range(more):
        token, logits = text.chosen(done)
        expected = plain_logits(model, tokens)
        assert float((logits - expected).abs().max()) < ERROR
        assert int(logits.argmax()) == token and float(expected.max() - expected[token]) < 2 * ERROR
        tokens.append(token)
        done = text.take_in([each.token for each in done], GREEDY)  # type: ignore[misc]
    return text


def test_steps_agree_with_plaintext(style: str, parties: int) -> None:
    text = follow(*decoder(style), parties, [5, 3], 3)
    assert text.length == 11 and all(c.shape[-2] == 11 for rows in text.rows for c in rows or [])


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [[1], [32, 5], [31, 1, 1]])
def test_texts_cut_in_other_ways(style: str, chunks: list[int]) -> None:
    """Across an edge of the room, too."""
    follow(*decoder(style), 2, chunks, 2)


@pytest.mark.slow
def test_windows_norms_of_heads_and_scaled_embeddings() -> None:
    model = tiny_decoder(windows=(3, 0), head_norm=True, embedding_scale=4.0, qkv_bias=True, scale=0.3)
    follow(model, captured_decoder(model), 2, [6], 3)


def test_a_penalty_counts_tokens_that_were_chosen_too() -> None:
    model, captured = decoder()
    text, tokens = LocalText(captured, 2), token_ids(4, 2)
    choice = Choice.of(0.0, 0, 2.0)
    done = text.take_in(tokens, choice)
    for _ in range(2):
        token, logits = text.chosen(done)
        assert float((logits - plain_logits(model, tokens)).abs().max()) < ERROR  # those without the penalty
        seen = torch.zeros(VOCABULARY, dtype=torch.bool)
        seen[tokens] = True
        penalised = torch.where(seen, torch.where(logits > 0, logits / 2, logits * 2), logits)
        assert float(penalised.max() - penalised[token]) < ERROR
        tokens.append(token)
        done = text.take_in([each.token for each in done], choice)  # type: ignore[misc]


def test_what_leaves_is_what_the_owner_reveals() -> None:
    model, _ = decoder()
    text = LocalText(captured_decoder(model, "tokens"), 2)
    assert text.take_in([1, 2], None)[0].outputs == ()
    (output,) = text.take_in([3], GREEDY)[0].outputs
    assert output.shape == (1, 1) and output.frac_bits == 0


# --- cost ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_step_costs_what_its_room_costs(style: str, parties: int) -> None:
    """Texts of different lengths with the same room: the same plan and the same messages."""
    _, captured = decoder(style)
    plans, sizes = [], []
    for before in (3, 17):
        text = LocalText(captured, parties)
        text.take_in(token_ids(before), None)
        done = text.take_in([7], GREEDY)
        assert done[0].token is not None
        sizes.append([(label, bits, value.shape) for label, bits, value in text.world.transcript.openings])
        plans.append(Planner(captured.program, parties=parties).step(1, capacity(before + 1), GREEDY)[0].digest())
    assert plans[0] == plans[1] and sizes[0] == sizes[1]


def test_rounds_do_not_grow_with_the_text() -> None:
    planner = Planner(decoder()[1].program, parties=2)
    _, short, _ = planner.step(1, 40, GREEDY)
    _, long, _ = planner.step(1, 64, GREEDY)
    assert short.rounds == long.rounds  # the maximum has three levels from 33 to 128, and two below
    assert planner.step(1, 40, GREEDY)[1] == short
    assert planner.step(1, 32, GREEDY)[1].rounds == short.rounds - 3 * 2


def test_what_no_token_needs_is_not_computed() -> None:
    """Without a choice there are no logits to make, and the last layer ends with its rows."""
    planner = Planner(decoder()[1].program, parties=2)
    taken, cost, logits = planner.step(4, 32, None)
    chosen, more, shape = planner.step(4, 32, GREEDY)
    assert logits == () and shape == (1, VOCABULARY) and cost.rounds < more.rounds
    assert not [n for n, _ in taken.entries if outermost_scope(n) in ("mpc.sampling", "output0", "output1")]
    assert len(taken.entries) < len(chosen.entries)


def test_room() -> None:
    assert [capacity(n) for n in (1, ROOM - 1, ROOM, ROOM + 1)] == [ROOM, ROOM, ROOM, 2 * ROOM] and CHUNK <= ROOM


# --- programs ------------------------------------------------------------------------------------------------------


def test_a_program_with_caches_survives_the_wire(style: str) -> None:
    model, captured = decoder(style)
    program = captured.program
    again = Program.from_bytes(program.to_bytes())
    assert again == program and again.digest() == program.digest() and again.context == 64
    assert [c.shape for c in again.caches] == [(1, model.config.kv_heads, 0, model.config.head_dim)] * 4
    assert len(again.inputs) == len(again.outputs) == 1 and again.inputs[0].limit == VOCABULARY
    appended = [node for node in again.nodes if node.op == "mpc.append"]
    assert [node.name for node in appended] == [c.result for c in again.caches]
    tied = [p.name for p in again.parameters if p.shape == (VOCABULARY, 16)]
    assert len(tied) == 1 if model.config.tied else True  # one secret, one mask


@pytest.mark.parametrize(
    "change",
    [
        lambda p: replace(p, caches=p.caches[:-1]),
        lambda p: replace(p, caches=(*p.caches[:-1], replace(p.caches[-1], rows=0))),
        lambda p: replace(p, caches=(*p.caches[:-1], replace(p.caches[-1], rows=-5))),
        lambda p: replace(p, caches=(*p.caches[:-1], replace(p.caches[-1], result=p.caches[0].result))),
        lambda p: replace(p, caches=(*p.caches[:-1], replace(p.caches[-1], result="nothing"))),
        lambda p: replace(p, caches=(*p.caches[:-1], replace(p.caches[-1], shape=(1, 2, 3, 8)))),
        lambda p: replace(p, caches=(*p.caches[:-1], replace(p.caches[-1], shape=(0,)))),
        lambda p: replace(p, caches=(*p.caches[:-1], replace(p.caches[-1], shape=(0, 2, 0, 8)))),
        lambda p: replace(p, caches=(*p.caches, p.caches[0])),
        lambda p: replace(p, caches=(*p.caches, Cache("more", (1, 0, 2), 16, "x", 5))),
        lambda p: replace(p, reveal="argmax"),
        lambda p: replace(p, results=p.results * 2, outputs=p.outputs * 2),
        lambda p: replace(p, caches=()),
    ],
)
def test_impossible_programs_are_refused(change: Any) -> None:
    with pytest.raises(InputError):
        Program.from_bytes(change(decoder()[1].program).to_bytes())


class Model(nn.Module):
    """Embeddings, one head of attention over a cache, and what a test changes."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.how = how
        self.words, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)

    def forward(self, ids: torch.Tensor, rows: torch.Tensor) -> Any:
        x = self.words(ids)
        grown = torch.cat([x, rows] if self.how.get("before") else [rows, x], dim=1)
        y = nn.functional.scaled_dot_product_attention(x, grown, grown)
        if self.how.get("read"):
            y = y + rows.mean(1, keepdim=True)
        logits = self.head(y[:, -1])
        return (logits, y, grown) if self.how.get("two") else (logits, grown)


def captured(reveal: str = "tokens", most: int | None = 20, **how: Any) -> Captured:
    shapes = ({1: Dim("new", min=1, max=20)}, {1: Dim("cached", min=0, max=most)})
    torch.manual_seed(0)
    inputs = [torch.tensor([[1, 2, 3]]), torch.randn(1, 5, 4)]
    return capture(Model(**how).eval(), inputs, dynamic_shapes=shapes, reveal=reveal)


def test_a_model_of_somebody_s_own() -> None:
    program = captured().program
    assert [(c.name, c.shape, c.rows) for c in program.caches] == [("rows", (1, 0, 4), 20)] and program.context == 20
    assert Planner(program, parties=2).step(1, 32, GREEDY)[2] == (1, 10)


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({"most": None}, "largest size"),
        ({"reveal": "argmax"}, "reveals tokens, or logits"),
        ({"reveal": "probabilities"}, "reveals tokens, or logits"),
        ({"two": True}, "indices and yields logits or tokens"),
        ({"before": True}, "only a model with caches"),
        ({"read": True}, "only a model with caches"),
    ],
)
def test_models_whose_caches_are_none_are_refused(how: dict[str, Any], text: str) -> None:
    with pytest.raises(MpcInferError, match=text):
        captured(**how)


def test_a_cache_of_a_fixed_size_is_refused() -> None:
    inputs = [torch.tensor([[1, 2, 3]]), torch.randn(1, 5, 4)]
    with pytest.raises(UnsupportedError, match="fixed number of rows"):
        capture(Model().eval(), inputs, dynamic_shapes=({1: Dim("new", min=1, max=20)}, {}), reveal="tokens")
