"""One operator, one place: a function registered under the names torch.export gives it.

An operator is `async def f(ctx, *args)` with the arguments of the aten operator, tensors replaced by `Shared`,
`Weight` or `Public` values. It keeps the invariant that every value between operators has the model's frac_bits
(integers such as indices have 0). What it can't do it refuses with UnsupportedError: deploy traces every node, so
that happens before anything is shared. What it makes of its operands' bounds stands in `graph.transfer`.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Rule = Callable[..., Coroutine[Any, Any, Any]]
F = TypeVar("F", bound=Rule)

_RULES: dict[str, Rule] = {}


def operator(*names: str) -> Callable[[F], F]:
    """Register a rule under names like "aten.relu.default"."""

    def register(rule: F) -> F:
        for name in names:
            if name in _RULES:
                raise ValueError(f"two rules for {name}")
            _RULES[name] = rule
        return rule

    return register


def lookup(name: str) -> Rule | None:
    """The rule for an operator, or None."""
    return _RULES.get(name)


def supported() -> list[str]:
    """All registered names, sorted."""
    return sorted(_RULES)
