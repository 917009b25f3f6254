"""JSON with one spelling: what is compared by its digest, or signed."""

from __future__ import annotations

import json
from typing import Any


def canonical(content: Any) -> bytes:
    """Plain JSON data, spelt in one way: keys sorted, no spaces. ValueError for what JSON cannot say, such as NaN."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
