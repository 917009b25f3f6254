"""One party of the real CrypTen, as a process: party.py TASK RANK PARTIES DIRECTORY.

What a task takes and yields are files in the directory, which all parties share; `{rank}` is in the names of its own.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import networks
import torch

from mpcinfer.interop.crypten import from_crypten, import_shares, install_shim

WIDE = torch.tensor([[-2.0, 1.5], [3.25, -1.0]]) + 2.0**-16  # CrypTen decodes the first as -3 + 2^-16


def infer(crypten: Any, rank: int, directory: Path) -> None:
    """Run the networks on the inputs, both encrypted; the results, revealed.

    They are decoded here, in CrypTen's favour: its decoder is off by 1 for some numbers.
    """
    for name in networks.BUILDERS:
        model = networks.in_crypten(crypten, name).encrypt(src=0)
        x = crypten.cryptensor(networks.example(name)[1], src=1)
        y = model(x)
        opened = y.reveal().double() / y.encoder.scale
        torch.save(opened, directory / f"{name}-{rank}.pt")


def zoo(crypten: Any, rank: int, directory: Path) -> None:
    """Run the zoo, encrypted."""
    results = {}
    for name, (model, shape) in networks.zoo(crypten.nn).items():
        y = model.eval().encrypt(src=0)(crypten.cryptensor(networks.zoo_input(shape), src=0))
        results[name] = y.reveal().double() / y.encoder.scale
    torch.save(results, directory / f"zoo-{rank}.pt")


def decrypt(crypten: Any, rank: int, directory: Path) -> None:
    """Convert an encrypted layer, which opens it to all parties."""
    model = crypten.nn.Linear(2, 2, bias=False)
    model.set_parameter("weight", WIDE.clone())
    model = model.eval().encrypt(src=0)
    torch.save(from_crypten(model, decrypt=True)(torch.eye(2)).detach(), directory / f"opened-{rank}.pt")


def share(crypten: Any, rank: int, directory: Path) -> None:
    """Share a tensor; each party keeps its share as a file, and hands on another sharing of it."""
    x = torch.load(directory / "secret.pt")
    shared = crypten.cryptensor(x, src=0)
    torch.save(shared.share, directory / f"share-{rank}.pt")
    pieces = import_shares([shared], parties=3)
    torch.save([(piece.share, piece.frac_bits) for piece in pieces], directory / f"pieces-{rank}.pt")


def use(crypten: Any, rank: int, directory: Path) -> None:
    """Go on in CrypTen with a share that it was given: what it holds, and its ReLU."""
    x = crypten.mpc.MPCTensor.from_shares(torch.load(directory / f"exported-{rank}.pt"))
    results = [x, x.relu()]
    torch.save([y.reveal().double() / y.encoder.scale for y in results], directory / f"used-{rank}.pt")


def main(task: str, rank: str, parties: str, directory: str) -> None:
    """Join the other parties over gloo on the loopback device; tasks are joined by +."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    crypten = install_shim()
    os.environ.update(
        RANK=rank,
        WORLD_SIZE=parties,
        RENDEZVOUS=f"file://{directory}/rendezvous-{task}",
        DISTRIBUTED_BACKEND="gloo",
        GLOO_SOCKET_IFNAME="lo",
    )
    crypten.init()
    with crypten.no_grad():
        for name in task.split("+"):
            globals()[name](crypten, int(rank), Path(directory))
    torch.distributed.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
