"""A run as a submission to the FlowerTune LLM leaderboard: the adapter, a project file, and a page with its numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedtune.config import Recipe, render
from fedtune.config.render import toml
from fedtune.errors import ConfigError, Fault
from fedtune.lora.adapter import Adapter
from fedtune.lora.virtual_tokens import are_virtual
from fedtune.rounds.record import RoundRecord
from fedtune.rounds.schedule import cohort_size
from fedtune.store import peft
from fedtune.store.files import fill, new_folder
from fedtune.tensors import Tensors

BUDGET_MB = 200_000
"""What a submission may send in all, both ways, in MB of 1,024² bytes: so the template's tracker counts."""
CLIENTS, SHARE, DATA = 20, 0.1, "vicgalle/alpaca-gpt4"
"""The rules of the general-NLP track: equal random parts, the share of them in a round, and the data set."""
OLDEST_KEYS = frozenset(
    {
        *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"),
        *("r", "target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "modules_to_save"),
        *("init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    }
)
"""What PEFT 0.6.2 takes in adapter_config.json: it is pinned where submissions are scored, and fails on other keys."""


@dataclass(frozen=True)
class Submission:
    """What is known of a run that is submitted."""

    recipe: Recipe
    records: tuple[RoundRecord, ...]
    """Of its rounds, round 0 first."""
    clients: int
    origin: Mapping[str, Any]
    """Of its result: digests, versions."""

    @property
    def rounds(self) -> int:
        return self.records[-1].round

    @property
    def megabytes(self) -> float:
        """MB (1,024² bytes) that all messages of all rounds took, down and up."""
        return sum(record.bytes_down + record.bytes_up for record in self.records) / 2**20


def write_submission(
    target: Path, adapter: Adapter, saved: Tensors, about: peft.Target, submission: Submission
) -> Path:
    """Write the folder of a submission, and return it: `peft_N/`, pyproject.toml, recipe.toml and README.md.

    No path of this machine is written: a base or data in a folder are named by the folder's last part.

    Raises:
        ConfigError: if the run trains virtual tokens, which the leaderboard's loader does not read.
    """
    if are_virtual(saved):
        hint = "write them with --form peft"
        raise ConfigError(Fault("form", "a run of adapters", "'flowertune' of a run of virtual tokens", hint))
    public = public_recipe(submission.recipe)
    named = replace(submission, recipe=public)
    with new_folder(target) as folder:
        inner = folder / f"peft_{submission.rounds}"
        inner.mkdir()
        peft.put(inner, adapter, saved, replace(about, base=public.model.base))
        config = json.loads((inner / peft.CONFIG).read_text(encoding="utf-8"))
        settings = {key: value for key, value in config.items() if key in OLDEST_KEYS}
        fill(inner / peft.CONFIG, (json.dumps(settings, indent=1) + "\n").encode())
        fill(folder / "recipe.toml", render(public).encode())
        fill(folder / "pyproject.toml", project_text(named).encode())
        fill(folder / "README.md", page_text(named, r=settings["r"]).encode())
    return target


def public_recipe(recipe: Recipe) -> Recipe:
    """Return a recipe whose local folders and files are named by their last part."""
    data, start = recipe.data, recipe.adapter.start
    test = None if data.test is None else last_part(data.test)
    file = None if data.split.file is None else last_part(data.split.file)
    return replace(
        recipe,
        model=replace(recipe.model, base=last_part(recipe.model.base)),
        adapter=recipe.adapter if start is None else replace(recipe.adapter, start=last_part(start)),
        data=replace(data, source=last_part(data.source), test=test, split=replace(data.split, file=file)),
    )


def last_part(name: Any) -> Any:
    """Return the last part of an absolute path; a hub name and a relative path as they are."""
    if not isinstance(name, str):
        return tuple(map(last_part, name))
    return Path(name).name if Path(name).is_absolute() else name


def project_text(submission: Submission) -> str:
    """Return the project file: a Flower app of fedtune with the recipe inside, and the template's keys beside it."""
    recipe = submission.recipe
    size = {"nf4": 4, "int8": 8}.get(recipe.model.dtype, 0)
    config = {
        "num-server-rounds": recipe.rounds.count,
        "model.name": recipe.model.base,
        "model.quantization": size,
        "model.lora.peft-lora-r": recipe.adapter.rank,
        "model.lora.peft-lora-alpha": str(recipe.adapter.alpha),
        "train.seq-length": recipe.data.max_tokens,
        "strategy.fraction-fit": cohort_size(submission.clients, recipe.rounds.cohort) / submission.clients,
        "static.dataset.name": dataset_of(recipe),
    }
    lines = [f"{key} = {toml(value)}" for key, value in config.items()]
    # As its own lines where TOML can hold it so: a reader compares it with recipe.toml.
    text = render(recipe)
    lines.append(f"recipe = {toml(text)}" if "'''" in text else f"recipe = '''\n{text}'''")
    return f"""[project]
name = {toml(recipe.name)}
version = "1.0.0"
description = {toml(f"Federated fine-tuning of {recipe.model.base} with fedtune.")}
dependencies = ["fedtune=={version("fedtune")}"]

[tool.flwr.app]
publisher = "your-flower-name"
fab-include = ["pyproject.toml"]

[tool.flwr.app.components]
serverapp = "fedtune.cli.flower_server:app"
clientapp = "fedtune.cli.flower_client:app"

[tool.flwr.app.config]
{chr(10).join(lines)}
"""


def dataset_of(recipe: Recipe) -> str:
    source = recipe.data.source
    return source if isinstance(source, str) else ", ".join(source)


def page_text(submission: Submission, *, r: int) -> str:
    """Return README.md: how it was trained, what it sent, whether it keeps the rules, and where scores are entered."""
    recipe, rounds = submission.recipe, submission.rounds
    base, data = recipe.model.base, dataset_of(recipe)
    command = f"""python eval.py --base-model-name-path={base} --peft-path=peft_{rounds} --run-name=fl \\
  --batch-size=16 --quantization=4 --category=stem,social_sciences,humanities"""
    return f"""---
base_model: {base}
library_name: peft
datasets: [{data}]
tags: [federated-learning, lora, flowertune]
---

# {recipe.name}

{base}, tuned by federated learning with fedtune {version("fedtune")} on {data}. `recipe.toml` is the whole experiment.

## Rules of the general-NLP track

| Rule | Asked | Here | Kept |
|---|---|---|---|
{chr(10).join(rule_rows(submission))}

MB are 1,024² bytes, as the leaderboard's tracker counts them. They are those of whole messages, down and up, of all
clients and rounds.

## How it was trained

| | |
|---|---|
| method | `{recipe.method.name}` |
| rounds | {rounds} |
| clients in a round | {cohort_size(submission.clients, recipe.rounds.cohort)} of {submission.clients} |
| adapter | rank {recipe.adapter.rank}, alpha {recipe.adapter.alpha}, on {", ".join(recipe.adapter.targets)} |
| written adapter | r = lora_alpha = {r}: the scale is inside the factors |
| base | {recipe.model.dtype} |
| state | `{str(submission.origin.get("state_digest", ""))[:16]}` |
{chr(10).join(loss_rows(submission.records))}

## Scores

| STEM | Social sciences | Humanities | Average | Communication |
|---|---|---|---|---|
| not scored | not scored | not scored | not scored | {submission.megabytes:,.2f} MB |

The leaderboard's own evaluation gives them (`benchmarks/flowertune-llm/evaluation/general-nlp` of Flower's repository):

```bash
{command}
```

## Run it again

```bash
fedtune simulate recipe.toml
```

or, with Flower's simulation engine and {submission.clients} SuperNodes, `flwr run .` in this folder.
"""


def rule_rows(submission: Submission) -> Iterator[str]:
    """Yield a row for each rule that can be read off a run."""
    recipe, clients = submission.recipe, submission.clients
    data, cohort = dataset_of(recipe), cohort_size(clients, recipe.rounds.cohort)
    split = recipe.data.split
    parts, sent = f"{clients}, {split.kind}", submission.megabytes
    rules = (
        ("data", DATA, data, data.partition(":")[0] == DATA),
        ("clients", f"{CLIENTS}, equal random parts", parts, (clients, split.kind) == (CLIENTS, "iid")),
        ("clients in a round", f"{SHARE:.0%}", f"{cohort / clients:.0%}", cohort == cohort_size(clients, SHARE)),
        ("communication", f"at most {BUDGET_MB:,} MB", f"{sent:,.2f} MB", sent <= BUDGET_MB),
    )
    for rule, asked, here, holds in rules:
        yield f"| {rule} | {asked} | {here} | {'yes' if holds else 'no'} |"


def loss_rows(records: tuple[RoundRecord, ...]) -> Iterator[str]:
    """Yield the loss on the run's own test data before and after, where there are any."""
    tested = [record for record in records if record.test is not None and record.test.get("loss") is not None]
    for name, record in (("before", tested[0]), ("after", tested[-1])) if tested else ():
        assert record.test is not None
        yield f"| loss on its own test data, {name} | {record.test['loss']:.4f} |"
