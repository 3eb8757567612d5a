"""The model card of a run's deployed models: the README.md that a model hub shows, from what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

LOADING = """```python
import fedtune

model = fedtune.load_pruned("{folder}/model")
```"""


def model_card(
    *,
    name: str,
    base: str,
    method: str,
    rounds: int,
    clients: int,
    examples: int,
    whole: Mapping[str, Any],
    ratios: Mapping[str, Mapping[str, Any]],
    machine: str,
) -> str:
    """Return a model card in Markdown; it names no client, and nothing of their data but how many rows there were.

    Args:
        name: of the run.
        base: that was trained, as the recipe names it.
        method: that combined the clients' changes.
        rounds: after which the models were taken.
        clients: of the federation.
        examples: that all of them train on.
        whole: of the whole model, as `deployed_scores.model_scores` gives it.
        ratios: by pruning ratio, the entries of `deploy.json`.
        machine: on which times were measured.
    """
    first = next(iter(ratios.values()))["folder"]
    return "\n".join(
        (
            "---",
            f"base_model: {base.rsplit('/', 1)[-1] if base.startswith(('/', '.')) else base}",
            "library_name: fedtune",
            "tags: [federated-learning, lora, pruned]",
            "---",
            "",
            f"# {name}",
            "",
            f"Models for devices, pruned and tuned by federated learning with fedtune {version('fedtune')}: method "
            f"`{method}`, {rounds} rounds, {clients} clients with {examples:,} training examples, which stayed there.",
            "",
            *table(whole, ratios),
            "",
            f"Times are of one text on {machine}. The score is on the run's test data.",
            "",
            "## Load a model",
            "",
            LOADING.format(folder=first),
            "",
            "`recipe/` holds the kept heads and channels and the adapter alone, for devices that have the base;",
            "`stock/`, where it is there, is loaded by transformers itself.",
            "",
            "## Limits",
            "",
            "- The licence of the base and the consent of those whose data were trained on cover these models as well.",
            "- Only the test data of the run were scored; no other task, language or bias was measured.",
            "- The change also repairs what pruning removed, so that it scores otherwise on the whole base.",
            "",
        )
    )


def table(whole: Mapping[str, Any], ratios: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield a Markdown table, a line per model."""
    parts = [name for name in ("prefill", "decode", "forward") if name in whole["latency_ms"]]
    score = next((name for name in ("accuracy", "loss") if name in whole["scores"]), "")
    head = ["model", "blocks' weights removed", "parameters", "MB", *([score] if score else [])]
    head += [f"{part}, ms" for part in parts]
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    rows = {"whole": (0.0, whole), **{own["folder"]: (own["sparsity"], own["measured"]) for own in ratios.values()}}
    for name, (sparsity, own) in rows.items():
        cells = [name, f"{100 * sparsity:.1f} %", f"{own['parameters']:,}", f"{own['megabytes']:.1f}"]
        cells += [f"{own['scores'][score]:.4g}"] if score else []
        cells += [f"{own['latency_ms'][part]:.3g}" for part in parts]
        yield f"| {' | '.join(cells)} |"
