"""Whether a device reads texts as the base's tokenizer does: asked before a bundle is signed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedtune.data.templates import DAY, render, writes_date
from fedtune.edge.tokenizer import EdgeTokenizer, tokenizer_of
from fedtune.errors import ConfigError, Fault

TEXTS = (
    "",
    " ",
    "Once upon a time, there was a little girl.",
    "  two spaces, a tab\tand\r\nbreaks\n\n",
    "Größe, naïve, Ελληνικά, 漢字, 한국어, العربية, e\u0301",
    "\U0001f600\U0001f469\u200d\U0001f469\u200d\U0001f467 \u2028\u200b\ufeff\x07",
    "def f(x):\n    return x**2  # 12,345.678e-9",
    "don't, I'll 's . , ! ? 've",
)
"""What tokenizers treat in ways of their own; special tokens are added to it."""
TURNS = [
    {"role": "user", "content": "What is 1 + 1? <b>"},
    {"role": "assistant", "content": " Two.\n"},
    {"role": "user", "content": "Größe?"},
]


def check_tokenizer(tokenizer: Any, files: Mapping[str, bytes]) -> None:
    """Refuse files by which a device would read another text than the base's tokenizer.

    Args:
        tokenizer: of transformers.
        files: what `fedtune.model.edge_tokenizer.tokenizer_files` gives for it.

    Raises:
        ConfigError: naming the text.
    """
    own = tokenizer_of(files)
    for what, theirs, ours in [*_ids(tokenizer, own), *_texts(tokenizer, own)]:
        if theirs != ours:
            expected, got = f"a tokenizer that a device reads alike: {theirs!r:.80} for {what}", f"{ours!r:.80}"
            raise ConfigError(Fault("model.base", expected, got, "report this tokenizer; devices cannot use it"))


def _ids(tokenizer: Any, own: EdgeTokenizer) -> Iterator[tuple[str, Any, Any]]:
    """Yield texts with what transformers and the device give for each."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        yield name, getattr(tokenizer, name), getattr(own, name)
    marks = "".join(f"x{token} y" for token in tokenizer.all_special_tokens)
    for text in [*TEXTS, marks]:
        for special in (True, False):
            theirs = tokenizer(text, add_special_tokens=special, verbose=False)
            ours = own(text, add_special_tokens=special)
            yield f"{text!r:.40}", theirs["input_ids"], ours["input_ids"]
            yield f"the places of {text!r:.40}", theirs.encodings[0].offsets, ours.encodings[0].offsets
        ids = tokenizer(text, verbose=False)["input_ids"]
        for skip in (True, False):
            yield (
                f"the tokens of {text!r:.40}",
                tokenizer.decode(ids, skip_special_tokens=skip),
                own.decode(ids, skip_special_tokens=skip),
            )


def _texts(tokenizer: Any, own: EdgeTokenizer) -> Iterator[tuple[str, Any, Any]]:
    """Yield conversations with the texts that the chat template makes of each."""
    if tokenizer.chat_template is None:
        yield "a chat template", None, own.chat_template
        return
    yield "whether it writes the day", writes_date(tokenizer), writes_date(own)
    system = [{"role": "system", "content": "Be brief."}]
    for turns in (TURNS[:1], TURNS[:2], TURNS, [*system, *TURNS[:2]]):
        for open_answer in (False, True):
            theirs, ours = _text(tokenizer, turns, open_answer), _text(own, turns, open_answer)
            yield f"a conversation of {len(turns)} turns", theirs, ours


def _text(tokenizer: Any, turns: Sequence[Mapping[str, str]], open_answer: bool) -> str:
    try:
        return render(turns, tokenizer, place="a check", date=DAY, open_answer=open_answer)
    except ConfigError as error:  # a template may refuse a system turn: then both must
        return f"refused: {str(error)[:60]}"
