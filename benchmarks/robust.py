"""How far attackers move the result of each robust rule, beside the plain mean: six attacks by a fifth of the clients.

    python benchmarks/robust.py --clients 10 50 --seeds 50 --numbers 4096

The clients' changes are one true change of norm 1 and noise of norm 2. A rule's distance is that between its result
with the attackers and its result of the honest clients alone; 2 f C is what clip promises, f the attackers' share of
the weights and C the median norm of a round before. Prints a table of distances, mean and standard deviation over the
seeds, with a star where the mean of a rule's distances is above 2 f C; then one of errors against the true change, and
the time of each rule on the numbers of a large adapter.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from fedtune.methods.robust import RULES, Contribution, least_clients
from fedtune.methods.settings import RobustRule
from fedtune.seeds import derive, generator
from fedtune.tensors import Array, weighted_mean

Attack: TypeAlias = Callable[[Array, int, np.random.Generator], Array]
"""(honest changes (H, d), number of attackers, generator) -> the attackers' changes, one a row"""

SHARE = 0.2
"""Of the clients that attack."""
NOISE = 2.0
"""Norm of an honest client's noise, beside a true change of norm 1."""


def scaled(honest: Array, count: int, rng: np.random.Generator) -> Array:
    """Return changes turned round and made 20 times as large (Bagdasaryan et al., AISTATS 2020, arXiv 1807.00459)."""
    turned: Array = -20 * honest[:count]
    return turned


def noise(honest: Array, count: int, rng: np.random.Generator) -> Array:
    """Return normal noise of a thousand times the norm (Blanchard et al., NeurIPS 2017, arXiv 1703.02757)."""
    size = float(1000 / np.sqrt(honest.shape[1]))
    drawn: Array = size * rng.standard_normal((count, honest.shape[1]))
    return drawn


def flipped(honest: Array, count: int, rng: np.random.Generator) -> Array:
    """Return changes of the other sign (Li et al., AAAI 2019, arXiv 1811.03761)."""
    return -honest[:count]


def shifted(honest: Array, count: int, rng: np.random.Generator) -> Array:
    """Return one change for all, a standard deviation off in every number (Baruch et al., NeurIPS 2019, 1902.06156)."""
    return np.tile(honest.mean(axis=0) - honest.std(axis=0), (count, 1))


def constant(honest: Array, count: int, rng: np.random.Generator) -> Array:
    """Return one number everywhere (the same-value attack of Li et al., AAAI 2019, arXiv 1811.03761)."""
    return np.ones((count, honest.shape[1]))


def inner_product(honest: Array, count: int, rng: np.random.Generator) -> Array:
    """Return a tenth of the honest mean, turned round (Xie et al., UAI 2020, arXiv 1903.03936)."""
    return np.tile(-0.1 * honest.mean(axis=0), (count, 1))


ATTACKS: Mapping[str, Attack] = {
    "x -20": scaled,
    "noise x 1000": noise,
    "x -1": flipped,
    "same small shift": shifted,
    "constant": constant,
    "inner product": inner_product,
}
CHOSEN: Mapping[str, RobustRule] = {"mean": RobustRule(), **{name: RobustRule(name) for name in RULES}}  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--numbers", type=int, default=4096)
    parser.add_argument("--timed", type=int, default=4_194_304, help="numbers of the adapter that is timed; 0: none")
    args = parser.parse_args()
    for clients in args.clients:
        if clients < max(least_clients(rule) for rule in CHOSEN.values()):
            parser.error(f"--clients: expected at least 5; got {clients}")
        measured = [measure(clients, seed, args.numbers) for seed in range(args.seeds)]
        bound = float(np.mean([one["bound"] for one in measured]))
        print(f"{clients} clients, {int(SHARE * clients)} attackers, {args.seeds} seeds; 2 f C = {bound:.3f}")
        for what in ("distance to the honest result", "error against the true change"):
            show(what, measured, bound if what.startswith("distance") else np.inf)
    if args.timed:
        for name in CHOSEN:
            print(f"{name:>10}  10 clients, {args.timed:,} numbers: {timed(name, args.timed):.2f} s")


def measure(clients: int, seed: int, size: int) -> Mapping[str, float]:
    """Return 2 f C, and distance and error by rule and attack, of one seed."""
    rng = generator(derive(seed, "benchmark.robust"))
    count, truth = int(SHARE * clients), unit(rng.standard_normal(size))
    # Those that will attack have honest changes too, which some attacks start from.
    everyone = truth + NOISE * np.stack([unit(rng.standard_normal(size)) for _ in range(clients)])
    past = [float(np.median(np.linalg.norm(everyone, axis=1)))]
    honest, results = everyone[count:], {"bound": 2 * count / clients * past[0]}
    for rule in CHOSEN:
        alone = combine(rule, honest, past)
        for attack, act in {"none": lambda h, c, r: everyone[:c], **ATTACKS}.items():
            moved = combine(rule, np.concatenate([act(everyone, count, rng), honest]), past)
            results[f"distance to the honest result/{rule}/{attack}"] = float(np.linalg.norm(moved - alone))
            results[f"error against the true change/{rule}/{attack}"] = float(np.linalg.norm(moved - truth))
    return results


def combine(rule: str, changes: Array, past: Sequence[float]) -> Array:
    """Return the result of a rule over changes of values that are zero, all of one weight."""
    parts = [Contribution(f"c{place:03}", {"x": row}, 1 / len(changes)) for place, row in enumerate(changes)]
    if rule == "mean":
        return weighted_mean([(part.tensors, part.share) for part in parts])["x"]
    return RULES[rule](CHOSEN[rule], {"x": np.zeros(changes.shape[1])}, parts, past).mean["x"]


def unit(vector: Array) -> Array:
    scaled_down: Array = vector / np.linalg.norm(vector)
    return scaled_down


def show(what: str, measured: Sequence[Mapping[str, float]], bound: float) -> None:
    print(f"\n{what:<20}" + "".join(f"{rule:>18}" for rule in CHOSEN))
    for attack in ("none", *ATTACKS):
        cells = []
        for rule in CHOSEN:
            values = [one[f"{what}/{rule}/{attack}"] for one in measured]
            cells.append(f"{np.mean(values):.3f} ± {np.std(values):.3f}{'*' if np.mean(values) > bound else ' '}")
        print(f"{attack:<20}" + "".join(f"{cell:>18}" for cell in cells))
    print()


def timed(rule: str, size: int) -> float:
    rng = generator(derive(0, "benchmark.robust.timed"))
    changes = rng.standard_normal((10, size), dtype=np.float32)
    began = time.perf_counter()
    combine(rule, changes, [1.0])
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
