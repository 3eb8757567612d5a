"""Scores of a base with an adapter on examples: loss and perplexity, accuracy, and generated answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedtune.data.encode import Example
from fedtune.lora.adapter import Adapter
from fedtune.messages import Preference
from fedtune.model.base import Base
from fedtune.model.batches import collate
from fedtune.model.lora import with_adapters
from fedtune.model.loss import summed_loss
from fedtune.model.preference import preference_scores, reference_batches
from fedtune.probing.scores import Metrics, by_length, likelihood_scores
from fedtune.tensors import Tensors


def evaluate(
    base: Base,
    adapter: Adapter,
    saved: Tensors,
    groups: Mapping[str, Sequence[Example]],
    *,
    batch: int,
    generate: int = 0,
    new_tokens: int = 64,
    preference: Preference | None = None,
) -> Mapping[str, Metrics]:
    """Score one global model on several groups of examples; the adapter is attached once.

    Causal models: `loss` (nats per token that counts), `perplexity`, `bits_per_character` (over the characters of the
    text that counts), and for the first `generate` examples `rouge_l` (F1) and `exact_match` of greedy answers.
    Classification: `loss` (nats per example), `accuracy`, `macro_f1`. With `preference`, of rows with rejected answers,
    those of `preference_scores` in place of the likelihood's. Always `examples`. A group without examples is left out.
    """
    groups = {name: examples for name, examples in groups.items() if examples}
    # Attaching adapters costs more than a small round; a round without scores asks for none.
    if not groups:
        return {}
    pairs = reference_batches(base, groups, preference, batch=batch) if preference else {}
    with with_adapters(base, frozen=adapter, saved=saved) as model, torch.inference_mode():
        scores = {}
        for name, examples in groups.items():
            if base.task == "classification":
                scores[name] = classify(model, base, examples, batch=batch)
            else:
                own = preference_scores(model, pairs[name]) if preference else None
                scores[name] = {
                    **(own or likelihood(model, base, examples, batch=batch)),
                    **(answers(model, base, examples[:generate], new_tokens=new_tokens) if generate else {}),
                }
        return scores


def likelihood(model: Any, base: Base, examples: Sequence[Example], *, batch: int) -> Metrics:
    """Return the scores of a causal model that follow from its loss; see `evaluate`."""
    total, tokens = 0.0, 0
    for positions in by_length(examples, batch):
        rows = collate([examples[i] for i in positions], base)
        total += summed_loss(model, rows, task="causal").item()
        tokens += rows.count
    return likelihood_scores(total, tokens, examples)


def classify(model: Any, base: Base, examples: Sequence[Example], *, batch: int) -> Metrics:
    """Return the scores of a classifier; see `evaluate`."""
    total, predicted = 0.0, np.zeros(len(examples), np.int64)
    for positions in by_length(examples, batch):
        rows = collate([examples[i] for i in positions], base)
        # In float32: bfloat16 resolves no more than 0.016 near a loss of 3.
        logits = model(**rows.inputs).logits.float()
        total += torch.nn.functional.cross_entropy(logits, rows.labels, reduction="sum").item()
        predicted[list(positions)] = logits.argmax(-1).cpu().numpy()
    truth = np.array([example.labels for example in examples])
    return {
        "loss": total / len(examples),
        "accuracy": float(np.mean(truth == predicted)),
        "macro_f1": macro_f1(truth, predicted),
        "examples": len(examples),
    }


def macro_f1(truth: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
    """Return the mean F1 over the classes that occur in the truth or the answers, as scikit-learn counts them."""
    classes = np.union1d(truth, predicted)
    hits = np.array([np.sum((truth == one) & (predicted == one)) for one in classes])
    sizes = np.array([np.sum(truth == one) + np.sum(predicted == one) for one in classes])
    return float(np.mean(2 * hits / sizes))


def answers(model: Any, base: Base, examples: Sequence[Example], *, new_tokens: int) -> Metrics:
    """Return scores of greedy answers to the examples' prompts against their references; see `evaluate`."""
    prompts = [example for example in examples if example.reference]
    if not prompts:
        return {}
    generated = [
        continue_text(model, base, example.input_ids[: example.prompt_tokens].tolist(), new_tokens=new_tokens)
        for example in prompts
    ]
    rouge = [rouge_l(example.reference, answer) for example, answer in zip(prompts, generated, strict=True)]
    exact = [
        " ".join(ex.reference.split()) == " ".join(answer.split())
        for ex, answer in zip(prompts, generated, strict=True)
    ]
    return {"rouge_l": float(np.mean(rouge)), "exact_match": float(np.mean(exact)), "generated": len(prompts)}


def rouge_l(reference: str, answer: str) -> float:
    """Return the F1 of the longest common subsequence of the words, unstemmed, of an answer and its reference.

    Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3.1, with beta 1; words are runs of the
    letters a to z and digits in lower case, as the package rouge-score divides them.
    """
    truth, words = (re.findall("[a-z0-9]+", text.lower()) for text in (reference, answer))
    shared = longest_common(truth, words)
    if not shared:
        return 0.0
    precision, recall = shared / len(words), shared / len(truth)
    return 2 * precision * recall / (precision + recall)


def longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence.

    >>> longest_common("the dog sleeps".split(), "the old dog".split())
    2
    """
    lengths = [0] * (len(second) + 1)  # of the prefix of `first` that was read, with every prefix of `second`
    for word in first:
        diagonal = 0
        for place, other in enumerate(second):
            above = lengths[place + 1]
            lengths[place + 1] = diagonal + 1 if word == other else max(above, lengths[place])
            diagonal = above
    return lengths[-1]


def continue_text(model: Any, base: Base, ids: Sequence[int], *, new_tokens: int, streamer: Any | None = None) -> str:
    """Return the greedy continuation of the tokens, without the tokens; without tokens that of the start of a text.

    Args:
        model: the base's, with or without an adapter.
        base: its tokenizer and limits.
        ids: the prompt; of one that is too long, the end.
        new_tokens: length of the continuation at most.
        streamer: receives the tokens as they are generated, as transformers' generate hands them on.
    """
    limit = base.positions
    new_tokens = min(new_tokens, limit - 1)
    first = base.tokenizer.bos_token_id
    tokens = list(ids) or [base.pad_id if first is None else first]
    # The end of a prompt that is too long: an answer must fit within the positions too.
    prompt = torch.tensor([tokens[-(limit - new_tokens) :]], device=base.device)
    out = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=base.pad_id,
        streamer=streamer,
    )
    text: str = base.tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
    return text
