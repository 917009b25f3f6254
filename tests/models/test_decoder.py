"""Decoders: what export makes of them serves any number of new and cached positions."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import export

from mpcinfer.errors import InputError
from mpcinfer.models import rope
from mpcinfer.models.decoder import Decoder, DecoderConfig, loaded_decoder
from mpcinfer.models.loaded import InputSpec, Sizes
from tests.models.decoders import in_chunks
from tests.models.test_encoder import operators

WORDS, CONTEXT = 20, 12
STYLES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_norm": True, "tied": False},
    "gemma": {"activation": "gelu_tanh", "embedding_scale": 4.0, "kv_heads": 1},
    "gpt2": {"rope": None, "norm": "layer", "gated": False, "activation": "gelu_tanh", "kv_heads": 4}
    | {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "gpt_neo": {"rope": None, "norm": "layer", "gated": False, "kv_heads": 4, "windows": (0, 3), "scale": 1.0},
}
BODY = {"embedding", "linear", "scaled_dot_product_attention", "cat", "add", "mul", "select", "view", "transpose"}
MASKS = {"arange", "le", "unsqueeze"}
OWN = {
    "llama": {"rms_norm", "silu", "index", "split"},
    "qwen3": {"rms_norm", "silu", "index", "split"},
    "gemma": {"rms_norm", "gelu", "index", "split"},
    "gpt2": {"layer_norm", "gelu"},
    "gpt_neo": {"layer_norm", "silu", "gt", "sub", "__and__"},
}
LAYOUT = {"slice", "sym_size", "getitem", "clone", "_unsafe_view"}


def decoder(**settings: Any) -> Decoder:
    """A small decoder with random parameters."""
    sizes = DecoderConfig(
        **{"vocabulary": WORDS, "context": CONTEXT, "width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 4}
        | {"hidden": 24, "activation": "silu", "eps": 1e-5, "rope": rope.plain(1e4, 4), "norm": "rms", "gated": True}
        | {"tied": True, "scale": 0.5, "windows": (0, 0)}
        | settings
    ).checked()
    torch.manual_seed(0)
    model = Decoder(sizes).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.requires_grad_(False)


# to export takes seconds: these two differ in every operator
OFTEN = ("llama", "gpt_neo")


@pytest.mark.parametrize("style", [s if s in OFTEN else pytest.param(s, marks=pytest.mark.slow) for s in STYLES])
def test_one_exported_program_of_whole_operators_serves_every_step(style: str) -> None:
    model = decoder(**STYLES[style])
    ids = torch.randint(WORDS, (1, CONTEXT))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
        program = export(model, model.example_inputs(ids), dynamic_shapes=model.dynamic_shapes())
        program = program.run_decompositions({})
    assert OWN[style] | MASKS <= operators(program) <= BODY | OWN[style] | MASKS | LAYOUT
    # nothing is between the grown cache and the attention
    _, *grown = program.graph.output_node().args[0]
    attention = [node for node in program.graph.nodes if "scaled_dot_product" in str(node.target)]
    assert [pair for node in attention for pair in node.args[1:3]] == grown
    assert [node.args[0][0].name for node in grown] == [f"caches_{i}" for i in range(len(grown))]
    run = program.module()
    whole = model(ids, *model.empty_caches())
    for lengths in ((12,), (1, 11), (5, 1, 6), (7, 1, 1, 3), (1,) * 12):
        results: tuple[torch.Tensor, ...] = (torch.empty(0), *model.empty_caches())
        for chunk in ids.split(lengths, 1):
            results = run(chunk, *results[1:])
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(results, whole, strict=True))


def test_a_tied_head_is_one_parameter_and_tables_are_no_parameters() -> None:
    model = decoder()
    assert {"turn"} == {name for name, _ in model.named_buffers()}
    assert not {"turn", "head.weight"} & set(model.state_dict())
    assert "head.weight" in decoder(tied=False).state_dict()


def test_a_window_hides_what_is_far_behind() -> None:
    ids = torch.arange(8)[None]
    other = torch.cat([torch.tensor([[9]]), ids[:, 1:]], 1)
    for window in (0, 3):
        model = decoder(layers=1, windows=(window,))
        near, far = (model(x, *model.empty_caches())[0] for x in (ids, other))
        assert near.equal(far) == (window > 0)


def test_examples_hold_what_the_model_makes_of_a_text() -> None:
    model = decoder()
    ids = torch.randint(WORDS, (9,))
    new, *caches = model.example_inputs(ids)
    assert new.shape == (1, 6) and all(cache.shape == (1, 2, 3, 4) for cache in caches)
    expected = in_chunks(model, ids[None], 9)
    assert torch.allclose(model(new, *caches)[0], expected[0], atol=1e-5)
    for length in (3, CONTEXT + 1):
        with pytest.raises(ValueError, match=f"an example has 4 to 12 ids, not {length}"):
            model.example_inputs(torch.zeros(length, dtype=torch.int64))


@pytest.mark.parametrize("sizes", [{"heads": 3}, {"head_dim": 3}, {"hidden": 0}, {"eps": -1.0}])
def test_sizes_that_contradict_each_other(sizes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="contradict each other"):
        decoder(**sizes)


def test_what_is_asked_of_whoever_runs_it() -> None:
    loaded = loaded_decoder(decoder(), "kind", None)
    assert loaded.context == CONTEXT and loaded.vocabulary is None
    assert [spec.name for spec in loaded.inputs] == ["ids", "keys0", "values0", "keys1", "values1"]
    assert loaded.inputs[-1] == InputSpec("values1", "float", (1, 2, Sizes(0, CONTEXT), 4))
