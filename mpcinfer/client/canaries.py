"""The model owner's side of canaries: right answers from the model itself, kept where they are beyond doubt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from mpcinfer.client.audit import batched
from mpcinfer.client.inputs import encode_inputs
from mpcinfer.client.model import Model
from mpcinfer.errors import InputError
from mpcinfer.models.decoder import Decoder
from mpcinfer.trust.canaries import CanarySet, Example, Text

if TYPE_CHECKING:
    from torch import nn

Inputs = torch.Tensor | Sequence[torch.Tensor]

MARGIN = 0.25
"""By how much a logit must exceed the next one for the order of the two to be beyond doubt."""
# numbers may be off by this part of the largest, and by this much besides: some hundred times what the protocols add
_RELATIVE, _ABSOLUTE = 2.0**-7, 2.0**-9


def from_examples(
    model: Model,
    module: nn.Module | ExportedProgram,
    inputs: Sequence[Inputs],
    *,
    margin: float = MARGIN,
    tolerance: float | None = None,
) -> CanarySet:
    """Canaries for `infer`: one for each of `inputs`, or for each row of them if rows do not influence each other.

    Those are left out whose answer is an index that is not `margin` ahead of the next. InputError if none is left.
    tolerance: how far numbers may be off; by default 1/128 of the largest among the answers, and 1/512.
    """
    run: Any = module.module() if isinstance(module, ExportedProgram) else module
    found: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
    for each in inputs:
        given = [each] if isinstance(each, torch.Tensor) else list(each)
        encoded = encode_inputs(model, given)
        with torch.no_grad():
            outputs = [y for y in tree_leaves(run(*given)) if isinstance(y, torch.Tensor)]
        if len(outputs) != len(model.outputs):
            raise InputError(f"model {model.name!r} has {len(model.outputs)} outputs, this module {len(outputs)}")
        for row in range(len(encoded[0])) if batched(model) else [None]:
            part = slice(None) if row is None else slice(row, row + 1)
            answers = _revealed(model, [y[part] if row is not None else y for y in outputs], margin)
            if answers is not None:
                found.append(([x[part] if row is not None else x for x in encoded], answers))
    if not found:
        raise InputError(f"none of these inputs has an answer that is {margin:g} ahead of the next; give others")
    tolerances: list[int] = []
    examples = [Example(tuple(given), ()) for given, _ in found]
    for i, spec in enumerate(model.outputs):
        values = [answers[i] for _, answers in found]
        allowed = 0.0
        if spec.frac_bits:
            largest = max(float(y.abs().max()) for y in values)
            allowed = _RELATIVE * largest + _ABSOLUTE if tolerance is None else tolerance
            values = [torch.round(y.double() * 2.0**spec.frac_bits).long() for y in values]
        tolerances.append(round(allowed * 2.0**spec.frac_bits))
        examples = [Example(e.inputs, (*e.outputs, y)) for e, y in zip(examples, values, strict=True)]
    return CanarySet(*_whose(model), tuple(tolerances), tuple(examples))


def from_prompts(
    model: Model, module: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, margin: float = MARGIN
) -> CanarySet:
    """Canaries for `generate`: each prompt with what the model continues it with, up to `max_new_tokens` tokens.

    An answer ends before the first token whose logit is not `margin` ahead of the next; InputError if all are empty.
    """
    texts = [Text(tuple(prompt), tuple(_continued(module, prompt, max_new_tokens, margin))) for prompt in prompts]
    texts = [text for text in texts if text.tokens]
    if not texts:
        raise InputError(f"after none of these prompts is one token {margin:g} ahead of the others; give others")
    return CanarySet(*_whose(model), texts=tuple(texts))


def _whose(model: Model) -> tuple[str, int, str, str]:
    return model.name, model.version, model.deployment_id, model.owner


def _revealed(model: Model, outputs: list[torch.Tensor], margin: float) -> list[torch.Tensor] | None:
    """What the parties reveal of these; None if an index is not certain."""
    if model.reveal == "logits":
        if any(not spec.frac_bits for spec in model.outputs):
            raise InputError("whether an index that the model itself returns is certain cannot be seen; reveal argmax")
        return outputs
    (y,) = outputs
    y = y.double()
    # a softmax at the model's end is left to the parties, who reveal the order of what goes into it
    if bool((y >= 0).all()) and torch.allclose(y.sum(-1), torch.ones(y.shape[:-1], dtype=y.dtype), atol=1e-4):
        y = y.log()
    if model.reveal == "probabilities":
        return [y.softmax(-1)]
    k = 1 if model.reveal == "argmax" else model.outputs[0].shape[-1]
    best = y.topk(min(k + 1, y.shape[-1]))
    if bool((best.values[..., :-1] - best.values[..., 1:] < margin).any()):
        return None
    return [best.indices[..., 0] if model.reveal == "argmax" else best.indices[..., :k]]


def _continued(module: Decoder, prompt: Sequence[int], most: int, margin: float) -> list[int]:
    new, caches, found = torch.tensor([list(prompt)]), module.empty_caches(), list[int]()
    with torch.no_grad():
        while len(found) < most:
            logits, *rest = module(new, *caches)
            best = logits[0].topk(2)
            if float(best.values[0] - best.values[1]) < margin:
                break
            found.append(int(best.indices[0]))
            new, caches = best.indices[None, :1], tuple(rest)
    return found
