"""A language model nobody can see answers a prompt nobody can see; beside it, what it says in plaintext."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from pretrained import language_model
from rich.console import Console
from rich.table import Table

from mpcinfer import Client, ModelOwner
from mpcinfer.client.examples import captured_model
from mpcinfer.client.local import LocalCluster
from mpcinfer.client.text import Tokenizer
from mpcinfer.models.decoder import Decoder

CONTEXT = 512
QUESTION = "What is the capital of France? Answer in one short sentence."


def run(parties: int, tokens: int, say: Console) -> dict[str, Any]:
    """The whole demonstration; the figures it prints."""
    loaded = language_model(CONTEXT)
    assert isinstance(loaded.module, Decoder) and loaded.vocabulary is not None
    tokenizer, asked = Tokenizer.of(loaded.vocabulary), [{"role": "user", "content": QUESTION}]
    say.print(f"Model: SmolLM2-135M-Instruct. Question: {QUESTION}")
    with say.status(f"starting a dealer and {parties} parties as separate processes"):
        cluster = LocalCluster(parties=parties)
        cluster.start()
    with cluster, ModelOwner.connect(cluster.cluster_path, cluster.identity("owner/owner")) as owner:
        start = time.monotonic()
        with say.status("deploying: exporting the model, uploading shares of its weights"):
            deployed = owner.upload(captured_model(loaded), name="smollm", vocabulary=loaded.vocabulary)
        seconds = time.monotonic() - start
        say.print(
            f"Deployed as {deployed.name} version {deployed.version} in {seconds:.0f} s; each party holds one share of "
            f"each of {deployed.parameters:,} parameters."
        )
        with Client.connect(cluster.cluster_path, cluster.identity("client/client")) as client:
            say.print("Private answer:", end=" ")
            answer = client.generate("smollm", asked, max_new_tokens=tokens)
            costs = []
            for piece in answer:
                say.print(piece.text, end="", markup=False, highlight=False)
                costs.append(piece.cost)
            say.print()
    plain, logits = continued(loaded.module, tokenizer.chat(asked).tolist(), len(answer.tokens), loaded.vocabulary.stop)
    later = costs[1:] or costs  # the first came with the prompt

    def median(name: str) -> float:
        return statistics.median(getattr(cost, name) for cost in later)

    names = ("seconds_online", "seconds_offline", "rounds", "bytes_sent_per_party", "bytes_sent_by_dealer")
    return {
        "model": "SmolLM2-135M-Instruct",
        "parties": parties,
        "deploy_seconds": seconds,
        "question": QUESTION,
        "private": answer.text,
        "plaintext": tokenizer.decode(plain),
        "prompt_tokens": answer.prompt_tokens,
        "tokens": len(answer.tokens),
        "equal_tokens": sum(a == b for a, b in zip(answer.tokens, plain, strict=False)),
        "first_divergence": divergence(answer.tokens, plain, logits),
        "per_token": {name: median(name) for name in names},
    }


def continued(
    model: Decoder, ids: Sequence[int], most: int, stop: Sequence[int]
) -> tuple[list[int], list[torch.Tensor]]:
    """The model's greedy continuation in float32, at most so many tokens, and the logits [V] it chose them by."""
    found: list[int] = []
    chosen_by: list[torch.Tensor] = []
    new, caches = torch.tensor([list(ids)]), model.empty_caches()
    with torch.no_grad():
        while len(found) < most and not (found and found[-1] in stop):
            logits, *grown = model(new, *caches)
            chosen_by.append(logits[0])
            found.append(int(logits.argmax()))
            new, caches = torch.tensor([[found[-1]]]), tuple(grown)
    return found, chosen_by


def divergence(private: Sequence[int], plain: Sequence[int], logits: Sequence[torch.Tensor]) -> str:
    """Where the two differ first, and by how much the plaintext model preferred its own word there."""
    for i, (ours, theirs) in enumerate(zip(private, plain, strict=False)):
        if ours != theirs:
            return f"at token {i + 1}, logits apart by {float(logits[i][theirs] - logits[i][ours]):.4f}"
    return "none"


def show(result: dict[str, Any], say: Console) -> bool:
    """The figures as a table; whether the private answer is the one in plaintext."""
    cost = result["per_token"]
    table = Table(title=f"{result['parties']} parties, per token", show_header=False)
    for name, value in (
        ("plaintext answer", result["plaintext"]),
        ("equal tokens", f"{result['equal_tokens']} of {result['tokens']}"),
        ("first divergence", result["first_divergence"]),
        ("online", f"{cost['seconds_online']:.2f} s, {cost['rounds']:.0f} rounds"),
        ("offline", f"{cost['seconds_offline']:.2f} s"),
        ("sent by a party", f"{cost['bytes_sent_per_party'] / 1e6:.1f} MB"),
        ("sent by the dealer", f"{cost['bytes_sent_by_dealer'] / 1e6:.1f} MB"),
    ):
        table.add_row(name, value)
    say.print(table)
    return bool(result["equal_tokens"] == result["tokens"])
