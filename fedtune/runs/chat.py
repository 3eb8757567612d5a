"""Conversations with a tuned model, each question written by the template that the training used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from fedtune.config.recipe import PYTHON, missing_object
from fedtune.data.settings import DataSettings, Form, Split
from fedtune.data.templates import Message, template_of
from fedtune.errors import ConfigError, Fault
from fedtune.lora.virtual_tokens import are_virtual, has_encoder, num_layers, own_names
from fedtune.methods.method import GlobalModel
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.rounds.events import Note, Phase, Watch
from fedtune.runs.base_checks import check_base
from fedtune.runs.context import bind_to_score
from fedtune.runs.export import open_run
from fedtune.store import result
from fedtune.store.peft_import import read_adapter
from fedtune.tensors import Tensors

if TYPE_CHECKING:
    from fedtune.model.base import Base

# torch and transformers take seconds to import, so `model` is imported where it is needed.

Ask: TypeAlias = Callable[[Sequence[Message], Callable[[str], None]], str]
"""(turns, called with each piece of the answer) -> the answer"""


@dataclass(frozen=True)
class Speaker:
    """A base with a global model, and how questions are put to it."""

    base: Base
    tuned: GlobalModel
    data: DataSettings
    form: Form
    """Of the rows that it was trained on."""
    threads: int

    @property
    def remembers(self) -> bool:
        """Whether it reads the turns before a question: only a chat template has a place for them."""
        return self.form != "text" and template_of(self.data, self.base.tokenizer) == "chat"


def open_speaker(source: Path, *, base: str | None = None, watch: Watch = lambda event: None) -> Speaker:
    """Load the global model of a run, or a PEFT adapter of any origin, over its base.

    Args:
        source: run directory, or folder in PEFT's format.
        base: folder or hub name of the base, in place of the one that run or adapter names.
        watch: called with each step.

    Raises:
        StoreError: if the folder holds no result.
        ConfigError: if it is a classifier's, or the base is missing or another.
    """
    if (source / "recipe.toml").is_file():
        return speaker_of_run(source, base, watch)
    return speaker_of_adapter(source, base, watch)


def speaker_of_run(run: Path, base: str | None, watch: Watch) -> Speaker:
    """Load a run's global model; its data are not read."""
    tuned, origin = open_run(run)
    if remark := result.remark(run):
        watch(Note(remark))
    recipe = bind_to_score(run)
    if recipe.model.base == PYTHON and base is None:
        raise ConfigError(missing_object("model"))
    model = recipe.model if base is None else replace(recipe.model, base=base)
    check_task(model.task, run)
    loaded = load_base(model, recipe.adapter, recipe.root, recipe.seed, watch)
    check_base(loaded.digest, origin, run)
    form: Form = "text" if origin.get("form") == "text" else "instruction"
    return Speaker(loaded, tuned, recipe.data, form, model.threads)


def speaker_of_adapter(folder: Path, base: str | None, watch: Watch) -> Speaker:
    """Load an adapter over the base that it names; questions are written by the tokenizer's chat template."""
    read = read_adapter(folder)
    if read.remark:
        watch(Note(read.remark))
    check_task(read.target.task, folder)
    name = base or read.target.base
    if not name:
        raise ConfigError(Fault("--base", "the adapter's base, which its configuration does not name", "nothing"))
    targets, saved = list(read.adapter), read.target.saved_modules
    if are_virtual(read.saved):
        adapter = kind_of(read.saved)
    else:
        adapter = AdapterSettings(rank=read.rank, targets=targets, modules_to_save=saved)
    model = ModelSettings(base=name, revision=None if base else read.target.revision)
    loaded = load_base(model, adapter, Path(), 0, watch)
    data = DataSettings(source="", split=Split(kind="iid", clients=1))
    return Speaker(loaded, GlobalModel(read.adapter, read.saved), data, "instruction", model.threads)


def kind_of(saved: Tensors) -> AdapterSettings:
    """Return the settings of a run whose virtual tokens have these names and shapes."""
    own = own_names(saved)
    if num_layers(own):
        return AdapterSettings(kind="prefix", tokens=len(own["layers.0.key"]))
    tokens = len(own["embedding"])
    if has_encoder(own):
        return AdapterSettings(kind="p-tuning", tokens=tokens, hidden=len(own["encoder.0.bias"]), send="encoder")
    return AdapterSettings(kind="prompt", tokens=tokens)


def check_task(task: str, source: Path) -> None:
    if task != "causal":
        raise ConfigError(Fault(str(source), "a causal model", f"one for {task}", "only causal models write"))


def load_base(model: ModelSettings, adapter: AdapterSettings, root: Path, seed: int, watch: Watch) -> Base:
    """Load a base without any data."""
    watch(Phase("loading the base"))
    from fedtune.model.base import load, load_tokenizer

    return load(model, adapter, tokenizer=load_tokenizer(model, root), root=root, seed=seed)


@contextmanager
def voice(speaker: Speaker, *, tuned: bool, new_tokens: int) -> Iterator[Ask]:
    """Give a function that answers as the tuned model, or as the base alone, inside the block."""
    with attach(speaker, tuned=tuned) as net:
        yield partial(answer, speaker, net, new_tokens)


@contextmanager
def attach(speaker: Speaker, *, tuned: bool) -> Iterator[Any]:
    """Give the tuned model, or the base alone, inside the block."""
    from fedtune.model.libraries import threads
    from fedtune.model.lora import with_adapters
    from fedtune.runs.local import with_seeds

    model = speaker.tuned if tuned else GlobalModel()
    with (
        threads(speaker.threads),
        with_seeds(speaker.base, model.seeds),
        with_adapters(speaker.base, frozen=model.adapter, saved=model.saved) as net,
    ):
        yield net


def answer(speaker: Speaker, net: Any, new_tokens: int, turns: Sequence[Message], write: Callable[[str], None]) -> str:
    """Return the greedy answer to the last of the turns, and write its pieces as they come."""
    from fedtune.data.prompts import conversation_ids
    from fedtune.model.evaluate import continue_text
    from fedtune.model.samples import TextStream

    base = speaker.base
    stream = TextStream(base.tokenizer, write)
    ids = conversation_ids(
        turns, speaker.data, base.tokenizer, form=speaker.form, positions=base.positions, new_tokens=new_tokens
    )
    return continue_text(net, speaker.base, ids, new_tokens=new_tokens, streamer=stream)


def turn(role: str, content: str) -> Mapping[str, str]:
    return {"role": role, "content": content}
