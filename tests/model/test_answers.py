from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from fedtune.data.encode import Example
from fedtune.data.prompts import open_ids
from fedtune.errors import ConfigError
from fedtune.model.answers import Continuation, before_stop, continuation, continuations, log_likelihoods, losses
from fedtune.model.evaluate import continue_text, likelihood
from tests.model.conftest import Loader

PROMPTS = ("the quick brown", "the dog sleeps and the lazy fox", "jumps")


def plain(base: object, answer: Continuation) -> float:
    """Return the log-likelihood by one forward pass over the whole text."""
    ids = torch.tensor([[*answer.prompt, *answer.answer]])
    logs = torch.log_softmax(base.model(ids).logits[0].double(), -1)  # type: ignore[attr-defined]
    places = range(len(answer.prompt), ids.shape[1])
    return sum(logs[place - 1, ids[0, place]].item() for place in places)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("batch", [1, 2, 8])
@torch.inference_mode()
def test_log_likelihoods_are_those_of_whole_texts(loaded: Loader, name: str, batch: int) -> None:
    base = loaded(name, targets=("all-linear",))
    options = [" dog", " fox jumps over", " lazy dog, and the dog sleeps over the brown fox", " a"]
    answers = [continuation(base, prompt, option) for prompt in PROMPTS for option in options]
    done: list[int] = []
    scores = log_likelihoods(base.model, base, answers, batch=batch, progress=done.append)
    assert scores == pytest.approx([plain(base, answer) for answer in answers], abs=1e-4)
    assert done[-1] == len(answers)


def test_options_that_read_the_same_text_cost_one_forward_pass(loaded: Loader) -> None:
    base = loaded()
    calls: list[tuple[int, ...]] = []
    hook = base.model.register_forward_pre_hook(
        lambda module, args, given: calls.append(given["input_ids"].shape), with_kwargs=True
    )
    answers = [Continuation((1, 7, 8), (token,)) for token in range(10, 30)]
    log_likelihoods(base.model, base, answers, batch=4)
    hook.remove()
    assert calls == [(1, 3)]


def test_the_blank_before_an_answer_is_a_part_of_its_token(loaded: Loader) -> None:
    base = loaded()
    answer = continuation(base, "the quick brown", " fox")
    assert base.tokenizer.decode(answer.answer) == " fox"
    assert [*answer.prompt] == list(open_ids(base.tokenizer, "the quick brown", special=True))


@torch.inference_mode()
def test_losses_add_up_to_the_loss_of_all(loaded: Loader, examples: Callable[[int], Sequence[Example]]) -> None:
    base, rows = loaded(), examples(7)
    parts = losses(base.model, base, rows, batch=3)
    whole = likelihood(base.model, base, rows, batch=2)
    assert sum(count for _, count in parts) == whole["tokens"]
    assert sum(total for total, _ in parts) / whole["tokens"] == pytest.approx(whole["loss"], rel=1e-5)
    alone = losses(base.model, base, rows[2:3], batch=1)
    assert parts[2][0] == pytest.approx(alone[0][0], rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.inference_mode()
def test_greedy_answers_of_a_batch_are_those_of_each_prompt(loaded: Loader, name: str) -> None:
    base = loaded(name, targets=("all-linear",))
    prompts = [open_ids(base.tokenizer, prompt, special=True) for prompt in PROMPTS]
    done: list[int] = []
    together = continuations(base.model, base, prompts, new_tokens=6, batch=3, progress=done.append)
    assert list(together) == [continue_text(base.model, base, ids, new_tokens=6) for ids in prompts]
    assert done == [3]
    assert together == continuations(base.model, base, prompts, new_tokens=6, batch=1)


@torch.inference_mode()
def test_an_answer_ends_at_a_stop_text_without_what_follows(loaded: Loader) -> None:
    base = loaded()
    prompts = [open_ids(base.tokenizer, prompt, special=True) for prompt in PROMPTS]
    texts = continuations(base.model, base, prompts, new_tokens=12, batch=3)
    stop = texts[0][3:5]
    ended = continuations(base.model, base, prompts, new_tokens=12, batch=3, stop=[stop])
    assert list(ended) == [before_stop(text, [stop]) for text in texts]
    assert stop not in ended[0]
    assert before_stop("a b c", ["c", "b"]) == "a "


@torch.inference_mode()
def test_sampled_answers_depend_on_their_seed_alone(loaded: Loader) -> None:
    base = loaded()
    prompts = [open_ids(base.tokenizer, "the", special=True)] * 3

    def drawn(seed: int) -> Sequence[str]:
        return continuations(base.model, base, prompts, new_tokens=8, batch=2, temperature=1.0, seed=seed)

    first = drawn(0)
    assert first == drawn(0) != drawn(1)
    assert len(set(first)) == 3


def test_a_model_whose_outputs_are_no_numbers_is_never_scored(
    loaded: Loader, examples: Callable[[int], Sequence[Example]]
) -> None:
    base = loaded()
    with torch.no_grad():
        next(base.model.parameters()).mul_(float("nan"))
    ids = open_ids(base.tokenizer, "the quick", special=True)
    # The option "A" would be the most likely one of every question.
    with pytest.raises(ConfigError, match="the model: expected log-probabilities that are numbers; got NaN"):
        log_likelihoods(base.model, base, [continuation(base, "the quick", " fox")], batch=1)
    with pytest.raises(ConfigError, match="got NaN"):
        losses(base.model, base, examples(2), batch=2)
    for temperature in (0.0, 0.8):
        with pytest.raises(ConfigError, match="got NaN"):
            continuations(base.model, base, [ids], new_tokens=2, batch=1, temperature=temperature)
