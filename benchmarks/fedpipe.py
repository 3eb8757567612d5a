"""The planner `fedpipe` without any training: how long a decision takes, and what exact ranks gain over greedy ones.

    python benchmarks/fedpipe.py [--sites 1000] [--instances 400]

A base of 28 blocks of seven linear layers, three formats, four batches, every depth; the sites differ in memory, speed,
network, examples and lengths. `cold` counts every cost anew, as in a run's first round. Prints one JSON line per case.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product

import numpy as np

import fedtune
from fedtune.devices.profiles import DeviceProfile
from fedtune.messages import Blueprint, Client
from fedtune.planning.allocation import Targets, by_importance, gain, worth
from fedtune.planning.fedpipe import FedPipe, FedPipeMemory
from fedtune.pruning.structure import Block, BlockLayout
from fedtune.runs.fleet import Fleet, Lengths, body_of
from fedtune.seeds import derive, generator

BLOCKS, RANKS = 28, (1, 2, 4, 8, 16)
SIDES = {
    **{f"self_attn.{name}_proj": (2048, 2048) for name in "qo"},
    **{f"self_attn.{name}_proj": (1024, 2048) for name in "kv"},
    **{f"mlp.{name}_proj": (6144, 2048) for name in ("gate", "up")},
    "mlp.down_proj": (2048, 6144),
}
MODULES = {f"model.layers.{at}.{name}": sides for at, (name, sides) in product(range(BLOCKS), SIDES.items())}
LAYOUT = BlockLayout(
    "llama",
    tuple(Block(f"model.layers.{at}", 16, 8, 128, 6144) for at in range(BLOCKS)),
    width=2048,
    head=2048 * 150_000,
    outputs=150_000,
    number_bytes=2,
)
RECIPE = """
name = "sites"
method = "fedpipe"
model = { base = "none" }
adapter = { rank = 8 }
planner = { importance = "gain", base_dtypes = ["int8", "nf4"] }
client = { steps = 10, batch = 8 }
rounds = { count = 20 }
data = { source = "at the sites", split = { kind = "files" }, max_tokens = 512 }
fleet = { name = "lognormal" }
"""


def sites(count: int) -> tuple[FedPipe, FedPipeMemory, list[Client]]:
    """Return a planner of so many sites, what it knows after the warm-up, and the sites."""
    recipe, rng = fedtune.bind(RECIPE), generator(derive(0, "sites"))
    names = [f"site-{place:04}" for place in range(count)]
    profiles = {
        name: DeviceProfile(name, float(rng.uniform(3, 30)), float(rng.lognormal(1, 1)), 1.0, 60.0) for name in names
    }
    blueprint = Blueprint(MODULES, {}, max(RANKS), 0, anatomy=LAYOUT)
    lengths = {name: Lengths(float(rng.uniform(60, 300)), float(rng.uniform(300, 512))) for name in names}
    parameters = sum(m * n for m, n in MODULES.values()) + LAYOUT.head
    fleet = Fleet(recipe, body_of(recipe, blueprint, parameters), profiles, lengths)
    planner = fleet.planner(blueprint)
    assert isinstance(planner, FedPipe)
    shares = rng.dirichlet(np.ones(len(MODULES)))
    known = FedPipeMemory(rounds=2, importance=dict(zip(sorted(MODULES), shares.tolist(), strict=True)))
    return planner, known, [Client(name, int(rng.integers(20, 500))) for name in names]


def decisions(count: int) -> None:
    """Print the seconds of a round's plans, with costs that are counted anew and as counted before."""
    planner, known, clients = sites(count)
    for case in ("cold", "warm"):
        began = time.process_time()
        plans = planner.plan(known, 3, clients)
        seconds = time.process_time() - began
        unfit = sum(not hasattr(plan, "plan") for plan in plans.values())
        line = {"case": f"decision, {case}", "sites": count, "modules": len(MODULES), "cpu_s": round(seconds, 3)}
        print(json.dumps({**line, "unfit": unfit}))


def against_greedy(count: int) -> None:
    """Print the share of the exact value that ranks by gain per number reach, on random importance and budgets."""
    layout = BlockLayout("llama", (Block("model.layers.0", 4, 4, 8, 64),), width=32)
    shares = []
    for instance in range(count):
        rng = generator(derive(instance, "knapsack"))
        sides = {f"model.layers.0.{name}": tuple(rng.integers(16, 200, 2).tolist()) for name in "abcd"}
        targets = Targets(sides, layout)
        importance = dict(zip(sorted(sides), rng.dirichlet(np.ones(4) / 2).tolist(), strict=True))
        budget = int(targets.numbers(1) * rng.uniform(1, 6))
        exact = worth(targets, by_importance(targets, importance, RANKS, budget).ranks(1, budget), importance)
        shares.append(worth(targets, greedy(targets, importance, budget), importance) / exact)
    line = {"case": "greedy over exact", "instances": count, "worst": round(min(shares), 4)}
    print(json.dumps({**line, "mean": round(sum(shares) / count, 4), "equal": sum(s > 1 - 1e-12 for s in shares)}))


def greedy(targets: Targets, importance: dict[str, float], budget: int) -> tuple[int, ...]:
    """Return ranks, by sorted name: rank 1 everywhere, then ever the step with the most gain per number that fits."""
    places = dict.fromkeys(targets.by_name, 0)
    while True:
        spent, steps = targets.cost([RANKS[place] for place in places.values()]), []
        for name, place in places.items():
            for larger in range(place + 1, len(RANKS)):
                cost = (RANKS[larger] - RANKS[place]) * sum(targets.modules[name])
                more = importance[name] * float(gain(np.array(RANKS[larger])) - gain(np.array(RANKS[place])))
                if spent + cost <= budget:
                    steps.append((more / cost, name, larger))
        if not steps:
            return tuple(RANKS[places[name]] for name in targets.by_name)
        _, name, larger = max(steps)
        places[name] = larger


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--sites", type=int, default=1000)
    arguments.add_argument("--instances", type=int, default=400)
    chosen = arguments.parse_args()
    decisions(chosen.sites)
    against_greedy(chosen.instances)
