"""What is hashed of a run, and what of that is told."""

from __future__ import annotations

import torch

from mpcinfer.party.transcript import Transcript, secret_of
from mpcinfer.protocol.context import Opening
from mpcinfer.ring.domain import BIT, Z64, Ring

SECRET = bytes(32)


def seal(*values: torch.Tensor, secret: bytes = SECRET, names: tuple[bytes, ...] = (b"epoch", b"id", b"tape")) -> bytes:
    transcript = Transcript()
    for i, value in enumerate(values):
        ring = Z64 if value.dtype == torch.int64 else BIT
        transcript.add([Opening(value, ring, f"a/b#{i}:Beaver.x")], [value])
    return transcript.seal(secret, *names)


def test_every_bit_of_every_value_counts() -> None:
    x, bits = torch.arange(6).reshape(2, 3), torch.tensor([0, 1, 1], dtype=torch.uint8)
    found = {seal(x, bits)}
    for i in range(6):
        for bit in range(64):
            altered = x.clone()
            altered.view(-1)[i] ^= torch.tensor(1, dtype=torch.int64) << bit
            found.add(seal(altered, bits))
    for i in range(3):
        altered = bits.clone()
        altered[i] ^= 1
        found.add(seal(x, altered))
    found |= {seal(bits, x), seal(x), seal(x[:1], x[1:]), seal()}
    assert len(found) == 1 + 6 * 64 + 3 + 4


def test_how_a_tensor_lies_in_memory_does_not() -> None:
    x = torch.arange(6).reshape(2, 3)
    assert seal(x.T.contiguous().T) == seal(x)


def test_it_is_bound_to_what_ran_and_says_nothing_to_whoever_lacks_the_secret() -> None:
    x = torch.arange(6)
    names = [(b"epoch", b"id", b"tape"), (b"epoch", b"id", b"other"), (b"epoch", b"other", b"tape"), (b"e", b"pochid")]
    assert len({seal(x, names=each) for each in names} | {seal(x, secret=bytes([1]) * 32)}) == 5


def test_openings_are_counted_by_kind() -> None:
    transcript = Transcript()
    for kind, count in (("Beaver.x", 2), ("Truncation", 1)):
        for i in range(count):
            value = torch.zeros(2, dtype=torch.int64)
            transcript.add([Opening(value, Ring(48), f"node/inner#{i}:{kind}")], [value])
    assert transcript.openings == {"Beaver.x": 2, "Truncation": 1}


def test_the_secret_of_an_epoch_is_everybodys() -> None:
    parts = [bytes([i]) * 32 for i in range(3)]
    found = {secret_of(b"s" * 16, parts), secret_of(b"t" * 16, parts), secret_of(b"s" * 16, parts[::-1])}
    assert len(found) == 3 and all(len(each) == 32 for each in found)
