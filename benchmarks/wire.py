"""What FedKSeed sends: bytes per client and round, counted on the encoded messages of both ways.

    python benchmarks/wire.py

Clients measure 200 scalars along 4096 seeds in each round; their scalars are drawn here, as large as those of a real
run (an eighth of the root mean square is one), and everything else is the library's own. Prints one JSON line per case;
`total` is one client's bytes down and up in a round. The paper counts 4 bytes per accumulator down, and 4 for the id
and 4 for the scalar of each step up: 17,984 bytes (Qin et al., ICML 2024, arXiv 2312.06353).
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np

from fedtune.directions.consistency import STATE
from fedtune.directions.seed_ledger import describe_base
from fedtune.messages import (
    AdmittedUpdate,
    Assignment,
    Blueprint,
    Client,
    ClientUpdate,
    LoraResult,
    Measured,
    PlannedClient,
    ProbeResult,
    Training,
)
from fedtune.methods.fedkseed import METHOD
from fedtune.methods.fedkseed_state import FedKSeedSettings, FedKSeedState
from fedtune.planning.fixed import Fixed
from fedtune.rounds.exchange import encoded_bytes
from fedtune.seeds import derive, generator
from fedtune.wire.codec import encode_assignment, encode_update

PAPER = 4096 * 4 + 200 * (4 + 4)
FORMS: dict[str, dict[str, Any]] = {
    "log of the round, which shows every client's scalars to all": {"public_log": True},
    "what changed": {},
    "whole": {"sync": "whole"},
    "what changed, and the levels of Pro": {"sampling": "pro"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    for form, options in FORMS.items():
        settings = FedKSeedSettings(scalar_step=2.0**-22, seeds=args.seeds, **options)
        down, up = traffic(settings, clients=args.clients, steps=args.steps, rounds=args.rounds)
        report(form, settings, args, down, up)
    dense = secure(args.seeds)
    print(json.dumps({"case": "dense K integers of 32 bits, as a secure sum would mask them", "up": dense}))
    print(json.dumps({"case": "the paper's count", "total": PAPER}))


def traffic(settings: FedKSeedSettings, *, clients: int, steps: int, rounds: int) -> tuple[list[int], list[int]]:
    """Return the largest bytes down and up of a client in each round, from the second on."""
    cohort = [Client(f"client-{number:02d}", 1000 + number) for number in range(clients)]
    training = Training(batch=1, learning_rate=3e-7, steps=steps)
    planner = Fixed(lambda name: (1, training), alpha="2r", rslora=False)
    plans = {client.name: planner.plan_for(client) for client in cohort}
    manifest = describe_base({"weight": np.zeros((64, 64), np.float32)}).encode()
    state: FedKSeedState = METHOD.init(Blueprint({}, {}, max_rank=1, seed=0, manifest=manifest), settings)
    down, up = [], []
    for _ in range(rounds):
        orders = {client.name: METHOD.assign(state, 0, PlannedClient(plans[client.name])) for client in cohort}
        updates = [answer(state, orders[client.name], client, steps) for client in cohort]
        down.append(max(encoded_bytes(encode_assignment(order)) for order in orders.values()))
        up.append(max(len(encode_update(update)) for update in updates))
        state = METHOD.aggregate(state, [AdmittedUpdate(update) for update in updates])
    return down[1:], up[1:]


def answer(state: FedKSeedState, order: Assignment, client: Client, steps: int) -> ClientUpdate:
    drawn = generator(derive(order.seed, "scalars")).normal(0.0, 8.0, steps)
    return ClientUpdate(
        client=client.name,
        round=order.round,
        num_examples=client.num_examples,
        result=ProbeResult(np.clip(np.rint(drawn), -127, 127).astype(np.int8), state.digest[:STATE], state.checks),
        measured=Measured(12.3, 2**31, 123_456, 3.21, 3.12),
    )


def secure(seeds: int) -> int:
    """Return the bytes of an update whose scalars are summed by seed: what a guard that is not built yet would mask."""
    sums = generator(0).integers(-(2**31), 2**31, seeds).astype(np.int32)
    return len(encode_update(ClientUpdate("client-00", 3, 1000, LoraResult({"a": sums}, base=""))))


def report(form: str, settings: FedKSeedSettings, args: argparse.Namespace, down: list[int], up: list[int]) -> None:
    print(
        json.dumps(
            {
                "case": form,
                "clients": args.clients,
                "steps": args.steps,
                "seeds": settings.seeds,
                "up": max(up),
                "down_second_round": down[0],
                "down_last_round": down[-1],
                "down_largest": max(down),
                "total": max(up) + max(down),
                "times_smaller_than_paper": round(PAPER / (max(up) + max(down)), 1),
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
