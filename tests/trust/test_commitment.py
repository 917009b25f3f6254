"""Commitments: equal for equal shares under one salt, different for anything else."""

from __future__ import annotations

from itertools import combinations

import pytest

from mpcinfer.errors import InputError
from mpcinfer.trust.commitment import check_salt, commitment, output_commitment, upload_commitment
from mpcinfer.wire.v1 import tensor_pb2

SALT = b"s" * 32


def tensor(**change: object) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(**{"shape": [1, 2], "frac_bits": 16, "ring_bits": 64, "data": bytes(16), **change})  # type: ignore[arg-type]


def test_equal_for_the_same_and_different_for_anything_else() -> None:
    assert output_commitment(SALT, [tensor()]) == output_commitment(SALT, [tensor()])
    others = [
        output_commitment(SALT, [tensor()]),
        output_commitment(b"t" * 32, [tensor()]),
        output_commitment(SALT, [tensor()], 1),
        output_commitment(SALT, [tensor(), tensor()]),
        output_commitment(SALT, [tensor(shape=[2, 1])]),
        output_commitment(SALT, [tensor(frac_bits=15)]),
        output_commitment(SALT, [tensor(data=bytes(15) + b"\1")]),
        output_commitment(SALT, [tensor(seed=bytes(32))]),
        output_commitment(SALT, []),
        upload_commitment(SALT, [tensor()]),
    ]
    assert all(a != b for a, b in combinations(others, 2))


def test_parts_do_not_run_into_each_other() -> None:
    assert commitment(SALT, b"ab", b"c") != commitment(SALT, b"a", b"bc")


@pytest.mark.parametrize("salt", [b"", bytes(31), bytes(33)])
def test_a_salt_has_256_bits(salt: bytes) -> None:
    check_salt(SALT)
    with pytest.raises(InputError):
        check_salt(salt)
