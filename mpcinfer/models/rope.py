"""Rotary position embeddings: how fast each pair of a head's dimensions turns, and the tables that follow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mpcinfer.errors import InputError


@dataclass(frozen=True)
class Rope:
    """Dimension i and i + len(frequencies) of a head turn by position * frequencies[i], and grow by `magnitude`."""

    frequencies: tuple[float, ...]
    magnitude: float = 1.0

    def table(self, context: int) -> torch.Tensor:
        """[c s], float32 [context, 2 head_dim], by which x turns into x * c + (x with its halves exchanged) * s."""
        speeds = torch.tensor(self.frequencies, dtype=torch.float64, device="cpu")
        angles = torch.arange(context, dtype=torch.float64, device="cpu")[:, None] * speeds
        cos, sin = angles.cos() * self.magnitude, angles.sin() * self.magnitude
        return torch.cat([cos, cos, -sin, sin], 1).float()

    def divided(self, factors: Sequence[float]) -> Rope:
        """With each frequency divided by a factor of its own."""
        speeds = tuple(speed / factor for speed, factor in zip(self.frequencies, factors, strict=True))
        return replace(self, frequencies=speeds)


def plain(theta: float, head_dim: int) -> Rope:
    """As in the original paper: frequencies fall geometrically from 1 towards 1 / theta."""
    if theta <= 1:
        raise InputError(f"rotary embeddings have a base above 1, not {theta}")
    return Rope(tuple(theta ** (-2 * i / head_dim) for i in range(head_dim // 2)))


def linear(theta: float, head_dim: int, factor: float) -> Rope:
    """Positions divided by a factor."""
    _check(factor)
    return plain(theta, head_dim).divided([factor] * (head_dim // 2))


def llama3(
    theta: float, head_dim: int, factor: float, low_freq_factor: float, high_freq_factor: float, original: int
) -> Rope:
    """Frequencies that turn more than `high_freq_factor` times in the original context stay, those that turn less than
    `low_freq_factor` times are divided by `factor`, those between are blended."""
    _check(factor, high_freq_factor - low_freq_factor)
    base = plain(theta, head_dim)
    factors = []
    for speed in base.frequencies:
        turns = original * speed / (2 * math.pi)
        kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
        kept = min(1.0, max(0.0, kept))
        factors.append(1 / ((1 - kept) / factor + kept))
    return base.divided(factors)


def yarn(
    theta: float,
    head_dim: int,
    factor: float,
    original: int,
    *,
    magnitude: float | None = None,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Rope:
    """YaRN (Peng et al. 2023): as llama3, blended linearly by dimension; `magnitude` is 1 + ln(factor) / 10 if None."""
    _check(factor, theta - 1, beta_fast, beta_slow)

    def dimension(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(beta_fast), dimension(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    blend = [min(1.0, max(0.0, (i - low) / width)) for i in range(head_dim // 2)]
    scaled = plain(theta, head_dim).divided([1 / (b / factor + 1 - b) for b in blend])
    return replace(scaled, magnitude=(1 + 0.1 * math.log(max(factor, 1.0))) if magnitude is None else magnitude)


def _check(*numbers: float) -> None:
    if any(number <= 0 for number in numbers):
        raise InputError("the settings by which rotary embeddings are scaled contradict each other")
