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
_YIELDS_INTEGERS: set[str] = set()
_TAKES_INTEGERS: set[str] = set()


def operator(*names: str, integer: bool = False, takes_integers: bool = False) -> Callable[[F], F]:
    """Register a rule under names like "aten.relu.default".

    `integer`: it yields integers or truth values (`frac_bits` 0), be it of numbers. `takes_integers`: it may be given
    such secrets; any other operator is refused them.
    """

    def register(rule: F) -> F:
        for name in names:
            if name in _RULES:
                raise ValueError(f"two rules for {name}")
            _RULES[name] = rule
            if integer:
                _YIELDS_INTEGERS.add(name)
            if takes_integers:
                _TAKES_INTEGERS.add(name)
        return rule

    return register


def lookup(name: str) -> Rule | None:
    """The rule for an operator, or None."""
    return _RULES.get(name)


def yields_integers(name: str) -> bool:
    """Whether an operator yields integers or truth values of numbers, too."""
    return name in _YIELDS_INTEGERS


def takes_integers(name: str) -> bool:
    """Whether an operator may be given secret integers and truth values."""
    return name in _TAKES_INTEGERS


def supported() -> list[str]:
    """All registered names, sorted."""
    return sorted(_RULES)
