"""Language models of other families, from directories that `transformers` wrote: it says what they should have said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mpcinfer import Client, ModelOwner
from tests.e2e.clusters import local_cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

MOST_ERROR = 0.02


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_positions=128))  # as wide and as deep as GPT-2 small


def qwen2() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=2000,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
        )
    )


@pytest.mark.parametrize("family", [gpt2, qwen2], ids=["gpt2", "qwen2"])
def test_as_transformers(family: Any, tmp_path: Path) -> None:
    torch.manual_seed(5)
    oracle = family().eval()
    oracle.save_pretrained(tmp_path / "model")
    text = torch.randint(0, oracle.config.vocab_size, (40,)).tolist()
    with local_cluster(tmp_path / "cluster", 2) as cluster:
        with ModelOwner.connect(cluster.cluster_path) as owner:
            owner.deploy_file(tmp_path / "model", name="model", reveal="logits", context=96)
        with Client.connect(cluster.cluster_path) as client:
            answer = client.generate("model", text, max_new_tokens=6, stream=False)
    for token, logits in zip(answer.tokens, answer.logits, strict=True):
        with torch.no_grad():
            expected = oracle(torch.tensor([text])).logits[0, -1].double()
        assert float((logits - expected).abs().max()) <= MOST_ERROR
        assert float(expected.max() - expected[token]) <= 2 * MOST_ERROR
        text.append(token)
