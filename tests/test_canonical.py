"""JSON with one spelling."""

from __future__ import annotations

import pytest

from mpcinfer.canonical import canonical


def test_it_has_one_spelling() -> None:
    assert canonical({"b": (1, 2), "a": "x"}) == canonical({"a": "x", "b": [1, 2]}) == b'{"a":"x","b":[1,2]}'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_json_cannot_say_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical({"a": [value]})
