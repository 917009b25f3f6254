"""The real networks that demo, benchmarks and tests run, as torch modules."""

from __future__ import annotations

import io
import json

import torch
from assets import DIGITS, guard_parameters, member, minilm, smollm
from torch import nn

from mpcinfer.models import gguf
from mpcinfer.models.huggingface import load
from mpcinfer.models.loaded import Loaded

GUARD_LABELS = ("benign", "injection")


def mnist_network() -> nn.Module:
    """The network of digit-recognizer-py 0.1.0 (MIT), trained on MNIST: 390,410 parameters. [batch, 1, 28, 28]."""
    layers: list[nn.Module] = []
    for before, after in ((1, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(
        nn.Sequential(*layers), nn.Flatten(), nn.Sequential(nn.Linear(1152, 256), nn.ReLU(), nn.Linear(256, 10))
    )
    file = io.BytesIO(member(DIGITS, "digit_recognizer/models/handwriting_model.pth"))
    saved = torch.load(file, weights_only=True)
    model.load_state_dict({k.replace("conv_layers", "0").replace("fc_layers", "2"): v for k, v in saved.items()})
    return model.eval()


def sentence_encoder() -> Loaded:
    """all-MiniLM-L6-v2: the ids of a sentence to its embedding [384], of length 1."""
    return load(minilm())


def prompt_guard() -> Loaded:
    """MiniLM and on its embedding jailguard's classifier: the ids of a prompt to logits of GUARD_LABELS.

    The classifier has one logit z and calls a prompt an injection if sigmoid(z) > 0.5. The logits here are (0, z):
    their softmax holds sigmoid(z), and the larger is the verdict.
    """
    encoder = sentence_encoder()
    saved = {name: torch.tensor(value) for name, value in json.loads(guard_parameters()).items()}
    hidden, out = (nn.Linear(384, 256), nn.Linear(256, 128)), nn.Linear(128, 2)
    with torch.no_grad():
        for layer, name in zip(hidden, ("h1", "h2"), strict=True):
            layer.weight.copy_(saved[f"w_{name}"])
            layer.bias.copy_(saved[f"b_{name}"])
        for parameter, row in ((out.weight, saved["w_out"]), (out.bias, saved["b_out"])):
            parameter.copy_(torch.cat([torch.zeros_like(row), row]))
    classifier = nn.Sequential(hidden[0], nn.ReLU(), hidden[1], nn.ReLU(), out)
    assert isinstance(encoder.module, nn.Module)
    return Loaded(
        module=nn.Sequential(encoder.module, classifier).eval().requires_grad_(False),
        inputs=encoder.inputs,
        kind="prompt-injection guard (MiniLM and jailguard)",
        tokenizer=encoder.tokenizer,
        labels=GUARD_LABELS,
    )


def language_model(context: int | None = None) -> Loaded:
    """SmolLM2-135M-Instruct: a decoder of 30 layers that chats, with its vocabulary."""
    return gguf.load(smollm(), context)
