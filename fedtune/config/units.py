"""What the numbers of a settings file count: the unit of each key, by its name, its ending or its path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

UNITS_BY_ENDING: Mapping[str, str] = {
    "_s": "seconds",
    "_kib": "KiB (1,024 bytes)",
    "_mib": "MiB (1,024² bytes)",
    "_gib": "GiB (1,024³ bytes)",
    "_gb": "GB (10⁹ bytes)",
    "_mbps": "10⁶ bits per second",
    "_gbps": "10⁹ bytes per second",
    "_tflops": "10¹² operations per second",
    "_w": "watts",
    "_per_min": "calls per minute",
}
UNITS: Mapping[str, str] = {
    "accumulation": "forward passes",
    "attackers": "share of the clients",
    "attempts": "tries",
    "availability": "share of the time",
    "back": "share of each block's heads and channels",
    "backs": "share of each block's heads and channels",
    "bar_after": "refusals",
    "batch": "examples",
    "batch_clients": "clients",
    "batches": "forward passes",
    "client_examples": "examples",
    "clients": "clients",
    "cutoff": "nats",
    "cohort": "clients, or share of the fleet",
    "buffer": "updates",
    "concurrency": "clients",
    "max_staleness": "versions",
    "count": "rounds",
    "max_concurrent_downloads": "transfers",
    "dropout": "probability",
    "dropouts": "probability",
    "epochs": "passes over the client's examples",
    "every": "rounds",
    "examples": "examples",
    "explore": "clients per round",
    "first_rung": "rounds",
    "final_rate": "share of client.learning_rate",
    "fraction_bits": "bits",
    "generate": "examples",
    "groups": "sets of numbers",
    "gpu_share": "share of a GPU",
    "held_out": "share of the rows",
    "interval": "rounds",
    "least_share": "share of the steps",
    "limit": "rows",
    "hidden": "hidden units",
    "max_rank": "rank",
    "patience": "evaluations",
    "replan_every": "rounds",
    "max_rounds": "rounds",
    "max_down_kib_s": "KiB (1,024 bytes) per second",
    "max_temperature_c": "°C",
    "max_up_kib_s": "KiB (1,024 bytes) per second",
    "min_battery": "percent",
    "min_steps": "optimizer steps",
    "max_steps": "steps",
    "max_tokens": "tokens",
    "min_clients": "clients",
    "min_cohort": "clients",
    "min_examples": "rows",
    "modes": "share of the top speed",
    "multiple": "channels",
    "new_tokens": "tokens",
    "processes": "processes",
    "queries": "directions per step",
    "ramp": "share of the rounds",
    "rank": "rank",
    "tokens": "virtual tokens",
    "ranks": "rank",
    "rank_decay": "share of the rank",
    "repair_rank": "columns",
    "ratio": "share of the blocks' weights",
    "ratios": "share of the blocks' weights",
    "points": "values",
    "redraw": "rounds",
    "reduction": "times",
    "refresh": "rounds",
    "scalar_bits": "bits",
    "seeds": "directions",
    "shares": "share of the steps",
    "sizes": "rows",
    "stages": "stages",
    "state_max_rank": "rank",
    "down_rank": "rank",
    "down_ranks": "rank",
    "steps": "optimizer steps",
    "steps_between": "optimizer steps",
    "target": "share of the blocks' weights",
    "tau": "share of the squared singular values",
    "threads": "CPU threads",
    "top": "share of the blocks",
    "tops": "share of the blocks",
    "trials": "trials",
    "max_concurrent_uploads": "transfers",
    "max_source_handshakes": "connections",
    "utilisation": "share of the peak",
    "warmup": "share of the steps",
    "workers": "processes",
}
PLAIN_NUMBERS = frozenset(
    (
        *(
            "alpha",
            "beta1",
            "beta2",
            "clip",
            "clip_norm",
            "coverage_floor",
            "dpo_beta",
            "largest_rate",
            "learning_rate",
            "max_norm",
            "momentum",
        ),
        *(
            "net_sigma",
            "norm_cap",
            "over_select",
            "perturbation",
            "proximal",
            "rank_penalty",
            "scalar_step",
            "seed",
            "staleness_exponent",
            "strength",
            "rate",
        ),
        *("server_learning_rate", "weight_cap", "weight_decay"),
        *("discount", "learning_rates", "weight_decays", "low", "high"),
    )
)
"""Numbers without a unit."""
UNITS_BY_PATH: Mapping[str, str] = {
    "method.server_optimizer.tau": "no unit",
    "planner.batches": "examples",
    "method.robust.bound": "no unit",
    "rounds.warmup": "rounds",
}
"""Keys whose name has another unit elsewhere."""

DEVICE_RANGES: Mapping[str, str] = {
    "memory_gb": "> 0",
    "peak_tflops": "> 0",
    "utilisation": "> 0 and ≤ 1",
    "memory_gbps": "> 0",
    "up_mbps": "≥ 0.01",
    "down_mbps": "≥ 0.01",
    "net_sigma": "≥ 0",
    "latency_s": "≥ 0",
    "overhead_s": "≥ 0",
    "modes": "> 0 and ≤ 1",
    "mode_period_s": "≥ 1",
    "availability": "≥ 0 and ≤ 1",
    "compute_w": "> 0",
    "send_w": "> 0",
    "receive_w": "> 0",
}
"""What a profile is checked for as a whole, not by the types of its fields; a test holds these against that check."""


def numeric(annotation: Any) -> bool:
    """Whether a setting is a number, or a list of them."""
    if annotation in (int, float):
        return True
    return get_origin(annotation) is not Literal and any(map(numeric, get_args(annotation)))


def unit_of(name: str, annotation: Any) -> str:
    """Return the unit of a setting; empty where it is no number.

    Raises:
        KeyError: if it is a number and neither `UNITS` nor `PLAIN_NUMBERS` names it.
    """
    if not numeric(annotation):
        return ""
    if name in UNITS:
        return UNITS[name]
    for ending, unit in UNITS_BY_ENDING.items():
        if name.endswith(ending):
            return unit
    if name in PLAIN_NUMBERS:
        return "no unit"
    raise KeyError(f"fedtune/config/units.py: expected a unit for {name!r} in UNITS or PLAIN_NUMBERS; got none; add it")
