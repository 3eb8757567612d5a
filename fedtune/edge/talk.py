"""A conversation with the tuned model of a device, word by word, on the device's own runtime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedtune.data.prompts import conversation_ids
from fedtune.data.settings import DataSettings, Form
from fedtune.data.templates import Message, template_of
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.edge.bundle import Bundle
from fedtune.edge.runtime import Runtime
from fedtune.edge.tokenizer import EdgeTokenizer
from fedtune.errors import ConfigError, Fault

BROKEN = "\ufffd"
"""What decoding gives for the first bytes of a character that takes several tokens."""


@dataclass(frozen=True)
class Speaker:
    """A model of a device, and how questions are put to it."""

    bundle: Bundle
    tokenizer: EdgeTokenizer
    runtime: Runtime
    ledger: SeedLedger | None
    """Of the tuned model; None: the base answers."""
    trainable: Sequence[int]
    """Ordinals of the matrices that the seeds move."""
    data: DataSettings
    form: Form
    """Of the rows on the device: a question stands where their questions stood."""

    @property
    def remembers(self) -> bool:
        """Whether it reads the turns before a question: only a chat template has a place for them."""
        return self.form != "text" and template_of(self.data, self.tokenizer) == "chat"


def check_tuned(bundle: Bundle, ledger: SeedLedger) -> None:
    """Refuse the seeds of another base.

    Raises:
        ConfigError: if they are.
    """
    if ledger.manifest != bundle.manifest.digest:
        expected, got = ledger.manifest.hex()[:16], bundle.manifest.digest.hex()[:16]
        hint = "use the bundle that the model was tuned on, or --base"
        raise ConfigError(Fault("model.base", f"the base of the tuned model, {expected}", got, hint))


def answer(speaker: Speaker, turns: Sequence[Message], *, new_tokens: int) -> Iterator[str]:
    """Yield the greedy answer to the last of the turns, in pieces of text as they come.

    Args:
        speaker: that answers.
        turns: of the conversation.
        new_tokens: of the answer, at most.
    """
    positions, tokenizer = speaker.bundle.facts.positions, speaker.tokenizer
    new_tokens = min(new_tokens, positions - 1)
    ids = conversation_ids(
        turns, speaker.data, tokenizer, form=speaker.form, positions=positions, new_tokens=new_tokens
    )
    first = speaker.bundle.facts.pad_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    # The end of a prompt that is too long: an answer must fit within the positions too.
    prompt = (list(ids) or [first])[-(positions - new_tokens) :]
    tokens = speaker.runtime.continue_tokens(speaker.ledger, speaker.trainable, prompt, new_tokens=new_tokens)
    yield from pieces(tokenizer, tokens)


def pieces(tokenizer: EdgeTokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Yield the text of tokens as soon as its characters are whole."""
    ids, written = list[int](), 0
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if not text.endswith(BROKEN) and len(text) > written:
            yield text[written:]
            written = len(text)
    if rest := tokenizer.decode(ids, skip_special_tokens=True)[written:]:
        yield rest


def turn(role: str, content: str) -> Mapping[str, str]:
    """Return a turn of a conversation."""
    return {"role": role, "content": content}


class Talk:
    """A conversation that is going on."""

    def __init__(self, speaker: Speaker, *, system: str | None, new_tokens: int) -> None:
        self._speaker, self._system, self._new_tokens = speaker, system, new_tokens
        self._turns = list[Message]()
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self._turns = [turn("system", self._system)] if self._system else []

    def ask(self, question: str) -> Iterator[str]:
        """Yield the pieces of the answer; what was read of it counts as said, also where the reader stops early."""
        turns, said = [*self._turns, turn("user", question)], list[str]()
        try:
            for piece in answer(self._speaker, turns, new_tokens=self._new_tokens):
                said.append(piece)
                yield piece
        finally:
            if self._speaker.remembers:
                self._turns = [*turns, turn("assistant", "".join(said))]
