"""How a device's speed and bandwidth change: pure functions of seed, client and slot, the same for every policy."""

from __future__ import annotations

from collections.abc import Callable
from math import exp, floor, log, sqrt
from typing import Literal, TypeAlias

import numpy as np

from fedtune.devices.profiles import DeviceProfile
from fedtune.seeds import derive, generator

By: TypeAlias = Literal["time", "round"]

SLOT_S = 60.0
"""Length of a slot of constant bandwidth."""
MODE_ROUNDS = 20
"""Rounds of one mode, where traces go by rounds."""
DECAY, INNOVATION = 0.9, 0.12
"""Of the logarithm of the bandwidth: z' = .9 z + .12 e, whose stationary deviation is .275."""
REACH = 64
"""Innovations that are summed: what lies further back has a weight below .9^64 = .001."""
SLOWEST, FASTEST = 0.2, 3.0
"""Bounds of a bandwidth, in means of its profile: 2 and 30 Mb/s around a mean of 10."""
PROBE_ERROR = 0.05
"""Deviation of the logarithm of what a client measures of its speed in a second; assumed."""
NOISE = 0.1
"""Deviation of the logarithm of a client's time in a round."""


def mode(profile: DeviceProfile, seed: int, client: str, slot: int) -> float:
    """Return the share of its speed that a device runs at in a period."""
    # A key per slot: any slot can be asked for without the ones before it, so all policies meet the same world.
    drawn = generator(derive(seed, "trace/mode", slot, client)).integers(len(profile.modes))
    return profile.modes[int(drawn)]


def bandwidth_mbps(mean: float, sigma: float, seed: int, client: str, slot: int) -> float:
    """Return the bandwidth of a slot, around a mean of the device's own that is drawn once."""
    own = log(mean) + sigma * float(generator(derive(seed, "trace/mean", 0, client)).standard_normal())
    return min(FASTEST * mean, max(SLOWEST * mean, exp(own + log_deviation(seed, client, slot))))


def log_deviation(seed: int, client: str, slot: int) -> float:
    """Return z of a slot: a stationary AR(1) as the moving sum of its last innovations, so any slot can be asked for.

    Innovations are drawn a block at a time: two keys give all that a slot needs.
    """
    blocks = range((slot - REACH) // REACH, slot // REACH + 1)
    drawn = np.concatenate(
        [generator(derive(seed, "trace/bandwidth", block, client)).standard_normal(REACH) for block in blocks]
    )
    end = slot - blocks[0] * REACH + 1
    last = drawn[end - REACH : end][::-1]  # the slot's own first
    weights = DECAY ** np.arange(REACH)
    # Scaled to the stationary deviation, of which the truncated sum lacks a millionth.
    scale = INNOVATION / sqrt(1 - DECAY**2) / float(np.linalg.norm(weights))
    return float(last @ weights) * scale


def noise(seed: int, client: str, round: int) -> float:
    """Return the factor on a client's time in a round, whatever it is asked to do."""
    # One factor for a round, not for an arm: else a planner could profit by choosing the arm with the lucky draw.
    return exp(NOISE * float(generator(derive(seed, "trace/noise", round, client)).standard_normal()))


def probe_errors(seed: int, client: str, round: int) -> tuple[float, float]:
    """Return the factors on what a client measures of its speed and of its bandwidth before a round."""
    compute, transfer = generator(derive(seed, "trace/probe", round, client)).standard_normal(2).tolist()
    return exp(PROBE_ERROR * compute), exp(PROBE_ERROR * transfer)


def available(profile: DeviceProfile, seed: int, client: str, round: int) -> bool:
    """Return whether a device can be asked in a round."""
    return bool(generator(derive(seed, "trace/available", round, client)).random() < profile.availability)


def slot_at(now_s: float, length_s: float) -> tuple[int, float]:
    """Return (slot, seconds until the next one); these are above 0, or time would stand still."""
    slot = floor(now_s / length_s)
    # The quotient of numbers that are rounded may lie below the slot's beginning.
    if (slot + 1) * length_s <= now_s:
        slot += 1
    return slot, (slot + 1) * length_s - now_s


def speed(
    profile: DeviceProfile, seed: int, client: str, *, by: By, round: int
) -> Callable[[float], tuple[float, float]]:
    """Return the function from a time in seconds to (share of the speed, seconds until it may change)."""

    def at(now_s: float) -> tuple[float, float]:
        if by == "round":
            return mode(profile, seed, client, (round - 1) // MODE_ROUNDS), float("inf")
        slot, lasts = slot_at(now_s, profile.mode_period_s)
        return mode(profile, seed, client, slot), lasts

    return at


def bandwidth(
    mean: float, sigma: float, seed: int, client: str, *, by: By, round: int
) -> Callable[[float], tuple[float, float]]:
    """Return the function from a time in seconds to (bytes per second, seconds until it may change)."""

    def at(now_s: float) -> tuple[float, float]:
        if by == "round":
            return bandwidth_mbps(mean, sigma, seed, client, round) * 1e6 / 8, float("inf")
        slot, lasts = slot_at(now_s, SLOT_S)
        return bandwidth_mbps(mean, sigma, seed, client, slot) * 1e6 / 8, lasts

    return at
