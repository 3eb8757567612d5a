"""Planners without any training: how long a decision takes, and the time each needs for the same summed gain.

    python benchmarks/planner.py [--only time|regret] [--seeds 5] [--plot FILE.png]

The world is synthetic: 30, 40 and 10 devices of 0.27, 1 and 4 TFLOP/s whose speed changes every 20 rounds, bandwidth
that changes every round, a cap on what fits each kind, and for each client a true worth of every arm of which a planner
only sees noisy losses. With probes, clients measure their speed and bandwidth before every round, off by a twentieth,
and the slowest one's time for that is part of the round. All policies meet the same world (common random numbers). Time
is a multiple of what the clairvoyant needs for the same summed gain. Prints one JSON line per case.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from fedtune.devices.traces import log_deviation
from fedtune.planning.bandits import Thompson, Ucb
from fedtune.planning.deadline import LATE_SHARE, Deadline, best_arms, candidate_ends
from fedtune.planning.policies import few
from fedtune.planning.policy import Arm, Candidate, Choice, Observed, Policy, Probe
from fedtune.planning.random_choice import RandomChoice
from fedtune.planning.s_ucb import SUcb
from fedtune.rounds.probe import PROBE_MB, PROBE_TFLOP, limit_s
from fedtune.seeds import derive, generator
from fedtune.tensors import Array

RATIOS, RANKS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75), (2, 4, 8, 16, 32)
ARMS = tuple(Arm(ratio, rank) for ratio, rank in product(RATIOS, RANKS))
TFLOPS, SHARES, CAPS = (0.27, 1.0, 4.0), (30, 40, 10), (0.55, 0.8, 1.0)
MODES, PERIOD = (1.0, 0.7, 0.5, 0.35), 20
NO_PROBE = Probe()
TOKENS, WEIGHTS, SIDES = 40_960, 86e6, 165_888
PROBE_ERROR = 0.05
"""By how much a probe is off."""
GOAL = 0.308
"""Summed mean true gain per round at which a run has reached its goal."""


@dataclass(frozen=True)
class Oracle:
    """What `deadline` would choose if it knew the round's true times and qualities: the yardstick of regret."""

    arms: tuple[Arm, ...]
    seconds: Callable[[int, Candidate], Array]
    """(round, client) -> true seconds of every arm in that round."""
    quality: Callable[[int, Candidate], Array]
    """(round, client) -> true quality of every arm."""
    server_s: float = 0.0

    def start(self) -> None:
        """Return None: nothing is left to learn."""

    def choose(self, memory: None, round: int, candidates: Sequence[Candidate], *, key: int) -> Choice:
        """Return the arms with the largest true quality per true second."""
        if not candidates:
            return Choice({})
        cohort = sorted(candidates, key=lambda client: client.client)
        seconds = np.array([self.seconds(round, client) for client in cohort])
        seconds = np.where([client.feasible for client in cohort], seconds, np.inf)
        quality = np.array([self.quality(round, client) for client in cohort])
        weights = np.array([client.weight for client in cohort])
        chosen, end = best_arms(seconds, quality, weights, candidate_ends(seconds), self.server_s)
        arms = {client.client: int(arm) for client, arm in zip(cohort, chosen, strict=True)}
        return Choice(arms, deadline_s=LATE_SHARE * end, why=dict.fromkeys(arms, "known"))

    def learn(self, memory: None, observed: Sequence[Observed]) -> None:
        """Learn nothing."""


@dataclass(frozen=True)
class World:
    """A fleet, and what is true of it; everything is a function of the seed."""

    seed: int
    clients: int
    cohort: int
    rounds: int
    decaying: bool = False
    misspecified: bool = False
    arms: tuple[Arm, ...] = ARMS

    @property
    def names(self) -> Sequence[str]:
        return [f"c{i:05d}" for i in range(self.clients)]

    def kind(self, name: str) -> int:
        place = int(name[1:]) * sum(SHARES) // self.clients
        return 0 if place < SHARES[0] else 1 if place < SHARES[0] + SHARES[1] else 2

    def cohort_of(self, round: int) -> Sequence[str]:
        drawn = generator(derive(self.seed, "cohort", round)).choice(self.clients, self.cohort, replace=False)
        return [self.names[i] for i in sorted(drawn.tolist())]

    def work(self) -> tuple[Array, Array]:
        """Return (TFLOP, MB) of every arm."""
        ratio, rank = self.columns
        sides = SIDES * (1 - 0.5 * ratio)
        tflop = TOKENS * (4 * WEIGHTS * (1 - ratio) + 6 * rank * sides) / 1e12
        return tflop, 8 * rank * sides / 1e6

    @property
    def columns(self) -> tuple[Array, Array]:
        return np.array([arm.ratio for arm in self.arms]), np.array([float(arm.rank) for arm in self.arms])

    def feasible(self, name: str) -> Array:
        ratio, rank = self.columns
        found: Array = 0.85 * (1 - ratio) + 0.004 * rank <= CAPS[self.kind(name)]
        return found

    def rates(self, name: str, round: int) -> tuple[float, float, float]:
        """Return (TFLOP/s, MB/s, factor of noise) of a client in a round."""
        mode = MODES[int(generator(derive(self.seed, "mode", round // PERIOD, name)).integers(4))]
        mean = math.log(10) + 0.5 * float(generator(derive(self.seed, "mean", 0, name)).standard_normal())
        mbps = min(30.0, max(2.0, math.exp(mean + log_deviation(self.seed, name, round))))
        noise = math.exp(0.1 * float(generator(derive(self.seed, "noise", round, name)).standard_normal()))
        return TFLOPS[self.kind(name)] * mode, mbps / 8, noise

    def probe(self, name: str, round: int, limit_s: float) -> tuple[Probe, float]:
        """Return what a client says of itself before a round, and the seconds that it takes for that."""
        speed, bandwidth, _ = self.rates(name, round)
        one, two = generator(derive(self.seed, "probe", round, name)).standard_normal(2)
        said = Probe(math.exp(PROBE_ERROR * one) / speed, math.exp(PROBE_ERROR * two) / bandwidth)
        return said, min(limit_s, PROBE_TFLOP / speed) + min(limit_s, PROBE_MB / bandwidth)

    def seconds(self, name: str, round: int) -> tuple[Array, Array]:
        """Return the true (compute, transfer) seconds of every arm."""
        (tflop, megabytes), (speed, bandwidth, noise) = self.work(), self.rates(name, round)
        compute = tflop / speed * noise
        if self.misspecified:
            largest = compute.max()
            compute = 3.0 + largest * (compute / largest) ** 0.6
        return compute, megabytes / bandwidth * noise

    def worth(self, name: str, round: int) -> Array:
        """Return the true gain of every arm."""
        rng, (ratio, rank) = generator(derive(self.seed, "worth", 0, name)), self.columns
        pn, rn = rng.uniform(0.6, 0.95), rng.uniform(3, 12)
        if self.misspecified:
            bent = 1 / (1 + np.exp(-(0.6 * pn - ratio) / 0.06))
            gain = bent * (0.7 + 0.3 * (rank >= rn))
        else:
            gain = np.clip(1 - (ratio / pn) ** 2, 0, None) * (1 - np.exp(-rank / rn))
        found: Array = gain * (math.exp(-round / self.rounds) if self.decaying else 1.0)
        return found

    def observed_gain(self, true: float, name: str, round: int) -> float:
        one, two = generator(derive(self.seed, "gain", round, name)).standard_normal(2)
        return float(true * (1 + 0.35 * one) + 0.02 * two)

    def candidate(self, name: str, weight: float, prior: float | None, probe: Probe = NO_PROBE) -> Candidate:
        """Return a client as a planner sees it; its prior is off by so much, none knows nothing."""
        tflop, megabytes = self.work()
        ratio, rank = self.columns
        known = None
        if prior is not None:
            error = math.exp(prior * float(generator(derive(self.seed, "prior", 0, name)).standard_normal()))
            known = error / (TFLOPS[self.kind(name)] * float(np.mean(MODES)))
        return Candidate(
            client=name,
            weight=weight,
            feasible=tuple(map(bool, self.feasible(name))),
            tflop=tuple(tflop.tolist()),
            megabytes=tuple(megabytes.tolist()),
            memory_gb=tuple((0.85 * (1 - ratio) + 0.004 * rank).tolist()),
            s_per_tflop=known,
            s_per_mb=None if prior is None else 0.8,
            probe=probe,
        )


@dataclass(frozen=True)
class Nearest:
    """Always the feasible arm nearest to a wish; memory may be ignored."""

    arms: tuple[Arm, ...]
    wish: Arm
    ignore: bool = False

    def start(self) -> None: ...

    def choose(self, memory: None, round: int, candidates: Sequence[Candidate], *, key: int) -> Any:
        from fedtune.planning.policy import Choice

        def off(arm: Arm) -> float:
            return 10 * (arm.ratio - self.wish.ratio) ** 2 + math.log2(arm.rank / self.wish.rank) ** 2

        found = {}
        for each in candidates:
            fits = [i for i in range(len(self.arms)) if self.ignore or each.feasible[i]]
            found[each.client] = min(fits, key=lambda i: (off(self.arms[i]), i))
        return Choice(found)

    def learn(self, memory: None, observed: Sequence[Observed]) -> None: ...


def played(
    world: World, policy: Policy[Any], *, prior: float | None, limit: int = 8, probed: bool = False
) -> tuple[Array, Array]:
    """Return (time, summed gain) after each round, until the goal is reached or `limit` times the rounds are over."""
    memory, now, total = policy.start(), 0.0, 0.0
    times, gains, goal = [], [], GOAL * world.rounds
    for number in range(1, limit * world.rounds + 1):
        names = world.cohort_of(number)
        most = limit_s(number, now)
        probes = {name: world.probe(name, number, most) if probed else (NO_PROBE, 0.0) for name in names}
        # A round begins when all have answered.
        now += max(spent for _, spent in probes.values())
        candidates = [world.candidate(name, 1 / len(names), prior, probes[name][0]) for name in names]
        choice = policy.choose(memory, number, candidates, key=derive(world.seed, "planner", number))
        observed, mean = [], 0.0
        for name, candidate in zip(names, candidates, strict=True):
            arm = choice.arms[name]
            place = ARMS.index(policy.arms[arm])
            compute, transfer = (part[place] for part in world.seconds(name, number))
            true = float(world.worth(name, number)[place])
            mean += true / len(names)
            seen = world.observed_gain(true, name, number)
            observed.append(
                Observed(
                    client=name,
                    arm=policy.arms[arm],
                    tflop=candidate.tflop[place],
                    megabytes=candidate.megabytes[place],
                    compute_s=float(compute),
                    transfer_s=float(transfer),
                    loss_before=seen,
                    loss_after=0.0,
                    importance=abs(seen),
                    s_per_tflop=candidate.s_per_tflop,
                    s_per_mb=candidate.s_per_mb,
                    probe=candidate.probe,
                )
            )
        now += max(each.seconds or 0.0 for each in observed)
        total += mean
        memory = policy.learn(memory, observed)
        times.append(now)
        gains.append(total)
        if total >= goal:
            break
    return np.array(times), np.array(gains)


def reached(times: Array, gains: Array, goal: float) -> float:
    """Return when a gain was reached, between two rounds in proportion; infinite if it was not."""
    place = int(np.searchsorted(gains, goal))
    if place == len(gains):
        return math.inf
    before = (times[place - 1], gains[place - 1]) if place else (0.0, 0.0)
    share = (goal - before[1]) / (gains[place] - before[1])
    return float(before[0] + share * (times[place] - before[0]))


@dataclass(frozen=True)
class Case:
    """A policy, and what it is given."""

    policy: Policy[Any]
    prior: float | None = None
    """Error of the devices' profiles; None: none are known."""
    probed: bool = False


def policies(world: World) -> Mapping[str, Case]:
    """Return every policy by name, with what it is given."""
    of_six = tuple(arm for arm in few(ARMS) if arm.ratio <= 0.5)

    def six(fits_all: tuple[Arm, ...]) -> tuple[Arm, ...]:
        # A device that none of the six fits takes the smallest arm that does: memory is no choice.
        return (*fits_all, Arm(0.75, 4))

    found: dict[str, Case] = {
        "bandit": Case(Deadline(ARMS, draws=True), 0.3),
        "bandit, probe": Case(Deadline(ARMS, draws=True), 0.3, probed=True),
        "deadline": Case(Deadline(ARMS), 0.3),
        "deadline, probe": Case(Deadline(ARMS), 0.3, probed=True),
        "bandit, no profile": Case(Deadline(ARMS, draws=True)),
        "deadline, no profile": Case(Deadline(ARMS)),
    }
    for ratio, rank in product((0.25, 0.375, 0.5), (8, 16)):
        found[f"fixed {ratio:g}, {rank}"] = Case(Nearest(ARMS, Arm(ratio, rank)))
    for rank in (4, 8, 16, 32):
        found[f"unpruned {rank}, memory ignored"] = Case(Nearest(ARMS, Arm(0.0, rank), ignore=True))
    found |= {
        "ucb, few arms": Case(Ucb(six(of_six))),
        "s-ucb": Case(SUcb(ARMS)),
        "ucb, all arms": Case(Ucb(ARMS)),
        "thompson": Case(Thompson(ARMS)),
        "random": Case(RandomChoice(ARMS)),
    }
    return found


WORLDS: Mapping[str, Callable[[int], World]] = {
    "80 of 80, 100 rounds": lambda seed: World(seed, 80, 80, 100),
    "10 of 80, 100 rounds": lambda seed: World(seed, 80, 10, 100),
    "10 of 80, 300 rounds, decaying": lambda seed: World(seed, 80, 10, 300, decaying=True),
    "10 of 80, misspecified": lambda seed: World(seed, 80, 10, 100, misspecified=True),
    "8 of 8": lambda seed: World(seed, 8, 8, 100),
}


def narrowed(policy: Policy[Any]) -> Policy[Any]:
    """Return a policy that is handed its own arms' costs out of those of all arms."""
    return policy if policy.arms == ARMS else Narrow(policy)


@dataclass(frozen=True)
class Narrow:
    inner: Policy[Any]

    @property
    def arms(self) -> tuple[Arm, ...]:
        return self.inner.arms

    def start(self) -> Any:
        return self.inner.start()

    def choose(self, memory: Any, round: int, candidates: Sequence[Candidate], *, key: int) -> Any:
        places = [ARMS.index(arm) for arm in self.inner.arms]

        def taken(row: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(row[i] for i in places)

        few_ = [
            Candidate(c.client, c.weight, taken(c.feasible), taken(c.tflop), taken(c.megabytes), taken(c.memory_gb))
            for c in candidates
        ]
        return self.inner.choose(memory, round, few_, key=key)

    def learn(self, memory: Any, observed: Sequence[Observed]) -> Any:
        return self.inner.learn(memory, observed)


def regret(seeds: int, plot: str | None) -> None:
    curves: dict[str, list[tuple[Array, Array]]] = {}
    for title, make in WORLDS.items():
        ratios: dict[str, list[float]] = {}
        missed: dict[str, int] = {}
        for seed in range(seeds):
            world = make(seed)

            def seconds(round: int, each: Candidate, world: World = world) -> Array:
                compute, transfer = world.seconds(each.client, round)
                return compute + transfer

            def worth(round: int, each: Candidate, world: World = world) -> Array:
                return world.worth(each.client, round)

            goal = GOAL * world.rounds
            oracle = played(world, Oracle(ARMS, seconds, worth), prior=None)
            ideal = reached(*oracle, goal)
            for name, case in policies(world).items():
                run = played(world, narrowed(case.policy), prior=case.prior, probed=case.probed)
                took = reached(*run, goal)
                missed[name] = missed.get(name, 0) + (not math.isfinite(took))
                # A run that stopped before the goal took at least as long as it ran: it is never left out.
                ratios.setdefault(name, []).append(min(took, float(run[0][-1])) / ideal)
                if title.startswith("10 of 80, 100"):
                    curves.setdefault(name, []).append(run)
            if title.startswith("10 of 80, 100"):
                curves.setdefault("oracle", []).append(oracle)
        for name, values in ratios.items():
            logs = np.log(values)
            line: dict[str, Any] = {
                "world": title,
                "policy": name,
                "reached": f"{len(values) - missed[name]} of {len(values)}",
                f"times the oracle{', at least' * (missed[name] > 0)}": round_to(np.exp(logs.mean())),
                "sd of the logarithm": round_to(logs.std(ddof=1)) if len(values) > 1 else None,
            }
            print(json.dumps(line), flush=True)
    goal = GOAL * 100
    for name, runs in curves.items():
        quarters = [
            round_to(np.mean([reached(*run, share * goal) for run in runs])) for share in (0.25, 0.5, 0.75, 1.0)
        ]
        print(json.dumps({"curve": name, "seconds to a quarter, half, three quarters, all of the goal": quarters}))
    if plot:
        draw(curves, plot)


def round_to(value: Any) -> float:
    return float(f"{float(value):.3g}")


def draw(curves: Mapping[str, Sequence[tuple[Array, Array]]], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    grid = np.linspace(0, GOAL * 100, 200)
    for name, runs in curves.items():
        mean = np.mean([[reached(*run, goal) for goal in grid] for run in runs], axis=0)
        if np.isfinite(mean).all():
            axes.plot(mean, grid, label=name, linewidth=2.2 if name in ("oracle", "deadline") else 1.0)
    axes.set(xlabel="simulated seconds", ylabel="summed gain")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def decisions() -> None:
    for clients in (100, 10_000):
        world = World(0, clients, clients, 100)
        candidates = [world.candidate(name, 1 / clients, 0.3) for name in world.names]
        for name, policy in (
            ("bandit", Deadline(ARMS, draws=True)),
            ("deadline", Deadline(ARMS)),
            ("s-ucb", SUcb(ARMS)),
            ("ucb", Ucb(ARMS)),
            ("thompson", Thompson(ARMS)),
            ("random", RandomChoice(ARMS)),
        ):
            memory: Any = policy.start()
            times = []
            for number in range(1, 4 if clients > 1000 else 12):
                # CPU time: of one thread, and not of whatever else the machine does.
                began = time.process_time()
                choice = policy.choose(memory, number, candidates, key=number)
                times.append(time.process_time() - began)
                observed = [
                    Observed(
                        client=c.client,
                        arm=policy.arms[choice.arms[c.client]],
                        tflop=c.tflop[0],
                        megabytes=c.megabytes[0],
                        compute_s=1.0,
                        transfer_s=1.0,
                        loss_before=1.0,
                        loss_after=0.5,
                    )
                    for c in candidates
                ]
                memory = policy.learn(memory, observed)
            print(json.dumps({"clients": clients, "policy": name, "ms": round_to(1e3 * min(times))}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=("time", "regret"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--plot")
    args = parser.parse_args()
    if args.only != "regret":
        decisions()
    if args.only != "time":
        regret(args.seeds, args.plot)


if __name__ == "__main__":
    main()
