"""The digits demo: classify real images privately with a real network, and compare with plaintext."""

from __future__ import annotations

import statistics
import subprocess
from typing import Any

import torch
from pretrained import mnist_network
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from mpcinfer import Client, ModelOwner
from mpcinfer.client.local import LocalCluster

NEAR_TIE = 0.01
BATCH = 20


def trained_network(images: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    """The same shape of network, trained here for a few seconds, for machines without a package index."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 49, 10),
    )  # fmt: skip
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(4):
        for part in torch.randperm(len(images)).split(64):
            optimiser.zero_grad()
            functional.cross_entropy(model(images[part]), labels[part]).backward()
            optimiser.step()
    return model.eval()


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's 1,797 scanned digits, 8x8, made to look like MNIST: 28x28, normalised. [N, 1, 28, 28] and [N]."""
    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    images = functional.interpolate(images, size=(20, 20), mode="bilinear", align_corners=False)
    return (functional.pad(images, (4, 4, 4, 4)) - 0.1307) / 0.3081, torch.tensor(data.target)


def run(parties: int, count: int, say: Console) -> dict[str, Any]:
    """The whole demonstration; the figures it prints."""
    images, labels = digits()
    try:
        model, source = mnist_network(), "digit-recognizer-py 0.1.0 (trained on MNIST)"
    except (subprocess.SubprocessError, OSError) as error:
        say.print(
            f"[yellow]The package index is out of reach ({type(error).__name__}); training a CNN here instead.[/]"
        )
        model, source = trained_network(images[500:], labels[500:]), "a CNN trained on scikit-learn's digits just now"
    count = min(count, 500)
    images, labels = images[:count], labels[:count]
    with torch.no_grad():
        plain = model(images)
    say.print(f"Model: {source}, {sum(p.numel() for p in model.parameters()):,} parameters. {count} real images.")
    with say.status(f"starting a dealer and {parties} parties as separate processes"):
        cluster = LocalCluster(parties=parties)
        cluster.start()
    with cluster, ModelOwner.connect(cluster.cluster_path, cluster.identity("owner/owner")) as owner:
        deployed = owner.deploy(model, images[:1], name="digits")
        say.print(
            f"Deployed as {deployed.name} version {deployed.version}; each party holds one share of every weight."
        )
        with Client.connect(cluster.cluster_path, cluster.identity("client/client")) as client:
            answers, costs = [], []
            client.infer("digits", images[:BATCH])  # the first request also traces the plan for this batch size
            for batch in images.split(BATCH):
                answers.append(client.infer("digits", batch, timeout=120))
                costs.append((len(batch), client.last_cost))
    return figures(plain, torch.cat(answers), labels, costs) | {"parties": parties, "model": source}


def figures(
    plain: torch.Tensor, private: torch.Tensor, labels: torch.Tensor, costs: list[tuple[int, Any]]
) -> dict[str, Any]:
    """Accuracy, agreement, and the medians over requests of what one image costs."""
    top = plain.topk(2).values
    near_tie = (top[:, 0] - top[:, 1]) <= NEAR_TIE
    same = plain.argmax(1) == private.argmax(1)
    full = [(n, cost) for n, cost in costs if n == BATCH] or costs

    def per_image(phase: str, key: str) -> float:
        return statistics.median(cost[phase][key] / n for n, cost in full)

    return {
        "images": len(labels),
        "images_per_request": full[0][0],
        "plaintext_accuracy": float((plain.argmax(1) == labels).double().mean()),
        "private_accuracy": float((private.argmax(1) == labels).double().mean()),
        "agreement": float(same.double().mean()),
        "disagreements_beyond_near_ties": int((~same & ~near_tie).sum()),
        "max_logit_error": float((plain - private).abs().max()),
        "online": {
            "seconds": per_image("online", "seconds"),
            "rounds": statistics.median(cost["online"]["rounds"] for _, cost in full),
            "bytes_sent_per_party": per_image("online", "bytes_sent_per_party"),
        },
        "offline": {
            "seconds": per_image("offline", "seconds"),
            "bytes_sent_by_dealer": per_image("offline", "bytes_sent_by_dealer"),
        },
    }


def show(result: dict[str, Any], say: Console) -> bool:
    """The figures as a table; whether private and plaintext answers agree on everything but near-ties."""
    table = Table(title=f"{result['images']} images, {result['parties']} parties", show_header=False)
    online, offline = result["online"], result["offline"]
    for name, value in (
        ("plaintext accuracy", f"{result['plaintext_accuracy']:.2%}"),
        ("private accuracy", f"{result['private_accuracy']:.2%}"),
        ("agreement with plaintext", f"{result['agreement']:.2%}"),
        ("largest logit error", f"{result['max_logit_error']:.6f}"),
        (
            "online, per image",
            f"{online['seconds'] * 1e3:.1f} ms, {online['bytes_sent_per_party'] / 1e6:.2f} MB sent by a party",
        ),
        (
            "offline, per image",
            f"{offline['seconds'] * 1e3:.1f} ms, {offline['bytes_sent_by_dealer'] / 1e6:.2f} MB sent by the dealer",
        ),
        ("rounds, per request", f"{online['rounds']:.0f} (of {result['images_per_request']} images)"),
    ):
        table.add_row(name, value)
    say.print(table)
    if result["disagreements_beyond_near_ties"]:
        say.print("[red]Private and plaintext answers differ beyond near-ties.[/]")
    return not result["disagreements_beyond_near_ties"]
