"""The error tree: every class has a gRPC status that exists and an HTTP code that fits it."""

from __future__ import annotations

import grpc
import pytest

from mpcinfer import errors
from mpcinfer.errors import MpcInferError


def tree(root: type[MpcInferError] = MpcInferError) -> list[type[MpcInferError]]:
    return [
        root,
        *(item for child in root.__subclasses__() if child.__module__ == errors.__name__ for item in tree(child)),
    ]


@pytest.mark.parametrize("kind", tree())
def test_status_exists_and_class_is_documented(kind: type[MpcInferError]) -> None:
    assert grpc.StatusCode[kind.grpc_status] is not grpc.StatusCode.OK
    assert 400 <= kind.http_status < 600
    assert kind.__doc__
    assert kind.__name__ in (errors.__doc__ or "")


def test_caller_errors_are_4xx_and_ours_5xx() -> None:
    assert all(400 <= kind.http_status < 500 for kind in tree(errors.InputError) + tree(errors.IdentityError))
    assert all(kind.http_status >= 500 for kind in tree(errors.UnavailableError) + tree(errors.ProtocolError))


def test_one_status_means_one_branch_of_the_tree() -> None:
    """A receiver that knows only the status still lands on a base class of what was raised."""
    for status in {kind.grpc_status for kind in tree()} - {"INTERNAL"}:
        kinds = [kind for kind in tree() if kind.grpc_status == status]
        assert all(issubclass(kind, kinds[0]) for kind in kinds)
