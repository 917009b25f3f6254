"""From what is said of a model's inputs to what torch.export and the limits need: example tensors, and free sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from mpcinfer.client.text import Tokenizer
from mpcinfer.errors import InputError
from mpcinfer.graph.capture import Captured, capture
from mpcinfer.models.decoder import Decoder
from mpcinfer.models.loaded import InputSpec, Loaded, Sizes

# a free size of the examples: large enough to say something of sums, small enough to be evaluated quickly
_EXAMPLE_SIZE = 128
_SENTENCES = (
    "The committee will meet again on Thursday to decide whether the bridge can be repaired before winter.",
    "Add 250 grams of flour, two eggs and a pinch of salt; stir until smooth, then let it rest for half an hour.",
    "def mean(values): return sum(values) / len(values)  # fails for an empty list!",
    "Is it true that honey never spoils? Archaeologists have found jars more than 3,000 years old, still edible.",
    "Dear Ms Alvarez, thank you for your letter of 12 March. Unfortunately we cannot refund the amount you claim.",
)


@dataclass(frozen=True)
class Examples:
    """What `specs` say of the inputs, one tensor for each, and what they are, for people (`origin`).

    `real`: they come from the model's owner. `dynamic_shapes`: free sizes as torch.export takes them, None if it finds
    them itself.
    """

    specs: tuple[InputSpec, ...]
    tensors: tuple[torch.Tensor, ...]
    origin: str
    real: bool
    dynamic_shapes: list[dict[int, Any]] | None = None

    def shapes(self, sizes: Mapping[str, int]) -> list[tuple[int, ...]]:
        """The inputs' shapes with free sizes as in `sizes`, by name, the others at their maximum.

        InputError for a size outside its range, and for a name that no free size has.
        """
        names = _names(self.specs)
        unknown = sorted(set(sizes) - set(names.values()))
        if unknown:
            known = ", ".join(names.values()) or "none"
            raise InputError(f"no free size is called {', '.join(unknown)}; the inputs have {known}")
        for (_, size), name in names.items():
            if not size.low <= sizes.get(name, size.high) <= size.high:
                raise InputError(f"{name} is from {size.low} to {size.high}, not {sizes[name]}")
        return [
            tuple(
                sizes.get(names[axis, size], size.high) if isinstance(size, Sizes) else size
                for axis, size in enumerate(spec.shape)
            )
            for spec in self.specs
        ]


def example_inputs(loaded: Loaded, specs: Sequence[InputSpec] = (), samples: Sequence[torch.Tensor] = ()) -> Examples:
    """Examples for a model's inputs, described by `specs`, else by the file, else by the samples themselves.

    `samples`, one for each input, are taken as they are; an exported program has its own. Otherwise they are made up,
    always the same: text through the model's tokenizer, else ids in turn; numbers from -1 to 1. Free sizes are called
    length, length2, ...; the same range on the same axis is the same size. InputError for samples that do not fit, and
    for ids that cannot be made up.
    """
    if isinstance(loaded.module, Decoder):
        return _of_language_model(loaded, samples)
    specs = tuple(specs or loaded.inputs or _described(samples))
    exported = isinstance(loaded.module, ExportedProgram)
    dynamic_shapes = None if exported else _dynamic_shapes(specs)
    if not specs:
        raise InputError("nothing says what inputs the model takes: describe them with --inputs")
    if samples:
        if len(samples) != len(specs):
            raise InputError(f"the model takes {len(specs)} inputs, the samples are {len(samples)}")
        tensors = tuple(_fitting(spec, x) for spec, x in zip(specs, samples, strict=True))
        return Examples(specs, tensors, "samples", True, dynamic_shapes)
    if exported:
        return Examples(specs, (), "the file's example inputs", True)
    made = tuple(_made_up(loaded, spec) for spec in specs)
    sentences = loaded.tokenizer is not None and all(spec.dtype == "int" for spec in specs)
    return Examples(specs, made, "built-in sentences" if sentences else "made-up numbers", False, dynamic_shapes)


def captured_model(loaded: Loaded, examples: Examples | None = None, *, reveal: str = "", **options: Any) -> Captured:
    """A loaded model as `graph.capture.capture` makes it a Program, with examples made up unless they are given.

    reveal: "" stands for "tokens" if it is a language model, for "logits" if not. options: as of `capture`.
    """
    examples = examples or example_inputs(loaded)
    if isinstance(loaded.module, Decoder):
        return capture(
            loaded.module,
            loaded.module.example_inputs(examples.tensors[0]),
            dynamic_shapes=loaded.module.dynamic_shapes(),
            calibration=examples.tensors,
            reveal=reveal or "tokens",
            **options,
        )
    return capture(
        loaded.module, examples.tensors, dynamic_shapes=examples.dynamic_shapes, reveal=reveal or "logits", **options
    )


def _of_language_model(loaded: Loaded, samples: Sequence[torch.Tensor]) -> Examples:
    """Ids of a text, as it is read from its beginning, for a model whose other inputs are its caches."""
    assert isinstance(loaded.module, Decoder)
    config, spec = loaded.module.config, loaded.inputs[0]
    if samples:
        if len(samples) > 1:
            raise InputError("samples for a language model are one tensor, the ids of a text")
        return Examples((spec,), (_fitting(spec, samples[0].reshape(1, -1)),), "samples", True)
    if loaded.vocabulary is None:
        ids, origin = torch.arange(config.vocabulary), "ids in turn"
    else:
        read, text = Tokenizer.of(loaded.vocabulary), " ".join(_SENTENCES)
        ids = read.chat([{"role": "user", "content": text}]) if loaded.vocabulary.template else read.ids(text)
        origin = "built-in sentences"
    return Examples((spec,), (ids[: min(_EXAMPLE_SIZE, config.context)].reshape(1, -1),), origin, False)


def _names(specs: Sequence[InputSpec]) -> dict[tuple[int, Sizes], str]:
    """What the free sizes are called: by axis and range, since equal ones are one size."""
    free = [(axis, size) for spec in specs for axis, size in enumerate(spec.shape) if isinstance(size, Sizes)]
    return {size: f"length{i}" if i > 1 else "length" for i, size in enumerate(dict.fromkeys(free), 1)}


def _dynamic_shapes(specs: Sequence[InputSpec]) -> list[dict[int, Any]] | None:
    names = _names(specs)
    dims = {(axis, size): Dim(name, min=size.low, max=size.high) for (axis, size), name in names.items()}
    found = [{axis: dims[axis, s] for axis, s in enumerate(spec.shape) if isinstance(s, Sizes)} for spec in specs]
    return found if dims else None


def _described(samples: Sequence[torch.Tensor]) -> list[InputSpec]:
    return [
        InputSpec(f"input{i}", "float" if x.dtype.is_floating_point else "int", tuple(x.shape))
        for i, x in enumerate(samples)
    ]


def read_samples(files: Sequence[Path], names: Sequence[str] = ()) -> list[torch.Tensor]:
    """Tensors from .npy, .npz and safetensors files, in the order of `names` where a file names them.

    InputError for a file that is none of these, or holds other names.
    """
    found: list[torch.Tensor] = []
    for file in files:
        try:
            arrays = _read(file)
        except (OSError, ValueError, EOFError, BadZipFile) as error:
            cause = getattr(error, "strerror", None) or "not .npy, .npz or safetensors without objects"
            raise InputError(f"cannot read {file}: {cause}") from error
        if isinstance(arrays, dict):
            wanted = names or list(arrays)
            if set(arrays) != set(wanted):
                raise InputError(f"{file} holds {', '.join(sorted(arrays))}; the inputs are {', '.join(wanted)}")
            found += [arrays[name] for name in wanted]
        else:
            found.append(arrays)
    return found


def _read(file: Path) -> torch.Tensor | dict[str, torch.Tensor]:
    with file.open("rb") as stream:
        start = stream.read(9)
    if start[8:9] == b"{":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(file))
        except SafetensorError as error:
            raise ValueError("damaged") from error
    loaded = np.load(file, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return _tensor(loaded)
    with loaded:
        return {name: _tensor(loaded[name]) for name in loaded.files}


def _tensor(array: Any) -> torch.Tensor:
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise ValueError("not real numbers")
    return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))


def _fitting(spec: InputSpec, x: torch.Tensor) -> torch.Tensor:
    """A sample with the dtype of its input; the first size may be another than a fixed one: it is the batch then."""
    fits = x.dim() == len(spec.shape) and all(
        want.low <= got <= want.high if isinstance(want, Sizes) else want == got or axis == 0
        for axis, (want, got) in enumerate(zip(spec.shape, x.shape, strict=True))
    )
    if not fits:
        raise InputError(f"the sample for input {spec.name!r} has shape {list(x.shape)}, which is not what it takes")
    if (spec.dtype == "float") != x.dtype.is_floating_point:
        raise InputError(f"the sample for input {spec.name!r} has dtype {x.dtype}; the input takes {spec.dtype}")
    return x.float() if spec.dtype == "float" else x.long()


def _made_up(loaded: Loaded, spec: InputSpec) -> torch.Tensor:
    shape = [max(size.low, min(size.high, _EXAMPLE_SIZE)) if isinstance(size, Sizes) else size for size in spec.shape]
    count = math.prod(shape)
    if spec.dtype == "float":
        return torch.linspace(-1, 1, count).reshape(shape)
    if loaded.tokenizer is not None:
        ids = torch.tensor(_sentence_ids(loaded.tokenizer))
    else:
        ids = torch.arange(_vocabulary(loaded.module, spec))
    return ids.repeat(-(-count // len(ids)))[:count].reshape(shape)


def _sentence_ids(tokenizer: Path) -> list[int]:
    from tokenizers import Tokenizer

    read = Tokenizer.from_file(str(tokenizer))
    read.no_truncation()
    read.no_padding()
    return [i for sentence in _SENTENCES for i in read.encode(sentence).ids]


def _vocabulary(module: Any, spec: InputSpec) -> int:
    """How many ids every table of the model has."""
    tables = (
        [m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)]
        if isinstance(module, nn.Module)
        else []
    )
    if not tables:
        raise InputError(f"there is no telling which ids input {spec.name!r} takes: give some with --samples")
    return min(tables)
