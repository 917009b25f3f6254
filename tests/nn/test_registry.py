"""Every operator has one rule, and a model in these tests that uses it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpcinfer.graph.capture import capture
from mpcinfer.nn import lookup, operator, supported
from tests.decoders_local import decoder
from tests.nn.operators import GROUPS, prepared


@pytest.mark.timeout(400)
def test_every_operator_is_exported_and_tested() -> None:
    used = {node.op for name in GROUPS for node in prepared(name)[2].program.nodes}
    for reveal in ("argmax", "top-k", "probabilities"):
        used |= {n.op for n in capture(nn.Linear(4, 6).eval(), [torch.zeros(1, 4)], reveal=reveal).program.nodes}
    used |= {n.op for n in decoder()[1].program.nodes}
    assert sorted(set(supported()) - used) == []


def test_lookup() -> None:
    assert lookup("aten.relu.default") is not None
    assert lookup("aten.no_such.default") is None
    assert supported() == sorted(supported())


def test_two_rules_for_one_name_are_refused() -> None:
    before = lookup("aten.relu.default")
    with pytest.raises(ValueError, match=r"two rules for aten\.relu\.default"):

        @operator("aten.relu.default")
        async def again() -> None: ...

    assert lookup("aten.relu.default") is before
