"""mpcinfer: inference on a network nobody may see, over inputs nobody may see, by parties that see neither."""

from __future__ import annotations

__version__ = "0.1.0"
