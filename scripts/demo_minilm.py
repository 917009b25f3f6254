"""The sentences demo: a search by meaning in which the parties see neither documents nor queries, beside plaintext."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from pretrained import sentence_encoder
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.export import Dim
from torch.nn import functional

from mpcinfer import Client, ModelOwner
from mpcinfer.client.examples import example_inputs
from mpcinfer.client.local import LocalCluster
from mpcinfer.client.owner import Deployed
from mpcinfer.client.text import Tokenizer
from mpcinfer.models.loaded import InputSpec, Loaded

LONGEST = 128  # tokens
BATCH = 8  # texts
WIDTH = 384
TIMEOUT = 600.0  # seconds for a request, on a machine with much else to do
LIMITS = {"step_timeout_s": TIMEOUT}
LEAST_COSINE = 0.9999
NEAR_TIE = 3e-4  # of cosines
SHOWN = 5

DOCUMENTS = (
    "The orchestra rehearsed the slow movement twice before the doors of the concert hall opened.",
    "A jazz trio plays in the small bar by the harbour every Thursday night.",
    "Her first novel is told from the point of view of a lighthouse keeper's dog.",
    "The museum has bought a self-portrait that was thought to be lost since 1890.",
    "The goalkeeper saved two penalties, and the team reached the semi-final for the first time.",
    "He ran the marathon in under three hours in spite of a headwind over the last ten kilometres.",
    "The chess champion resigned after a blunder on move thirty-one.",
    "Whisk the egg whites until they are stiff, then fold in the sugar and the melted chocolate.",
    "Soak the beans overnight; they will cook in half the time.",
    "This bread needs only flour, water, salt and patience.",
    "The patient was given antibiotics for a bacterial infection of the lungs.",
    "Washing your hands for twenty seconds removes most of the germs on them.",
    "A new vaccine against malaria protects three out of four children for at least a year.",
    "Regular sleep lowers blood pressure as much as some tablets do.",
    "The central bank raised interest rates by a quarter of a point to slow inflation down.",
    "Shares of the car maker fell after it warned that profits would be lower this year.",
    "Our landlord wants to increase the rent by ten per cent from March.",
    "The tax return is due at the end of May; those who are late pay a fine.",
    "Parliament passed the bill after a debate that lasted until four in the morning.",
    "Turnout in the local election was lower than at any time since the war.",
    "The treaty obliges both countries to destroy their stocks of land mines.",
    "A function that calls itself needs a case in which it stops.",
    "The database was slow because the column that everybody filters by had no index.",
    "Their phone encrypts every message before it leaves the device.",
    "Astronomers have found water vapour in the atmosphere of a planet 120 light years away.",
    "The probe will take seven years to reach the moons of Jupiter.",
    "Glaciers in the Alps have lost a tenth of their volume in two summers.",
    "Bees tell each other by a dance in which direction the flowers are.",
    "The night train to Vienna leaves from platform nine and has sleeping compartments.",
    "The bridge is closed to lorries until the cracks in its pillars have been repaired.",
)
QUERIES = (
    "Where can I listen to live music tonight?",
    "I have a cough and a fever, will medicine help?",
    "how to bake a dessert",
    "What is happening to prices and to the economy?",
    "discoveries beyond the solar system",
)


def deploy(owner: ModelOwner, loaded: Loaded, name: str, reveal: str = "logits") -> Deployed:
    """Deploy a model of token ids once, for batches of texts of every length up to LONGEST tokens."""
    (ids,) = example_inputs(loaded, [InputSpec("ids", "int", (2, LONGEST))]).tensors
    sizes = [{0: Dim("batch"), 1: Dim("length", max=LONGEST)}]
    return owner.deploy(loaded.module, ids, name=name, reveal=reveal, dynamic_shapes=sizes)


def search(documents: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """The cosine of every query with every document, [queries, documents], of embeddings one a row."""
    return functional.normalize(queries.double()) @ functional.normalize(documents.double()).T


def misplaced(plain: torch.Tensor, private: torch.Tensor, near_tie: float = NEAR_TIE) -> int:
    """How many pairs of documents the two scores [queries, documents] order differently, but for near-ties."""
    by = plain[:, :, None] - plain[:, None, :]
    return int(((by > near_tie) & (private[:, :, None] <= private[:, None, :])).sum())


def batches(texts: Sequence[str], loaded: Loaded) -> list[tuple[list[int], torch.Tensor]]:
    """Texts of equal length together, at most BATCH: their numbers, and their ids [texts, length]."""
    assert loaded.tokenizer is not None
    tokenizer = Tokenizer.load(loaded.tokenizer, LONGEST)
    ids = [tokenizer.ids(text) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: len(ids[i]))
    equal = (list(group) for _, group in groupby(order, key=lambda i: len(ids[i])))
    parts = (group[first : first + BATCH] for group in equal for first in range(0, len(group), BATCH))
    return [(part, torch.stack([ids[i] for i in part])) for part in parts]


@dataclass(frozen=True)
class Texts:
    """Embeddings of texts, one a row, by the parties and in plaintext; their tokens; what each request cost."""

    private: torch.Tensor
    plain: torch.Tensor
    tokens: list[int]
    costs: list[dict[str, dict[str, float]]]

    @classmethod
    def embedded(
        cls, client: Client, name: str, loaded: Loaded, texts: Sequence[str], said: Progress | None = None
    ) -> Texts:
        """Every text embedded by the parties, who see but its length, and here. `said`: where progress is shown."""
        private, plain = torch.zeros(2, len(texts), WIDTH)
        tokens, costs = [0] * len(texts), []
        task = said.add_task("embedding privately", total=len(texts)) if said else None
        for numbers, ids in batches(texts, loaded):
            private[numbers] = client.infer(name, ids, timeout=TIMEOUT)
            costs.append(client.last_cost or {})
            plain[numbers] = loaded.module(ids)
            for i in numbers:
                tokens[i] = ids.shape[1]
            if said and task is not None:
                said.advance(task, len(numbers))
        return cls(private, plain, tokens, costs)

    def cosines(self) -> torch.Tensor:
        """Between private and plaintext embedding of each text, in float64."""
        return functional.cosine_similarity(self.private.double(), self.plain.double(), dim=1)


def run(parties: int, say: Console) -> dict[str, Any]:
    """The whole demonstration; the figures it prints."""
    loaded = sentence_encoder()
    say.print(f"Model: all-MiniLM-L6-v2. {len(DOCUMENTS)} documents and {len(QUERIES)} queries.")
    with say.status(f"starting a dealer and {parties} parties as separate processes"):
        cluster = LocalCluster(parties=parties, limits=LIMITS)
        cluster.start()
    with cluster, ModelOwner.connect(cluster.cluster_path, cluster.identity("owner/owner")) as owner:
        start = time.monotonic()
        with say.status("deploying: exporting the model, uploading shares of its weights"):
            deployed = deploy(owner, loaded, "minilm")
        seconds = time.monotonic() - start
        say.print(
            f"Deployed as {deployed.name} version {deployed.version} in {seconds:.0f} s, for every length up to "
            f"{LONGEST} tokens; each party holds one share of each of {deployed.parameters:,} parameters."
        )
        with (
            Client.connect(cluster.cluster_path, cluster.identity("client/client")) as client,
            Progress(console=say, transient=True) as progress,
        ):
            found = Texts.embedded(client, "minilm", loaded, [*DOCUMENTS, *QUERIES], progress)
    return figures(found) | {"parties": parties, "model": "all-MiniLM-L6-v2", "deploy_seconds": seconds}


def figures(found: Texts) -> dict[str, Any]:
    """Rankings, cosines, and the means over sentences of what one costs."""
    many = len(DOCUMENTS)
    plain = search(found.plain[:many], found.plain[many:])
    private = search(found.private[:many], found.private[many:])

    def mean(phase: str, key: str) -> float:
        return sum(cost[phase][key] for cost in found.costs) / len(found.tokens)

    def ranking(scores: torch.Tensor) -> list[list[Any]]:
        return [[int(i), float(scores[i])] for i in scores.argsort(descending=True)]

    return {
        "documents": DOCUMENTS,
        "searches": [
            {"query": query, "plaintext": ranking(p), "private": ranking(q)}
            for query, p, q in zip(QUERIES, plain, private, strict=True)
        ],
        "identical_rankings": int((plain.argsort() == private.argsort()).all(1).sum()),
        "pairs_misplaced_beyond_near_ties": misplaced(plain, private),
        "smallest_cosine": float(found.cosines().min()),
        "largest_score_error": float((plain - private).abs().max()),
        "requests": len(found.costs),
        "tokens": {"median": statistics.median(found.tokens), "most": max(found.tokens)},
        "online": {
            "seconds": mean("online", "seconds"),
            "rounds": statistics.median(cost["online"]["rounds"] for cost in found.costs),
            "bytes_sent_per_party": mean("online", "bytes_sent_per_party"),
        },
        "offline": {
            "seconds": mean("offline", "seconds"),
            "bytes_sent_by_dealer": mean("offline", "bytes_sent_by_dealer"),
        },
    }


def show(result: dict[str, Any], say: Console) -> bool:
    """Rankings and figures as tables; whether private and plaintext ones agree."""
    for found in result["searches"]:
        table = Table("private", "", "plaintext", "", title=found["query"])
        for (i, by), (j, by_plain) in list(zip(found["private"], found["plaintext"], strict=True))[:SHOWN]:
            documents = result["documents"]
            table.add_row(f"{by:.4f}", documents[i], f"{by_plain:.4f}", documents[j] if i != j else "the same")
        say.print(table)
    table = Table(title=f"{len(DOCUMENTS) + len(QUERIES)} sentences, {result['parties']} parties", show_header=False)
    online, offline, tokens = result["online"], result["offline"], result["tokens"]
    for name, value in (
        (f"identical rankings of {len(DOCUMENTS)}", f"{result['identical_rankings']} of {len(QUERIES)}"),
        ("smallest cosine to float32", f"{result['smallest_cosine']:.7f}"),
        ("largest error of a score", f"{result['largest_score_error']:.6f}"),
        ("tokens of a sentence", f"{tokens['median']:.0f}, at most {tokens['most']}"),
        (
            "online, per sentence",
            f"{online['seconds']:.2f} s, {online['bytes_sent_per_party'] / 1e6:.1f} MB sent by a party",
        ),
        (
            "offline, per sentence",
            f"{offline['seconds']:.2f} s, {offline['bytes_sent_by_dealer'] / 1e6:.1f} MB sent by the dealer",
        ),
        ("rounds, per request", f"{online['rounds']:.0f} ({result['requests']} requests)"),
    ):
        table.add_row(name, value)
    say.print(table)
    good = True
    if result["pairs_misplaced_beyond_near_ties"]:
        say.print("[red]Private and plaintext rankings differ beyond near-ties.[/]")
        good = False
    if not result["smallest_cosine"] >= LEAST_COSINE:  # which nan does not satisfy either
        say.print(f"[red]A private embedding is further from plaintext than a cosine of {LEAST_COSINE}.[/]")
        good = False
    return good
