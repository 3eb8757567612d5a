"""Plants faults in a copy of the source, one at a time, and says which of them the fast tests catch.

    python tests/mutations.py [--only TEXT] [--jobs 2] [--narrow] [--trust] [--json FILE]
    python tests/mutations.py --check        only that every fault can be planted

For each fault the test file that mirrors the module runs first, with those that the fault names; where these pass, the
whole fast tier runs. A fault is caught by a failing test, by an error while tests are collected, or by a run that
does not end in time. Before that the narrow tests must pass without any fault. Exits with 1 if more than `--survivors`
faults survive.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Fault:
    """One change of one file that a test must notice."""

    file: str
    """Below fedtune/."""
    old: str
    """Text that the file holds exactly once."""
    new: str
    what: str
    tests: tuple[str, ...] = ()
    """Below tests/: run first as well, beside the file that mirrors the module."""


FAULTS = (
    # Virtual tokens: where they stand, what they start from, how they are stored.
    Fault("model/virtual_tokens.py", "places + tokens.count], 1)", "places], 1)",
          "a text behind virtual tokens is read at its own places"),
    Fault("model/virtual_tokens.py", "output.last_hidden_state[:, ahead:]", "output.last_hidden_state[:, : -ahead]",
          "the last places are cut off in place of the virtual ones"),
    Fault("model/virtual_tokens.py", "torch.cat([mask.new_ones(rows, tokens.count), mask], 1)",
          "torch.cat([mask, mask.new_ones(rows, tokens.count)], 1)",
          "the mask of virtual tokens stands behind the text"),
    Fault("model/virtual_tokens.py", "begins = cache is None or cache.get_seq_length() == 0", "begins = True",
          "virtual tokens are put before each token that is generated"),
    Fault("model/virtual_tokens.py", "encode(initial, on_grid)}", "encode(initial)}",
          "an encoder's first embeddings depend on the machine that sums"),
    Fault("lora/virtual_tokens.py", "for layer in range(num_layers(own)) for side in SIDES]",
          "for side in SIDES for layer in range(num_layers(own))]",
          "a prefix is stored with all keys before all values", ("store/test_peft_prompt.py",)),
    Fault("config/adapter_kinds.py", 'if key == "gradient_checkpointing" and recipe.adapter.kind != "prefix":',
          'if key == "gradient_checkpointing":',
          "a prefix is trained with layers that are computed again"),
    # Methods: what is summed, with which weight, in which order.
    Fault("messages.py", "cohort = sorted(updates, key=lambda update: update.client)", "cohort = list(updates)",
          "a cohort is weighed in the order of arrival", ("methods/test_method.py",)),
    Fault("methods/fedit.py", "weights=lambda state: state.settings.weights", 'weights=lambda state: "uniform"',
          "FedIT weighs clients alike, whatever they hold"),
    Fault("methods/method.py", "rate * (mean[name] - old[name])", "rate * (old[name] - mean[name])",
          "the server steps away from the mean"),
    Fault("methods/method.py", "np.concatenate([factor[:rank], np.zeros", "np.concatenate([factor[-rank:], np.zeros",
          "a smaller client is sent the last rows of A in place of the first", ("methods/test_zeropad.py",)),
    Fault("methods/ffa.py", 'train="b", upload', 'train="ab", upload',
          "FFA-LoRA trains A as well"),
    Fault("methods/method.py", "factor_rank(name, moved)) + moved", "factor_rank(name, moved)) - moved",
          "the server goes against what clients have changed"),
    Fault("number_formats.py", "padded += draw.random(padded.shape, dtype=np.float32)", "padded += np.float32(0.4)",
          "codes are rounded down more often than up"),
    Fault("number_formats.py", "return array.T if name.endswith(\".b\") else array", "return array",
          "a scale is shared by all ranks of a row of B"),
    Fault("rounds/admission.py", "_check_codes(key, tensors[key]", "() and (key, tensors[key]",
          "codes and scales are taken as they come"),
    Fault("methods/zeropad.py", "mean, state.settings.server_learning_rate)", "mean, 1.0)",
          "the server's learning rate is not applied", ("methods/test_method.py",)),
    Fault("methods/hetlora.py", "[size / total for size in norms] if total",
          "[1 / len(norms) for size in norms] if total",
          "HetLoRA weighs clients alike in place of by norm"),
    Fault("methods/flexlora.py", "(old.factors, 1 - rate)", "(old.factors, 0.0)",
          "a part step forgets the old sum"),
    Fault("methods/fedex.py", "(new[name], -1.0)", "(old[name], -1.0)",
          "the residual is taken against the factors before the round"),
    Fault("methods/change.py", "np.concatenate([term.b for term in terms], axis=1)",
          "np.concatenate([term.b for term in terms[::-1]], axis=1)",
          "the two halves of a client's change are swapped", ("methods/test_flora.py",)),
    Fault("methods/change.py", "CANCELLED * own", "-CANCELLED * own",
          "the norm of terms that cancel each other is what float32 has left of it"),
    Fault("methods/change.py", "array - saved[name] for name", "array for name",
          "modules_to_save are measured from zero"),
    Fault("methods/change.py", "0.0 if total < 0 else", "0.0 if not total >= 0 else",
          "a change that is no number counts as none"),
    Fault("methods/flora.py", "b=f.b / c) for name, f in factors.items()", "b=f.b) for name, f in factors.items()",
          "the scale of a warm start is dropped from b"),
    Fault("methods/pruning.py", "1.0 / np.maximum(share, floor)", "1.0 / np.maximum(share, 1e-3)",
          "the floor of the coverage is ignored"),
    Fault("methods/fedkseed.py", "max(1, round(MAX_WEIGHT * count / most))", "max(1, MAX_WEIGHT)",
          "FedKSeed weighs clients alike"),
    Fault("methods/fedkseed.py", "if update.seeds.state != state.digest[:STATE]:", "if False:",
          "work on another state is taken"),
    Fault("methods/fedkseed.py", "one.numbers.astype(np.int64) << one.shift, weight", "one.numbers, weight",
          "numbers of a client that descends are added without their shift", ("methods/test_fedkseed_descent.py",)),
    Fault("methods/seed_room.py", "while shift > 0 and room(state) < growth_of_numbers(state, shift):", "while False:",
          "numbers may leave 32 bits", ("methods/test_fedkseed_descent.py",)),
    Fault("rounds/admission.py", "if not 0 <= result.shift <= task.largest_shift:", "if result.shift < 0:",
          "a shift that the sums have no room for is taken", ("rounds/test_admission.py",)),
    Fault("rounds/influence.py", "        if len(stated) < 3:\n            continue\n", "",
          "of two clients of one kind the larger is an outlier", ("rounds/test_influence.py",)),
    Fault("methods/fedkseed_state.py", "return self.settings.fraction_bits + self.coarseness",
          "return self.settings.fraction_bits", "a coarser scalar moves the sums no further",
          ("methods/test_fedkseed.py",)),
    Fault("methods/serialization.py", "key=lambda name: (-tensors[name].itemsize, name)", "key=lambda name: name",
          "a state's tensors are written in another order"),
    Fault("methods/serialization.py", 'if not field.metadata.get("persisted", True):', "if False:",
          "a state is written with what is not of it"),
    Fault("methods/server_optimizer.py", "mean[name] - x)", "x - mean[name])",
          "the pseudo-gradient has the wrong sign"),
    Fault("methods/server_optimizer.py", "np.sign(v - change**2)", "np.sign(change**2 - v)",
          "the variance of FedYogi moves away from the squared change"),
    Fault("methods/server_optimizer.py", "np.full_like(value, optimizer.tau**2)", "np.zeros_like(value)",
          "the variance begins below the least that is allowed"),
    Fault("methods/robust.py", "median(past) if past else middle", "middle",
          "the bound of clip follows from the round that it bounds"),
    Fault("methods/robust.py", "1.0 if size <= bound else bound / size", "1.0",
          "clip clips nothing"),
    Fault("methods/robust.py", "[:, 1 : len(cohort) - count - 1]", "[:, 1 : len(cohort)]",
          "multi-Krum counts the distances to the attackers"),
    Fault("methods/robust.py", "ordered[count : len(cohort) - count]", "ordered[count:]",
          "trimming leaves out the smallest numbers alone"),
    Fault("methods/robust.py", "method.advance(state.inner, combined.mean)", "state.inner",
          "a robust rule's result is thrown away"),
    Fault("methods/method.py", "terms=(*task.terms, *recipe_terms(plan.training))", "terms=task.terms",
          "the term of FedProx is not sent", ("model/test_objective.py",)),
    # Preferred and rejected answers.
    Fault("model/loss.py", "return -logsigmoid(pairs.beta * (answer_margins(likelihoods) - pairs.margins))",
          "return -logsigmoid(pairs.beta * answer_margins(likelihoods))",
          "answers are compared with no reference", ("model/test_preference.py",)),
    Fault("model/loss.py", "preferred, rejected = likelihoods.chunk(2)", "rejected, preferred = likelihoods.chunk(2)",
          "the rejected answer is preferred", ("model/test_preference.py",)),
    Fault("model/loss.py", "index_put((rows, places), losses).sum(1)", "index_put((rows, places), losses).mean(1)",
          "answers are compared by the mean over padded tokens", ("model/test_preference.py",)),
    Fault("data/preference.py", "np.full(count, IGNORED, np.int64), labels[count:]", "labels[:0], labels",
          "what both answers begin with counts", ("data/test_preference.py",)),
    Fault("data/preference.py", "if not all((own != IGNORED).any() for own in labels):", "if False:",
          "rows without a difference are trained on", ("data/test_preference.py",)),
    Fault("data/transfer.py", "replace(example, rejected=other) for", "replace(example, rejected=example) for",
          "a worker process compares an answer with itself", ("data/test_transfer.py",)),
    Fault("client/perform.py", "        check_rows(examples, terms, assignment.plan.client)\n", "        pass\n",
          "rows of another kind than the objective are trained on", ("client/test_perform.py",)),
    Fault("methods/method.py", "    if training.preference is not None:\n        yield training.preference\n", "",
          "the objective dpo is not sent", ("config/test_consent.py",)),
    Fault("model/fused_loss.py", "scaled = gradient * of_tokens[:, None].to(gradient.dtype)", "scaled = gradient",
          "every token of a pair weighs one", ("model/test_preference.py",)),
    # Arithmetic that methods stand on.
    Fault("tensors.py", "acc = np.zeros(first[name].shape, np.float64)",
          "acc = np.zeros(first[name].shape, np.float32)",
          "means are summed in single precision"),
    Fault("lora/adapter.py", 'derive(key, "lora.a", client=module)', 'derive(key, "lora.a")',
          "all modules start from the same A"),
    Fault("seeds.py", 'digest.update(len(data).to_bytes(8, "little") + data)', "digest.update(data)",
          "two different purposes may share one key"),
    Fault("lora/lowrank.py", "count if max_rank is None else min(count, max_rank)", "count",
          "the largest rank is no limit"),
    Fault("pruning/structure.py", "b[cut.out] = factors.b", "b[: len(cut.out)] = factors.b",
          "a pruned client's rows go back to the wrong places"),
    Fault("pruning/ranking.py", "new = mean if old is None else np.where(weights > 0, 0.5 * old + 0.5 * mean, old)",
          "new = mean if old is None else 0.5 * old + 0.5 * mean",
          "scores fade of what no client holds"),
    # Seeded directions.
    Fault("directions/philox.py", "k0, k1 = key & MASK, key >> 32", "k0, k1 = key >> 32, key & MASK",
          "the two halves of a key are swapped"),
    Fault("directions/hadamard.py", "y = fwht(x).reshape(-1, BLOCK) * second", "y = fwht(x).reshape(-1, BLOCK)",
          "the second signs are left out"),
    Fault("directions/kron.py", "i, j = divmod(index, self.rank)", "j, i = divmod(index, self.rank)",
          "rows and columns of a direction are swapped", ("directions/test_bank.py",)),
    Fault("directions/sampling.py", "m = n + (word * (size - n) >> 32)", "m = n + (word * (size - n - 1) >> 32)",
          "the bound of a draw is off by one"),
    Fault("directions/downlink.py", "quotient - ((rest == 0) & (quotient & 1 == 1))", "quotient",
          "ties are rounded up in place of to even"),
    Fault("directions/downlink.py", "fits_16_bits(accumulators) else \"<i4\"",
          "fits_16_bits(accumulators) else \"<i2\"",
          "sums that need 32 bits are sent in 16"),
    Fault("directions/consistency.py", "hashlib.sha256(y.astype(\"<i4\").tobytes())",
          "hashlib.sha256(y[:1].astype(\"<i4\").tobytes())",
          "a check reads one displacement of a block"),
    Fault("directions/rebuild_numba.py", "uint32(0x7FFF)", "uint32(0x8000)",
          "bfloat16 is not rounded to even"),
    Fault("directions/rebuild_numba.py", "group = block % uint32(rows.shape[1])", "group = uint32(0)",
          "every block has the numbers of the first group"),
    Fault("directions/hadamard.py", "np.arange(run.start, run.stop) % len(table)", "np.arange(len(run)) % len(table)",
          "groups are counted from the start of a run of blocks", ("directions/test_space.py",)),
    Fault("directions/space.py", "return int(cube.sum(axis=(0, 2)).max())", "return int(cube.sum(axis=2).max())",
          "the banks that meet at a position are bounded one by one"),
    Fault("directions/space.py", "start=self.newest.start)", "start=0)",
          "a step moves the oldest bank"),
    Fault("directions/seed_ledger.py", "if (count, groups) == (1, 1):", "if False:",
          "one bank of one group has two digests"),
    Fault("directions/projection.py", "sums[number % rows] += (turned", "sums[0] += (turned",
          "slopes of all groups are added up"),
    Fault("directions/projection_torch.py", "sums[(run.start + row) % rows] +=", "sums[row] +=",
          "slopes of a run that starts within the groups go to others"),
    Fault("directions/downlink.py", "start = same * (len(accumulators) // banks)", "start = 0",
          "banks that stayed as they were are sent again"),
    Fault("probing/replica.py", "!= [plain.key for plain in plain_banks(bank)][: len(then)]:", "!= then:",
          "another run's redrawn banks are taken for this one's"),
    Fault("directions/moves_numba.py", "spread ^ row[n] ^ bits[WORDS + n]", "row[n] ^ bits[WORDS + n]",
          "a stored direction lacks the random bits of its groups"),
    Fault("directions/moves_torch.py", "(own * ((1 << size) - 1))", "(own * (1 << (size - 1)))",
          "a small group's random bit reaches its last position alone"),
    Fault("model/seed_rebuild.py", "if not self._moves and beside == self._written:", "if beside == self._written:",
          "a step is forgotten where the next loss is taken at the same place"),
    Fault("model/probe.py", "or needed <= spare", "or needed >= spare",
          "displacements are stored where there is no room for them"),
    Fault("probing/replica.py", "if ledger.digest != state.digest:", "if False:",
          "the digest of rebuilt accumulators is not compared"),
    # The client.
    Fault("class_sums.py", "small = squares < least * (1 - SLACK)", "small = squares < 0",
          "squares that no features have are admitted"),
    Fault("class_sums.py", "counts[:, None] * LARGEST_FEATURE", "np.inf",
          "sums beyond all features of its examples are admitted"),
    Fault("methods/class_head.py", "check_classes(total, labels, round=state.round + 1)", "pass",
          "a class without an example gets a row of the head", ("runs/test_head_round.py",)),
    Fault("methods/class_head.py", "return add([in_proportion(", "return add(parts) or add([in_proportion(",
          "a client whose weight is capped counts as its examples in the head"),
    Fault("rounds/context.py", "if self.first is None or round != 1:", "if self.first is None or round > 2:",
          "the head is made twice", ("runs/test_head_round.py",)),
    Fault("model/pooling.py", "shown = mask[..., None].to(torch.float32)", "shown = mask[..., None].float() * 0 + 1",
          "padding counts in the mean of a text's states"),
    Fault("client/perform.py", "scale * factors.b", "factors.b",
          "the scale is dropped on the way up"),
    Fault("client/perform.py", "if assignment.base and assignment.base != base.digest:", "if False:",
          "a client trains on another base"),
    Fault("model/frozen.py", "and self.version == own._version", "",
          "a changed weight is reused after its base was written to"),
    Fault("model/frozen.py", "return plain and not half and", "return plain and",
          "under autocast a frozen change is rounded away in its weight"),
    Fault("model/frozen.py", "dense.T if transposed else dense", "dense",
          "a dense frozen change of GPT-2's layers is not transposed"),
    Fault("model/lora_layer.py", "linear(x, self.a) * self.scale", "linear(x, self.a)",
          "a LoRA layer leaves out the scale"),
    Fault("model/lora.py", "fresh.b / np.float32(plan.scale)", "fresh.b",
          "the scale is not divided out of a start"),
    Fault("model/selective_backward.py", "nullcontext() if segment.trained else torch.no_grad()", "nullcontext()",
          "the backward pass goes through all heads and channels", ("model/test_selective_backward.py",)),
    Fault("model/train.py", "if training.clip_norm is not None:", "if False:",
          "gradients are not clipped"),
    Fault("probing/order.py", 'derive(key, "data.order", epoch)', 'derive(key, "data.order")',
          "each pass over the data has the same order"),
    Fault("model/objective.py", "term.mu / 2 *", "term.mu *",
          "the term of FedProx counts twice"),
    Fault("model/objective.py", "for term in self.terms:\n", "for term in self.terms[:1]:\n",
          "only the first term of an objective counts"),
    Fault("probing/steps.py", "plus, minus = losses", "minus, plus = losses",
          "a probe's step has the wrong sign"),
    Fault("model/kron_forward.py", "target, origin = (i, j) if path.by_columns else (j, i)", "target, origin = (i, j)",
          "rows and columns are swapped for transposed layers"),
    Fault("model/merge.py", "if isinstance(module, Conv1D):", "if False:",
          "a merge forgets that GPT-2 holds its weights transposed", ("runs/test_export.py",)),
    Fault("model/evaluate.py", "tokens += rows.count", "tokens += rows.tokens",
          "the loss is divided by all tokens, not by those that count"),
    Fault("model/importance.py", "squared = squared + 2 * ((weight.T @ b) * a.T).sum(dim=1)",
          "squared = squared + ((weight.T @ b) * a.T).sum(dim=1)",
          "a factor of two is missing in the score of a column"),
    Fault("data/encode.py", "types if types.any() else None", "None",
          "the second text of a pair is read as the first"),
    Fault("data/chat.py", 'if turn["role"] == "assistant" and i > 0', 'if i > 0',
          "what the user writes is learned"),
    Fault("data/paths.py", "unique.setdefault(identity, place)", "unique[object()] = place",
          "a file that is named twice is read twice"),
    Fault("data/encode.py", "labels[begin:stop] = ids[begin:stop]", "labels[:stop] = ids[:stop]",
          "prompts count in the loss"),
    Fault("data/partition.py", "draw.permutation(members)", "members",
          "a group's rows are shared out unshuffled"),
    Fault("data/division.py", "np.sort(order[number:])", "np.sort(order)",
          "a client trains on the rows that it holds out"),
    # The loop, admission, schedule and planners.
    Fault("rounds/aggregation.py", "key=lambda update: (-size_of(update, norms), update.client)",
          "key=lambda update: (size_of(update, norms), update.client)",
          "of those who spoil a sum together the smallest is refused"),
    Fault("rounds/aggregation.py", "return why_not_sendable(context, request, after) or Aggregated(after, encoded)",
          "return Aggregated(after, encoded)", "a state that no client could be sent is committed"),
    Fault("rounds/aggregation.py", "for update in reversed(left_out[:-1] if used else left_out):", "for update in []:",
          "everyone larger than the culprit is refused with it"),
    Fault("methods/serialization.py", "if bad := count_not_finite(array):\n            raise",
          "if bad := 0:\n            raise",
          "an infinite state is stored"),
    Fault("store/run_journal.py", "if repeated != noted and self.why_not_finite(round):", "if repeated != noted:",
          "a finite state is replaced by what a repetition gives"),
    Fault("rounds/exchange.py", "or self._silence(name) for name in request.enrolled}",
          "or self._silence(name) for name in {**known, **request.enrolled}}",
          "outcomes stand in the order of arrival", ("rounds/test_loop.py",)),
    Fault("rounds/exchange.py", "self._goal = enough(", "self._goal = 1 + enough(",
          "a round waits for one update more than its goal"),
    Fault("rounds/transport.py", "quorum=max(0, self.quorum - updates), ", "",
          "updates accepted before do not count towards the quorum", ("rounds/test_exchange.py",)),
    Fault("rounds/exchange.py", "self._context.journal.accept(self._request.round, name, reply.update)", "pass",
          "an accepted update is not made durable", ("rounds/test_journal.py",)),
    Fault("rounds/buffer.py", "worker.state if missed else None, self", "None, self",
          "a stale update counts as one of the current state", ("rounds/test_buffer.py",)),
    Fault("rounds/buffer.py", "busy = self.pending.keys() | self._settled.keys()", "busy = self.pending.keys()",
          "a client is in a buffer twice", ("rounds/test_buffer.py",)),
    Fault("methods/method.py", "value.astype(np.float64) + discount * (end", "value.astype(np.float64) + 1.0 * (end",
          "a stale update counts in full", ("methods/test_stale_updates.py",)),
    Fault("methods/personal.py", "if not personal.keeps(name.partition(\"/\")[2])}", "}",
          "what stays with clients is averaged", ("methods/test_personal.py",)),
    Fault("methods/personal.py", "{**method.current(state), **mean}", "{**mean}",
          "the server loses what its clients keep", ("methods/test_personal.py",)),
    Fault("client/perform.py", "if not task.personal.keeps(name)}", "}",
          "what stays with a client leaves it", ("client/test_personal_training.py",)),
    Fault("client/personal_state.py", "if round < before}", "if round <= before}",
          "a round that is done again starts from its own end", ("client/test_personal_state.py",)),
    Fault("client/personal_state.py", "and state.client == client else None", "else None",
          "a client goes on from another's model", ("client/test_personal_state.py",)),
    Fault("client/personal_scoring.py", 'tensor * state.scale if name.endswith(".b")', 'tensor if name.endswith(".b")',
          "a client's own model is scored without its scale", ("client/test_personal_scoring.py",)),
    Fault("model/personal.py", "if steps % inner == 0:", "if steps == inner:",
          "w of pFedMe moves once and not after every mini-batch", ("model/test_personal.py",)),
    Fault("config/order_rules.py", "if keeps(name)):", "if False):",
          "a site takes an order for what stays there", ("config/test_personal_requests.py",)),
    Fault("store/orders.py", "or unsettled[client].update is not None:", "or False:",
          "the journal takes a second update for one order", ("store/test_orders.py",)),
    Fault("rounds/loop.py", "elif earlier.digests != digests:", "elif False:",
          "a round goes on with other assignments than the journal holds", ("rounds/test_journal.py",)),
    Fault("rounds/loop.py", "learned = context.planner.observe(learned, past)", "pass",
          "a resumed planner has forgotten the rounds before"),
    Fault("rounds/admission.py", "_require(own == base,", "_require(True,",
          "an update of another base is admitted"),
    Fault("rounds/admission.py", "_require(bound <= LARGEST,", "_require(True,",
          "factors whose product overflows are admitted"),
    Fault("rounds/influence.py", "multiple = max_norm or math.inf",
          "multiple = 2 * (max_norm or math.inf)",
          "the cap on norms is twice as high"),
    Fault("rounds/influence.py", "if not size.norm <= limit:", "if size.norm > limit:",
          "a norm that is no number is within every bound"),
    Fault("rounds/influence.py", "scales[name] ** 2 * count", "count",
          "the reach of b is taken without its scale"),
    Fault("rounds/weights.py", "median_low(sums.values())", "max(sums.values())",
          "the largest claim is the measure of what is too much"),
    Fault("rounds/weights.py", 'return (organisation, "") if organisation else',
          'return ("", name) if organisation else',
          "every client of an organisation has its whole cap"),
    Fault("rounds/loop.py", "interrupted.weights.get(client.name) or plain_weight", "None or plain_weight",
          "a resumed round counts what was enrolled", ("rounds/test_weights.py",)),
    Fault("rounds/exchange.py", "replace(bounded, weight=request.weights.get(name))", "bounded",
          "an update says itself how much it counts", ("rounds/test_weights.py",)),
    Fault("rounds/exchange.py", "bounded = request.bound(outcome, assignment)", "bounded = outcome",
          "an update that fits is taken whatever it changes", ("rounds/test_exchange.py",)),
    Fault("rounds/schedule.py", "for position in sorted(drawn.tolist())", "for position in drawn.tolist()",
          "a cohort is not sorted"),
    Fault("planning/planner.py", "(sqrt(rank) if rslora else rank)", "rank",
          "rsLoRA's scale is LoRA's"),
    Fault("planning/adaptive.py", "self.memory_gb is None or cost.memory_gb <= self.memory_gb", "True",
          "a planner asks for more memory than a device has"),
    Fault("planning/deadline.py", "np.lexsort((seconds, -quality), axis=1)",
          "np.lexsort((-quality, seconds), axis=1)",
          "the quickest setting wins over the best one"),
    Fault("planning/rewards.py", "- PRICE_OF_DELAY *", "+ PRICE_OF_DELAY *",
          "slow clients are rewarded"),
    Fault("planning/bandits.py", "deviation * sqrt(2 *", "deviation * sqrt(0 *",
          "arms that are hardly known are not tried"),
    Fault("planning/expgrad.py", "(score - learned.baseline) / client.arm_probability", "(score - learned.baseline)",
          "arms that are seldom drawn count too little"),
    Fault("search/steps.py", "math.ceil(len(done) / search.settings.reduction)",
          "len(done) // search.settings.reduction",
          "successive halving keeps too few"),
    Fault("search/steps.py", "return [*copying, *going_on]", "return [*going_on, *copying]",
          "a population copies models that have gone on already"),
    Fault("search/space.py", 'f"{key}#{attempt}" if attempt else key', '"x"',
          "all settings of a trial are drawn alike"),
    Fault("planning/s_ucb.py", "rewards[client] = gain / (1 + beside.delay)", "rewards[client] = gain",
          "the time of a client does not count in S-UCB"),
    Fault("devices/simulated_clock.py", "begin = now_s + first + compute + profile.overhead_s", "begin = now_s",
          "uploads start before the work is done"),
    Fault("simulation/process_pool.py", "elif now >= running.deadline:", "elif False:",
          "a client that hangs is never given up"),
    Fault("devices/traces.py", '"trace/noise", round, client)', '"trace/noise", round)',
          "all clients are slow in the same rounds"),
    Fault("devices/cost.py", "(4.0 + 8.0 * backward) * work.tokens", "work.tokens",
          "the operations of attention are counted too low"),
    Fault("client/worker_process.py", 'if spec["base"] not in ("", base.digest):', "if False:",
          "worker processes load another base"),
    Fault("deployment/coordinator.py", "accepted, ended = accepted_updates(run)", "accepted, ended = {}, 0",
          "a restarted server does not know which updates it has accepted"),
    # Recipes and plug-ins.
    Fault("config/plugins.py", "if not isinstance(loaded, kind):", "if False:",
          "a plug-in of the wrong type is used", ("plugins/test_entry_points.py",)),
    Fault("config/plugins.py", "if entry.name in own or entry.name in named:", "if entry.name in named:",
          "a package takes the name of a method of fedtune", ("plugins/test_entry_points.py",)),
    Fault("config/tables.py", "STRICT = ConfigDict(strict=True,", "STRICT = ConfigDict(strict=False,",
          "texts are taken for numbers in a recipe"),
    Fault("runs/verification.py", "if record.state_digest != expected:", "if False:",
          "round lines of other states pass the check of a run"),
    Fault("runs/verification.py", "if digests[number : number + 1] != [noted]:", "if False:",
          "losses and times in round lines may be changed", ("runs/test_verification.py",)),
    Fault("store/manifest.py", "        if actual != listed:", "        if False:",
          "a file of a result is not compared with its manifest", ("store/test_manifest.py",)),
    Fault("store/manifest.py", "whole = layout != FORMAT or encode(facts, listed) == data", "whole = True",
          "a manifest is not compared with its own digest", ("store/test_manifest.py",)),
    Fault("store/manifest.py", "if extra := sorted(present - opened.listed.keys()):", "if extra := []:",
          "files beside a result that are not listed pass", ("store/test_manifest.py",)),
    Fault("link/provenance.py", 'if party.state != "active":', "if False:",
          "what a revoked party has signed is verified", ("link/test_provenance.py",)),
    Fault("link/provenance.py", 'if party.role != "coordinator":', "if False:",
          "a client signs results", ("link/test_provenance.py",)),
    Fault("link/provenance.py", "if not party.not_before <= signed_at <= party.not_after:", "if False:",
          "results are signed before and after the signer was enrolled", ("link/test_provenance.py",)),
    Fault("link/provenance.py", "    opened.check()\n    return Provenance", "    return Provenance",
          "the files of a signed folder are not read", ("link/test_provenance.py",)),
    Fault("link/client/outbox.py", "        check(folder)\n", "",
          "a site takes a result without a look at its signature", ("link/client/test_client.py",)),
    Fault("runs/resume.py", "and start[key] != now[key]", "and False",
          "a run goes on over another base or other data"),
    # The wire.
    Fault("wire/codec.py", "if digest != header.digest:", "if False:",
          "the digest of a body is not compared"),
    Fault("wire/codec.py", "expect(len(data) <= limit_bytes,", "expect(True,",
          "an update may be of any size"),
    Fault("wire/codec.py", "local.rank_penalty, local.rank_decay = weight, decay",
          "local.rank_penalty, local.rank_decay = decay, weight",
          "weight and decay of HetLoRA's term are swapped"),
    Fault("wire/tensors.py", "expect(previous < name,", "expect(previous <= name,",
          "a tensor may come twice"),
    Fault("wire/settings.py", "getattr(operator, name) for", 'getattr(operator, name.replace("gt", "ge")) for',
          "a bound is off by one: zero is taken as a positive number"),
    Fault("wire/profile.py", "if sum(sizes) != message.parameters or 0 in sizes:", "if 0 in sizes:",
          "a profile's manifest may list other parameters"),
    # The store.
    Fault("store/files.py", "are on the disk.\"\"\"\n    os.fsync(descriptor)", "are on the disk.\"\"\"",
          "nothing is synced to the disk"),
    Fault("store/files.py", "            rename(temporary, path)\n        except BaseException:",
          "            path.write_bytes(data)\n            remove(temporary)\n        except BaseException:",
          "a file is not replaced in one step", ("test_crash.py",)),
    Fault("store/journal.py", "if number != n or prev != head:", "if number != n:",
          "the chain of the journal is not compared"),
    Fault("store/blobs.py", "if actual != name:", "if False:",
          "the digest of a state is not compared"),
    Fault("store/blobs.py", "files.sync_folder(target.parent)", "pass",
          "a blob's name does not last", ("test_crash.py",)),
    Fault("store/lock.py", "if try_lock(descriptor, fcntl.LOCK_EX):", "if True:",
          "two processes may write one run"),
    Fault("store/history.py", "if history.digests and state != history.digests[-1]:", "if False:",
          "a round may start from another state than the last"),
    Fault("store/run_journal.py", "current is None or current.number != round:", "current is None:",
          "an older round is taken for the interrupted one", ("test_crash.py",)),
    Fault("store/round_records.py", "if record.round != expected_round:", "if False:",
          "a gap between rounds is reported and resumed from"),
    Fault("store/typed_json.py", "if type(value) is kind:", "if isinstance(value, kind):",
          "true is taken for the number 1 in a record"),
    Fault("store/typed_json.py", "elif required:", "elif False:",
          "a record may lack what it must have"),
    Fault("store/peft.py", '"alpha_pattern": pattern,', '"alpha_pattern": {},',
          "an exported adapter of mixed ranks has wrong scales"),
    # The link between sites.
    Fault("link/pki/signing.py", "Ed25519PublicKey.from_public_bytes(public).verify(signature, pae(kind, payload))",
          "Ed25519PublicKey.from_public_bytes(public)", "a signature is not verified"),
    Fault("link/envelopes.py", "if header.author != author.name:", "if False:",
          "a member may sign in another's name"),
    Fault("link/pki/roster.py", "if now > new.valid_until:", "if False:",
          "an expired roster is taken"),
    Fault("link/pki/roster.py", "if new.version < current.version:", "if False:",
          "an older roster is taken back"),
    Fault("link/client/policy.py", "and demand.rank > policy.max_rank:", "and False:",
          "the site's largest rank is not asked for"),
    Fault("link/client/policy.py", "usage.day_bytes + num_bytes > policy.day_up_mib * MIB",
          "num_bytes > policy.day_up_mib * MIB",
          "what left today does not count"),
    Fault("link/server/replies.py", "if day_total > limit:", "if False:",
          "a client's daily quota is off"),
    Fault("link/server/replies.py", "if first != reply:", "if False:",
          "a second, different answer is given the first one's receipt"),
    Fault("link/server/server.py", "check_cipher_suites(SET_IN_TIME)", "pass",
          "a server starts that may speak TLS 1.2", ("link/test_tls.py",)),
    Fault("link/server/traffic.py", "if now - span.last < DAY_S)", "if True)",
          "bytes of the days before count today"),
    Fault("link/client/outbox.py", "make_durable(self.update)", "pass",
          "a reply is promised whose update may be lost"),
    Fault("link/client/backoff.py", "share * min(", "min(",
          "all clients come back at the same moment"),
    Fault("link/server/callers.py", 'if party.state != "active":', "if False:",
          "a revoked member may call"),
    Fault("link/server/callers.py", "if not self._is_known(caller, party):", "if False:",
          "an old certificate may call"),
    Fault("link/server/callers.py", "(entry.serial, entry.tls_key) == (caller.serial, caller.tls_key)",
          "entry.serial == caller.serial", "a renewed certificate counts for another key", ("link/test_delegated.py",)),
    Fault("link/pki/delegation.py", "min(delegation.not_after, until)", "until",
          "a registrar renews for longer than the CA has allowed"),
    Fault("live/server.py", "return host is not None and is_loopback(host)", "return True",
          "a page of another site may read the live page"),
    Fault("live/server.py", "return hmac.compare_digest(text.encode(), self.server.token.encode())", "return True",
          "any token opens the live page"),
    Fault("tracking/facts.py", "(holds_tables(value) or key in LISTS_FILES + NAMES_CLIENTS)", "holds_tables(value)",
          "a tracker learns the names of clients"),
    Fault("tracking/follow.py", 'ending = Ending("interrupted")', 'ending = Ending("finished")',
          "a run that was stopped is tracked as finished"),
    Fault("flower/stock_round.py", "if order.frozen and stated != order.frozen_digest:", "if False:",
          "a client that did not add the frozen change is summed up", ("flower/test_lora_strategy.py",)),
    Fault("client/own_trainer.py", "if hooks.terms and not watch.steps:", "if False:",
          "a trainer of its own leaves the terms of the objective out unnoticed", ("test_own_trainers.py",)),
    Fault("link/server/callers.py", "if now > end:", "if False:",
          "a certificate that has ended may call"),
    Fault("link/server/progress.py", "steps = self.done < said.done <=", "steps = self.done <= said.done <=",
          "what is said again is progress"),
    Fault("link/client/session.py", "> max(roster.version, self._asked_version)", "< 0",
          "a site keeps its old roster"),
    Fault("link/uploads.py", "if (actual := self._hash.digest()) != self._digest:",
          "if (actual := self._hash.digest()) and False:",
          "the digest of an uploaded part is not compared"),
    Fault("link/pki/enrollment.py", "if not is_own:", "if False:",
          "a certificate of another key is installed"),
    Fault("link/server/replies.py", "            base=task.header.base,\n", "",
          "an update that names another base enters the round"),
    Fault("link/client/training_jobs.py", "if violations:", "if False:",
          "the site's policy is not asked"),
    Fault("link/client/delivery.py", "if header.receipt.answer != reply:", "if False:",
          "a receipt of another reply is taken"),
    Fault("link/client/training_jobs.py", "if obstacle := self._device.obstacle():", "if obstacle := \"\":",
          "a device that its owner has paused trains all the same"),
    Fault("link/client/conditions.py", "while obstacle := self._conditions.obstacle():", "while obstacle := \"\":",
          "a training goes on while its machine may not work", ("link/client/test_training_server.py",)),
    Fault("link/client/conditions.py", "limit = most - TEMPERATURE_MARGIN_C if self._is_warm else most", "limit = most",
          "a machine at its temperature begins and stops with each reading"),
    Fault("link/client/pause.py", "if self.boot_id and self.boot_id == now.boot_id:", "if False:",
          "a clock that is set ends a pause"),
    Fault("link/client/pause.py", "files.write_private(state / OVER, order.id.encode())", "pass",
          "a pause that is over comes back with another clock"),
    Fault("link/client/bandwidth.py", "return max(0.0, -self._tokens / self._rate)", "return 0.0",
          "a site sends as fast as it can, whatever its limit"),
    Fault("link/client/channel.py", "return unlimited if max_down_kib_s is None", "return unlimited if True",
          "a limited download is received whole before it is read", ("link/client/test_bandwidth.py",)),
    Fault("link/client/socket_bytes.py", "SocketBytes(self._closed.up + sent", "SocketBytes(sent",
          "the bytes of connections before the last one are forgotten"),
    Fault("link/client/client.py", "raise fault from fault.__cause__", "raise fault from error",
          "a full disk is no longer known as the cause of a site's end", ("link/client/test_full_disk.py",)),
    Fault("link/server/receiving.py", "            work.result().close()\n", "            pass\n",
          "an upload that is cut while its file is opened leaves it open"),
    Fault("link/client/delivery.py", "durable.join()", "pass",
          "a reply is submitted as whole before it is on the disk"),
    Fault("link/pki/certificates.py", "return any(is_signed_by(parsed, anchor)",
          "return True or any(is_signed_by(parsed, anchor)",
          "a certificate of any CA is installed"),
    # Doors.
    Fault("flower/grid_transport.py", "if sent.client and name != sent.client:", "if False:",
          "a client may call itself by another's name"),
    Fault("cli/options.py", "raise typer.Exit(INTERRUPTED)", "raise typer.Exit(0)",
          "a command that was interrupted ends with success"),
    Fault("terminal/text.py", "not in HIDDEN or", "or",
          "a client's name may move the cursor of a terminal"),
    Fault("report/spread.py", "np.std(known, ddof=1)", "np.std(known)",
          "the deviation over seeds is that of a population"),
    # Devices: whose bundle is taken.
    Fault("edge/bundle.py", "signer = verify_folder(path, roster, now=now).signer.name", "signer = roster.federation",
          "a device takes a bundle with any signature"),
    Fault("edge/bundle.py", "path / manifests.SIGNATURE) or not unsigned):", "path / manifests.SIGNATURE)):",
          "a device takes a bundle without a signature"),
    Fault("edge/bundle.py", 'if (bank := table.get("bank")) != BANK:', 'if (bank := BANK) != BANK:',
          "a device takes a bundle for another bank"),
    Fault("report/protocols.py", "(cost <= budget)", "(cost <= budget + cost[1])",
          "a recipe may spend a round more than its budget"),
    Fault("report/robustness.py", 'if client.status != "unfit"', "if True",
          "clients that were never asked count as updates"),
    # Energy: what is counted, and what leaves.
    Fault("link/client/training_server.py", "if energy.send:", "if True:",
          "the joules of a machine leave a site that keeps them"),
    Fault("link/client/energy_meter.py", "% limit", "% 1e99",
          "a counter of energy that began again takes the range off"),
    Fault("devices/simulated_clock.py", "work_s=compute + profile.overhead_s", "work_s=compute",
          "a device that loads a model takes no energy"),
    # Graphs for devices: what they compute, and what a device lets in.
    Fault("model/onnx_graph.py", "if unread := sorted(names_of(weights) - {*body.used, *head.used}):",
          "if unread := ():", "a graph leaves out a tensor of its base"),
    Fault("model/onnx_config.py", "any(type(value) is type(off) and value == off for off in OFF)", "True",
          "a key of config.json that nothing is known of is passed over"),
    Fault("model/onnx_weights.py", "np.finfo(np.float32).tiny)", "np.finfo(np.float32).smallest_subnormal)",
          "codes in 8 bits wrap around for the smallest weights"),
    Fault("edge/onnx_file.py", 'if place.get("location") != weights:', 'if not place.get("location"):',
          "a graph reads any file of the device"),
    Fault("edge/onnx_file.py", "if operator in ROUNDING:", "if False:",
          "a graph that rounds activations is not named", ("edge/test_onnx_file.py",)),
    Fault("edge/onnx_runtime.py", "squares if transposed else squares.transpose(0, 2, 1)", "squares",
          "a device moves its layers by M transposed"),
    Fault("edge/onnx_runtime.py", 'ordinal = moved.get(f"{name}.weight")',
          'ordinal = self._bundle.manifest.ordinals[f"{name}.weight"]', "layers that a recipe leaves out are moved"),
    Fault("runs/edge_bundle.py", "if not worst <= TOLERANCE:", "if worst > 1e9:",
          "a bundle is signed whose losses are others than torch's"),
    Fault("runs/edge_bundle.py", "if not abs(plus - minus) <= SMALL_DIFFERENCE:", "if False:",
          "a bundle is signed whose losses jump with the smallest step"),
    # GGUF files: the rows of queries and keys, float32 inputs, and what would end the process.
    Fault("edge/gguf_file.py", "self._header, place))) != kind:", "self._header, place))) < 0:",
          "a value of another format ends the process", ("edge/test_gguf_decoder.py",)),
    Fault("edge/gguf_decoder.py", "turned not in (0, size),", "False,",
          "a device turns all of a head where the file says a part"),
    Fault("edge/gguf_runtime.py", "return interleave(rows, heads) if heads and", "return rows if heads and",
          "a device moves rows of queries and keys in transformers' order"),
    Fault("edge/gguf_forward.py", "if self.expand and tensor.kind != F32:", "if False:",
          "a device rounds the inputs of quantised layers", ("edge/test_gguf_forward.py",)),
    Fault("edge/gguf_forward.py", "if status != 0 or not graph.is_complete:", "if status != 0:",
          "a product that failed is read as a result"),
    Fault("edge/gguf_decoder.py", "if strange := sorted(file.tensors.keys() - wanted.keys()):", "if strange := ():",
          "a forward pass leaves out a tensor of its file"),
    Fault("edge/gguf_runtime.py", "if chosen in self._eos_ids:", "if False:", "text goes on after its end"),
    Fault("edge/ggml.py", "if version != VERSION:", "if False:", "another version of the library is called"),
    Fault("edge/site.py", "remember(state, CurrentModel(ledger, tuple(trainable)))", "pass",
          "a device does not store the model that it was sent"),
    Fault("edge/site.py", "if request.base != bundle.base_digest:", "if False:",
          "a device scores a model of another base"),
    Fault("edge/site.py", "replicas.store(stored.ledger)", "pass",
          "a device that restarts has to be sent everything again"),
    Fault("edge/base.py", 'if model.dtype not in ("auto", own):', "if False:",
          "a device computes in another number format than its file says"),
    Fault("edge/recipe_check.py", "if method.bank != BANK:", "if False:",
          "a device takes part in a run of another bank"),
    Fault("edge/memory.py", "max(1, min(moves, MAX_TOKENS // max(1, once)))", "moves",
          "a device refuses steps that fit into its memory"),
    Fault("edge/memory.py", "if free is not None and missing > free:", "if False:",
          "a device loads what does not fit into its memory"),
    Fault("edge/current_model.py", "data[len(MAGIC) : start] != hashlib.sha256(body).digest()", "False",
          "a device talks with a damaged model"),
    Fault("probing/measure.py", "position.move(seed, scalar << probe.shift)", "position.move(seed, scalar)",
          "a client moves by less than it sends"),
    Fault("link/client/training_server.py", "got {type(error).__name__}; this site's own",
          "got {error}; this site's own",
          "an error quotes a site's data"),
    Fault("deployment/join.py", "        suits(accepted_recipe(greeting.recipe), client)\n    return agree",
          "        pass\n    return agree",
          "a device takes part in a run that it cannot do", ("cli/test_edge_join.py",)),
    # Evaluation: what is asked, how an answer is read, and how sure a score is.
    Fault("evaluation/intervals.py", "+ Z**2 / (4 * n**2))", ")",
          "Wilson's interval of no hits has a width of 0"),
    Fault("evaluation/intervals.py", "up, down = gained + 0.5, lost + 0.5", "up, down = gained, lost",
          "two models that answer a few items alike are surely equal"),
    Fault("evaluation/gsm8k.py", "decimal(matches[-1])", "decimal(matches[0])",
          "the first number of an answer counts, not the last"),
    Fault("evaluation/multiple_choice.py", '[f" {letter}" for letter in LETTERS]', "list(LETTERS)",
          "the bare letter is scored where the shots write a blank before it"),
    Fault("evaluation/multiple_choice.py", "[len(option) - 1 for", "[1 for",
          "acc_norm is not divided by the option's length"),
    Fault("evaluation/multiple_choice.py", "        if len(own) < shots:", "        if False:",
          "shots that a subject lacks are dropped in silence"),
    Fault("model/answers.py", "(len(part[0]) - len(ids))", "0",
          "outputs of padding count as those of a shorter text"),
    Fault("model/answers.py", "longest - len(prompt) :], mask", ": len(prompt)], mask",
          "prompts of a batch are padded between prompt and answer"),
    Fault("evaluation/confined.py", "    call(libc.capset(ctypes.byref(header), ctypes.byref(none)))", "",
          "a program may make the file system writable again", ("evaluation/test_sandbox.py",)),
    Fault("evaluation/confined.py", "NEW_USER | NEW_NET |", "NEW_USER |",
          "a generated program reaches the network", ("evaluation/test_sandbox.py",)),
    Fault("evaluation/sandbox.py", "if word == outcome:", "if outcome in word:",
          "what a program prints may count as its outcome"),
    Fault("runs/code_scores.py", "len(outcomes) - outcomes.count(\"memory\")", "len(outcomes)",
          "a program that runs out of memory counts as wrong"),
    Fault("runs/own_scores.py", "return [new - old for", "return [old - new for",
          "an improvement of the clients' mean is shown as a loss"),
    Fault("runs/own_scores.py", "sum(total for total, _ in own) / sum(count for _, count in own)",
          "sum(total / count for total, count in own) / len(own)",
          "a client's loss weighs its rows alike, whatever they hold"),
    Fault("runs/task_target.py", "or is_adapter(folder)", "",
          "a folder with an adapter is scored as the model beside it", ("runs/test_task_scores.py",)),
    Fault("runs/task_scores.py", "if any(long) and (all(long) or not skip_long):", "if False:",
          "items that do not fit are left out in silence"),

    # Offsite tuning: which blocks an emulator holds, and where tuned ends belong.
    Fault("model/emulator_facts.py", "{facts.blocks}.{facts.layers[int(number)]}", "{facts.blocks}.{int(number)}",
          "tuned ends are put back at the emulator's numbers", ("runs/test_plug_back.py",)),
    Fault("model/emulator_facts.py", "if digest and facts.digests.get(dtype) != digest:", "if False:",
          "an emulator.json of other weights passes", ("runs/test_emulator.py",)),
    Fault("model/emulator_facts.py", "places = [i * (middle - 1) // max(1, k - 1)", "places = [i * middle // k",
          "floor spreads blocks otherwise than FederatedScope-LLM"),
    Fault("model/emulator.py", '.clone() if target.startswith(f"{name}.") else tensor.detach()', "",
          "an emulator's blocks share the memory of the base's"),
    Fault("model/emulator.py", "        if name.startswith(skipped):", "        if True:",
          "an emulator with other ends than the true base's passes", ("runs/test_plug_back.py",)),
    Fault("model/distill.py", "blocks[len(blocks) - back - 1]", "blocks[len(blocks) - 1]",
          "the last block's output is distilled in place of the middle's"),
    Fault("model/distill.py", "values[name].grad = parameter.grad", "values[name].grad = None",
          "projected middles are not trained"),
    Fault("model/blocks.py", "return (hidden, *output[1:]) if isinstance(output, tuple) else hidden", "return output",
          "a skipped block computes all the same"),
    Fault("runs/plug_back.py", "if true.digest != facts.base_digest:", "if False:",
          "tuned ends are put into another base"),
    Fault("runs/plug_back.py", 'return scores[EMULATOR]["loss"] <= scores', 'return scores[EMULATOR]["loss"] < -scores',
          "no warning of an emulator that gives the model away", ("cli/test_offsite.py",)),
    Fault("runs/emulator.py", ".items() if key not in left_out}", ".items()}",
          "an emulator of a classifier carries a head that the base lacks"),
    Fault("cli/offsite.py", "if text is None and value is not None:", "if False:",
          "settings of a distillation without text pass unseen"),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of one fault."""

    file: str
    what: str
    caught: bool
    by: str
    """The first test that failed; or how else the run ended."""
    stage: str
    """`narrow` or `fast tier`: the tests that ran last."""
    seconds: float


class Copy:
    """A copy of the tracked files in which tests run, alone."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)

    def pytest(self, tests: Sequence[str], *, timeout_s: float) -> tuple[int | None, str]:
        """Run tests up to the first failure; return pytest's exit status, None after so many seconds, and its text."""
        env = {
            "FEDTUNE_SHARED": str(ROOT.parent / "shared"),
            **os.environ,
            "PYTHONPATH": str(self.root),  # before an editable install, which names the original
            "PYTHONDONTWRITEBYTECODE": "1",  # two faults of one size within a second would share their bytecode
            "OMP_NUM_THREADS": "1",
        }
        # Left out: the check that every fault can be planted fails wherever one is.
        ignored = "--ignore=tests/test_mutations.py"
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", ignored, *tests]
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                command, cwd=self.root, env=env, stdout=output, stderr=output, start_new_session=True
            )
            status: int | None
            try:
                status = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                if process.poll() is None:  # or it was interrupted
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            output.seek(0)
            return status, output.read().decode(errors="replace")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="faults whose file or description holds this text")
    parser.add_argument("--check", action="store_true", help="only check that every fault can be planted")
    parser.add_argument("--narrow", action="store_true", help="leave out the whole fast tier")
    parser.add_argument("--trust", action="store_true", help="do not run the narrow tests without a fault first")
    parser.add_argument("--jobs", type=int, default=2, help="faults at the same time, each in a copy of its own")
    parser.add_argument(
        "--timeout",
        type=float,
        default=300.0,
        help="seconds for the narrow tests; six times as many for the whole fast tier",
    )
    parser.add_argument("--survivors", type=int, default=2, help="faults that may survive")
    parser.add_argument("--json", type=Path, help="write the outcomes to this file")
    args = parser.parse_args()
    faults = [fault for fault in FAULTS if args.only in fault.file or args.only in fault.what]
    if problems := [problem for fault in FAULTS if (problem := unplantable(fault))]:
        print("\n".join(problems), file=sys.stderr)
        return 2
    print(f"{len(FAULTS)} faults in {len({fault.file for fault in FAULTS})} modules can be planted")
    if args.check:
        return 0
    with tempfile.TemporaryDirectory(prefix="fedtune-mutations-") as folder:
        copies = SimpleQueue[Copy]()
        for number in range(args.jobs):
            copies.put(Copy(Path(folder) / str(number) / "fedtune-source"))

        checked = set[tuple[str, ...]]()

        def work(fault: Fault) -> Outcome:
            copy = copies.get()
            try:
                if not args.trust and (tests := tuple(narrow(fault))) not in checked:
                    check_healthy(copy, tests, timeout_s=args.timeout)
                    checked.add(tests)
                outcome = plant(fault, copy, whole=not args.narrow, timeout_s=args.timeout)
            finally:
                copies.put(copy)
            print(
                f"{'caught  ' if outcome.caught else 'SURVIVED'} {outcome.seconds:6.1f} s  {fault.file}: {fault.what}"
                f" [{outcome.by}]",
                flush=True,
            )
            return outcome

        with ThreadPoolExecutor(args.jobs) as pool:
            outcomes = list(pool.map(work, faults))
    survivors = [outcome for outcome in outcomes if not outcome.caught]
    print(
        f"{len(outcomes) - len(survivors)} of {len(outcomes)} faults were caught; not caught:"
        + " none" * (not survivors)
    )
    for outcome in survivors:
        print(f"  {outcome.file}: {outcome.what} (after: {outcome.stage})")
    if args.json:
        args.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    return int(len(survivors) > args.survivors)


def unplantable(fault: Fault) -> str:
    """Return why a fault cannot be planted; empty if it can."""
    path = ROOT / "fedtune" / fault.file
    if not path.is_file():
        return f"{fault.file}: expected a file of fedtune/; got none ({fault.what})"
    text = path.read_text()
    if (count := text.count(fault.old)) != 1:
        return f"{fault.file}: expected this text once; got it {count} times: {fault.old!r} ({fault.what})"
    if missing := [test for test in narrow(fault) if not (ROOT / test).exists()]:
        return f"{fault.file}: expected tests; got none at {', '.join(missing)}; name them in the fault"
    try:
        ast.parse(text.replace(fault.old, fault.new))
    except SyntaxError as error:
        return f"{fault.file}: expected Python after the change; got {error} ({fault.what})"
    return ""


def narrow(fault: Fault) -> Sequence[str]:
    """Return the tests of a fault's module: the file that mirrors it, or its folder's, and those that it names."""
    mirror = Path(fault.file).with_name(f"test_{Path(fault.file).name}")
    if not (ROOT / "tests" / mirror).exists() and mirror.parent.name:
        mirror = mirror.parent.with_name(f"test_{mirror.parent.name}.py")
    return [f"tests/{test}" for test in (mirror, *fault.tests)]


def check_healthy(copy: Copy, tests: Sequence[str], *, timeout_s: float) -> None:
    """Check that tests pass without a fault: otherwise they would catch everything."""
    status, text = copy.pytest(tests, timeout_s=timeout_s)
    if status != 0:
        raise SystemExit(
            f"{text[-3000:]}\nexpected {', '.join(tests)} to pass without a fault; got exit status {status}; "
            "mend them first"
        )


def plant(fault: Fault, copy: Copy, *, whole: bool, timeout_s: float) -> Outcome:
    """Run the tests with a fault in place, the narrow ones first, and take it out again."""
    path, began = copy.root / "fedtune" / fault.file, time.perf_counter()
    text = path.read_text()
    path.write_text(text.replace(fault.old, fault.new))
    try:
        stage = "narrow"
        by, caught = verdict(*copy.pytest(narrow(fault), timeout_s=timeout_s))
        if whole and not caught:
            stage = "fast tier"
            by, caught = verdict(*copy.pytest((), timeout_s=6 * timeout_s))
    finally:
        path.write_text(text)
    return Outcome(fault.file, fault.what, caught, by, stage, round(time.perf_counter() - began, 1))


def verdict(status: int | None, output: str) -> tuple[str, bool]:
    """Return what a run of tests says, and whether it noticed the fault."""
    first = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    if status is None:
        return "did not end in time", True
    if status in (1, 2):  # a test failed; a file could not be collected
        return first[1] if first else f"exit status {status}", True
    if status == 0:
        return "all tests passed", False
    if status < 0:
        return f"killed by signal {-status}", True
    raise SystemExit(f"{output[-3000:]}\nexpected tests to run; got pytest's exit status {status}")


if __name__ == "__main__":
    sys.exit(main())
