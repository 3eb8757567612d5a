"""What a recipe asks clients to score of models of their own, the same for the server and for a site's consent."""

from __future__ import annotations

from dataclasses import replace

from fedtune.config.recipe import Recipe, largest_rank, planned_training
from fedtune.messages import PersonalRequest
from fedtune.planning.planner import lora_scale, optimizer_steps
from fedtune.seeds import derive


def personal_request(recipe: Recipe, client: str, num_examples: int, round: int) -> PersonalRequest | None:
    """Return which model of its own a client scores after a round; None where it has none, as before round 1."""
    if recipe.personal is None or round == 0:
        return None
    personal = recipe.personal.in_full()
    if personal.has_state:
        return PersonalRequest(personal)
    _, training = planned_training(recipe, client)
    steps = personal.steps or optimizer_steps(training, num_examples)
    rate = personal.rate or training.learning_rate
    return PersonalRequest(
        personal,
        training=replace(training, steps=steps, epochs=None, learning_rate=rate, proximal=0.0),
        # Of the global model's rank, which is the largest of all clients'.
        scale=lora_scale(largest_rank(recipe), recipe.adapter.alpha, rslora=recipe.adapter.rslora),
        # The A of this method is the same for all and is not trained.
        train="b" if recipe.method.name == "ffa" else "ab",
        seed=derive(recipe.seed, "finetune", round, client),
    )
