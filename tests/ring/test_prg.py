"""The streams: known answers, names that cannot collide, uniform output."""

from __future__ import annotations

import hashlib
import hmac

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpcinfer.ring import prg
from mpcinfer.ring.domain import BIT, Z64, Ring

KEY = bytes(range(32))
parts = st.lists(st.one_of(st.text(max_size=4), st.integers(0, 2**64 - 1), st.binary(max_size=4)), max_size=4)


def test_aes_ctr_known_answer() -> None:
    # NIST SP 800-38A, F.5.1 (CTR-AES128): the key stream is plaintext xor ciphertext
    key = bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c")
    counter = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    plain = bytes.fromhex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51")
    cipher = bytes.fromhex("874d6191b620e3261bef6864990db6ce9806f66b7970fdff8617187bb9fffdff")
    out = bytearray(32)
    prg.fill(key + counter, memoryview(out))
    assert bytes(out) == bytes(a ^ b for a, b in zip(plain, cipher, strict=True))


def test_hkdf_by_hand() -> None:
    prk = hmac.digest(b"salt", b"0123456789abcdef", hashlib.sha256)
    expected = hmac.digest(prk, b"mpcinfer/v1/tape\x01", hashlib.sha256)
    assert prg.extract(b"0123456789abcdef", b"salt", b"tape") == expected
    info = b"mpcinfer/v1/stream" + b"s\x01\0\0\0r" + b"i\x08\0\0\0\x05" + bytes(7)
    assert prg.derive(KEY, "r", 5) == hmac.digest(KEY, info + b"\x01", hashlib.sha256)


def test_nonces_alone_are_no_key() -> None:
    with pytest.raises(ValueError, match="no key"):
        prg.extract(b"", b"a salt of any length whatever", b"tape")


@given(parts, parts)
def test_different_names_are_different_streams(a: list[str | int | bytes], b: list[str | int | bytes]) -> None:
    same = [(type(p), p) for p in a] == [(type(p), p) for p in b]
    assert (prg.derive(KEY, *a) == prg.derive(KEY, *b)) == same


def test_the_key_matters() -> None:
    assert prg.derive(KEY, "x") != prg.derive(bytes(32), "x")


def test_long_streams_are_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, pieces = bytearray(1000), bytearray(1000)
    prg.fill(KEY, memoryview(whole))
    monkeypatch.setattr(prg, "_CHUNK", 96)
    monkeypatch.setattr(prg, "_ZEROS", bytes(96))
    prg.fill(KEY, memoryview(pieces))
    assert whole == pieces and len({bytes(whole[i : i + 16]) for i in range(0, 992, 16)}) == 62


def test_a_stream_beyond_one_chunk_does_not_repeat() -> None:
    x = prg.expand(KEY, ((1 << 19) + 3,), Z64)
    assert x.unique().numel() == x.numel()
    assert torch.equal(x[:7], prg.expand(KEY, (7,), Z64))


@pytest.mark.parametrize("size", [0, 31, 33])
def test_seeds_have_32_bytes(size: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        prg.fill(bytes(size), memoryview(bytearray(8)))


@given(st.integers(1, 64), st.booleans())
def test_expand_covers_exactly_its_ring(bits: int, xor: bool) -> None:
    ring = Ring(bits, xor)
    x = prg.expand(KEY, (3, 50), ring)
    assert x.shape == (3, 50) and x.dtype == ring.dtype
    assert torch.equal(ring.reduce(x), x)
    for bit in range(bits):  # 150 fair coins all alike: 2^-149
        assert ((x >> bit) & 1).unique().numel() == 2


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (2, 0)])
def test_expand_of_any_shape(shape: tuple[int, ...]) -> None:
    assert prg.expand(KEY, shape, Z64).shape == shape


@pytest.mark.parametrize("ring", [Z64, Ring(48), Ring(15), BIT, Ring(8, xor=True), Ring(63, xor=True)], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (prg._PIECE // 8 + 1,), (3, prg._PIECE - 5)], ids=str)
def test_streams_are_added_as_if_they_were_expanded(ring: Ring, shape: tuple[int, ...]) -> None:
    x = torch.randint(-(2**62), 2**62, (2, *shape), generator=torch.Generator().manual_seed(1)).to(ring.dtype)
    own, stream = x.movedim(0, -1)[..., 0], prg.expand(KEY, shape, ring)  # neither contiguous nor reduced
    before = own.clone()
    assert torch.equal(prg.add(KEY, own, ring), ring.add(ring.reduce(own), stream))
    assert torch.equal(prg.sub(KEY, own, ring), ring.sub(ring.reduce(own), stream))
    assert torch.equal(own, before)
