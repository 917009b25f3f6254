"""A tiny language model of letters, as a directory that its owner deploys, and the proxy before a cluster."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from mpcinfer.client.local import LocalCluster
from mpcinfer.models.vocabulary import Vocabulary

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}assistant:"


def letters() -> Vocabulary:
    """A token for each byte, and one that ends an answer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|end|>"])
    return Vocabulary(library.to_str(), TEMPLATE, "", "<|end|>", (256,))


def written(directory: Path, seed: int) -> Path:
    """A directory as Hugging Face's, of a random model that is sure of what it says, and never ends by itself."""
    from tests.models.decoders import make  # which takes long to import, and only slow tests need

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24, "max_position_embeddings": 160}
    model = make("llama", directory, vocab_size=257, eos_token_id=256, tie_word_embeddings=True, **sizes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 4.0 if name == "model.norm.weight" else 0.4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        model.get_parameter("model.embed_tokens.weight")[256] = 0
    model.save_pretrained(directory)
    made = letters()
    (directory / "tokenizer.json").write_text(made.tokenizer)
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": made.eos}))
    return directory


@contextmanager
def proxy(cluster: LocalCluster, log: Path, *options: object) -> Iterator[tuple[str, int]]:
    """`mpcinfer proxy` before a cluster: its address and its process id. What it says goes to `log`."""
    command = [sys.executable, "-P", "-m", "mpcinfer", "proxy", "--cluster", str(cluster.cluster_path), "--port", "0"]
    with log.open("w") as file:
        process = subprocess.Popen([*command, *map(str, options)], stdout=subprocess.PIPE, stderr=file, text=True)
    assert process.stdout is not None
    try:
        found = re.match(r"(http://[^/]+)/", process.stdout.readline())
        assert found, log.read_text()
        yield found[1], process.pid
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)
        process.stdout.close()
