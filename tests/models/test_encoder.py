"""Encoders and their heads: what export makes of them, and what they return for any length and batch."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export

from mpcinfer.models.encoder import (
    ACTIVATIONS,
    Encoder,
    EncoderConfig,
    SentenceEmbedding,
    SequenceClassifier,
    SpanFinder,
    TokenClassifier,
    WordPredictor,
)

WIDTH, WORDS, POSITIONS, CLASSES = 8, 20, 12, 3
HEADS = {
    "none": nn.Identity,
    "mean": lambda: SentenceEmbedding("mean", normalised=True),
    "first": lambda: SentenceEmbedding("first", normalised=False),
    "sequence": lambda: SequenceClassifier(WIDTH, CLASSES, "tanh"),
    "tokens": lambda: TokenClassifier(WIDTH, CLASSES),
    "span": lambda: SpanFinder(WIDTH),
    "words": lambda: WordPredictor(WIDTH, WORDS, "gelu", 1e-5),
}
SHAPES = {
    "none": lambda length: (length, WIDTH),
    "mean": lambda length: (WIDTH,),
    "first": lambda length: (WIDTH,),
    "sequence": lambda length: (CLASSES,),
    "tokens": lambda length: (length, CLASSES),
    "span": lambda length: (2, length),
    "words": lambda length: (length, WORDS),
}
BODY = {
    "embedding",
    "slice",
    "add",
    "layer_norm",
    "linear",
    "split",
    "view",
    "transpose",
    "scaled_dot_product_attention",
}
BODY |= {"gelu"}
# export lays out a tensor again before it views it, and asks for sizes
LAYOUT = {"clone", "_unsafe_view", "sym_size", "getitem"}
OWN = {
    "none": set(),
    "mean": {"mean", "mul", "sum", "rsqrt"},
    "first": {"select"},
    "sequence": {"select", "tanh"},
    "tokens": set(),
    "span": set(),
    "words": set(),
}


def encoder(head: nn.Module, activation: str = "gelu", layers: int = 1) -> Encoder:
    """A small encoder with random parameters."""
    torch.manual_seed(0)
    model = Encoder(EncoderConfig(WORDS, POSITIONS, WIDTH, layers, 2, 16, activation, 1e-5), head).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.requires_grad_(False)


def exported(model: nn.Module, x: torch.Tensor) -> ExportedProgram:
    """The model with all sizes free, the way `graph.capture` exports."""
    axes = (Dim("length", min=1, max=POSITIONS), Dim("batch"))
    free = dict(enumerate(reversed(axes[: x.dim()])))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
        return export(model, (x,), dynamic_shapes=(free,)).run_decompositions({})


def operators(program: ExportedProgram) -> set[str]:
    """The names of what it calls, without overloads."""
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return {getattr(target, "_opname", None) or target.__name__ for target in called}


@pytest.mark.parametrize("head", HEADS)
def test_one_exported_program_of_few_whole_operators_serves_every_length(head: str) -> None:
    model = encoder(HEADS[head]())
    # ids [length] is how one private sequence comes; a batch takes longer to export, and heads look at the last axes
    for shape in ((5,), (2, 5)) if head == "mean" else ((5,),):
        program = exported(model, torch.zeros(shape, dtype=torch.int64))
        assert BODY | OWN[head] <= operators(program) <= BODY | OWN[head] | LAYOUT
        run = program.module()
        for length in (1, 2, 7, POSITIONS):
            ids = torch.randint(WORDS, (*shape[:-1], length))
            assert torch.allclose(run(ids), model(ids), atol=1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_shapes_and_sequences_that_do_not_see_each_other(head: str) -> None:
    model = encoder(HEADS[head]())
    for length in (1, 2, POSITIONS):
        ids = torch.randint(WORDS, (3, length))
        together = model(ids)
        assert together.shape == (3, *SHAPES[head](length))
        for one, result in zip(ids, together, strict=True):
            assert torch.allclose(model(one), result, atol=1e-5)


def test_a_sequence_longer_than_the_position_table_is_refused() -> None:
    with pytest.raises(RuntimeError, match="must match"):
        encoder(nn.Identity())(torch.zeros(POSITIONS + 1, dtype=torch.int64))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_one_operator(activation: str) -> None:
    program = exported(ACTIVATIONS[activation](), torch.zeros(5))
    assert operators(program) == {"gelu" if activation == "gelu_tanh" else activation}


def test_embeddings_have_length_one_unless_all_is_zero() -> None:
    head = SentenceEmbedding("mean", normalised=True)
    assert torch.allclose(head(torch.randn(4, 6, WIDTH)).norm(dim=-1), torch.ones(4))
    assert head(torch.zeros(6, WIDTH)).equal(torch.zeros(WIDTH))
    with pytest.raises(ValueError, match="pooling"):
        SentenceEmbedding("max", normalised=True)


def test_order_of_words_matters() -> None:
    model = encoder(HEADS["mean"](), layers=2)
    assert not torch.allclose(model(torch.tensor([3, 4, 5])), model(torch.tensor([5, 4, 3])), atol=1e-3)
