"""Example inputs: what is made up, what is taken as it is, and how free sizes are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from mpcinfer.client.examples import example_inputs
from mpcinfer.errors import InputError
from mpcinfer.models.loaded import InputSpec, Loaded, Sizes, parse_inputs


def loaded(module: nn.Module | None = None, *specs: str, tokenizer: Path | None = None) -> Loaded:
    return Loaded(module or nn.Identity(), parse_inputs(specs), "test", tokenizer)


def test_numbers_are_made_up_the_same_way_every_time() -> None:
    made = example_inputs(loaded(None, "x:float[2,3]"))
    assert torch.equal(made.tensors[0], torch.linspace(-1, 1, 6).reshape(2, 3))
    assert not made.real and made.origin == "made-up numbers" and made.dynamic_shapes is None
    assert made.shapes({}) == [(2, 3)]
    with pytest.raises(InputError, match="--inputs"):
        example_inputs(loaded())


def test_ids_are_in_every_table() -> None:
    module = nn.ModuleList([nn.Embedding(7, 2), nn.Embedding(5, 2)])
    (ids,) = example_inputs(loaded(module, "ids:int[1..256]")).tensors
    assert ids.dtype == torch.int64 and ids.shape == (128,) and ids.tolist()[:7] == [0, 1, 2, 3, 4, 0, 1]
    with pytest.raises(InputError, match="ids.*--samples"):
        example_inputs(loaded(None, "ids:int[1..256]"))


def test_ids_are_text_if_there_is_a_tokenizer(tmp_path: Path) -> None:
    words = {"[UNK]": 0, "flour": 1, "the": 2, "honey": 3}
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
                "padding": None,
                "added_tokens": [],
                "normalizer": {"type": "Lowercase"},
                "pre_tokenizer": {"type": "Whitespace"},
                "post_processor": None,
                "decoder": None,
                "model": {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"},
            }
        )
    )
    made = example_inputs(loaded(None, "ids:int[1..128]", tokenizer=tmp_path / "tokenizer.json"))
    assert made.origin == "built-in sentences" and not made.real
    assert set(made.tensors[0].tolist()) == {0, 1, 2, 3} and made.tensors[0].shape == (128,)


def test_free_sizes() -> None:
    specs = parse_inputs(["ids:int[1..256]", "mask:float[1..256]", "x:float[2..9,1..256,4]"])
    samples = [torch.ones(5, dtype=torch.int64), torch.ones(5), torch.ones(3, 5, 4)]
    made = example_inputs(loaded(), specs, samples)
    assert made.real and made.dynamic_shapes is not None
    ids, mask, x = made.dynamic_shapes
    assert ids[0] is mask[0] and (ids[0].__name__, ids[0].min, ids[0].max) == ("length", 1, 256)
    assert {axis: dim.__name__ for axis, dim in x.items()} == {0: "length2", 1: "length3"}
    assert made.shapes({}) == [(256,), (256,), (9, 256, 4)]
    assert made.shapes({"length": 32, "length2": 2}) == [(32,), (32,), (2, 256, 4)]
    with pytest.raises(InputError, match="from 1 to 256"):
        made.shapes({"length": 257})
    with pytest.raises(InputError, match="length, length2, length3"):
        made.shapes({"batch": 1})


def test_samples_are_taken_as_they_are() -> None:
    x = torch.arange(12.0).reshape(4, 3).double()
    made = example_inputs(loaded(None, "x:float[1,3]"), samples=[x])  # several rows where one is asked for
    assert torch.equal(made.tensors[0], x.float()) and made.origin == "samples"
    assert example_inputs(loaded(), samples=[x]).specs == (InputSpec("input0", "float", (4, 3)),)
    free = [InputSpec("x", "float", (1, Sizes(2, 3)))]
    assert example_inputs(loaded(), free, [x]).tensors[0].shape == (4, 3)
    for wrong in (x[:, :1], x[0], x.long()):
        with pytest.raises(InputError, match="sample for input 'x'"):
            example_inputs(loaded(), free, [wrong])
    with pytest.raises(InputError, match="2 inputs, the samples are 1"):
        example_inputs(loaded(None, "x:float[1,3]", "y:float[1,3]"), samples=[x])


def test_an_exported_program_has_its_own() -> None:
    exported = torch.export.export(nn.Linear(3, 2), (torch.zeros(1, 3),))
    made = example_inputs(Loaded(exported, parse_inputs(["x:float[1,3]"]), "test"))
    assert made.tensors == () and made.real and made.dynamic_shapes is None
