"""Runs first in the parties of one side of bench_trust.py: takes away all that it measures the cost of.

No grants and budgets, no digests of what was opened and no comparison of them, no receipts. The package has no way to
ask for this, and gets none.
"""

from __future__ import annotations

import sys
from typing import Any

if "party" in sys.orig_argv:
    from mpcinfer.party import policy, receipts, stepping, transcript

    def _nothing(*arguments: Any) -> None:
        return None

    async def _uncompared(stepping_: Any, part: Any, tape: Any) -> None:
        part.evidence = None

    transcript.Transcript.add = _nothing  # type: ignore[method-assign]
    stepping.Stepping._compare = _uncompared  # type: ignore[method-assign]
    policy.Policy.check = _nothing  # type: ignore[method-assign]
    policy.Policy.charge = _nothing  # type: ignore[method-assign]
    receipts.Account.answer = _nothing  # type: ignore[method-assign,assignment]
