"""The base's tokenizer on a device, over the package `tokenizers`: token for token what transformers gives."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from fedtune.edge.bundle import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, Bundle
from fedtune.edge.chat_template import fill_in
from fedtune.errors import StoreError

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that tokenizers name; chat templates read them."""
ENDLESS = 10**30
"""Tokens that a tokenizer without a limit takes."""
CLEANED: Sequence[tuple[str, str]] = (
    *((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't")),
    *((" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")),
)
"""Spaces that word-piece tokenizers of English put where none were, in the order of their removal."""

READ: Mapping[str, Callable[[Any], bool]] = {
    "split_special_tokens": lambda value: isinstance(value, bool),
    "clean_up_tokenization_spaces": lambda value: isinstance(value, bool),
    "model_max_length": lambda value: isinstance(value, int | float) and 0 <= value < math.inf,
    "pad_token_type_id": lambda value: isinstance(value, int) and value >= 0,
    "padding_side": lambda value: value in ("left", "right"),
    "truncation_side": lambda value: value in ("left", "right"),
    "model_input_names": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "special_tokens": lambda value: isinstance(value, dict),
    "chat_template": lambda value: isinstance(value, str) or (isinstance(value, list) and all(map(_is_named, value))),
}
"""Keys of the configuration that are read, and what makes a value of each right."""
AGAIN = "write the bundle again with fedtune export --edge"


class Characters(NamedTuple):
    """Characters of a text that a token holds."""

    start: int
    end: int


@dataclass(frozen=True)
class Encoded:
    """Tokens of one text or of several, with the place of each in its text."""

    values: Mapping[str, Any]
    """input_ids, token_type_ids where the tokenizer has them, attention_mask, assistant_masks: of one text a list of
    numbers, of several a list of such lists."""
    encodings: Sequence[Encoding]
    """One for each text."""

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def __contains__(self, name: object) -> bool:
        return name in self.values

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(name, default)

    def char_to_token(self, row: int, character: int | None = None) -> int | None:
        """Return the token that holds a character of a text; None if none does. With one argument of the only text."""
        row, character = (0, row) if character is None else (row, character)
        token: int | None = self.encodings[row].char_to_token(character)
        return token

    def token_to_chars(self, row: int, token: int) -> Characters | None:
        """Return the characters of a token of a text; None for one that the tokenizer itself put there."""
        place = self.encodings[row].token_to_chars(token)
        return None if place is None else Characters(*place)


@dataclass(frozen=True)
class EdgeTokenizer:
    """What fedtune uses of a tokenizer of transformers; `data.encode.Tokenizer` is its part that reads rows."""

    backend: Backend
    specials: Mapping[str, str]
    """Special tokens by the names that templates know."""
    chat_template: str | Mapping[str, str] | None
    model_max_length: int = ENDLESS
    padding_side: str = "right"
    truncation_side: str = "right"
    pad_token_type_id: int = 0
    inputs: Sequence[str] = ("input_ids", "token_type_ids", "attention_mask")
    cleans_up: bool = False
    is_fast: bool = field(default=True, init=False)

    @property
    def bos_token_id(self) -> int | None:
        return self._id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._id("pad_token")

    def _id(self, name: str) -> int | None:
        token: int | None = self.backend.token_to_id(self.specials[name]) if name in self.specials else None
        return token

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        *,
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int | None = None,
        return_attention_mask: bool = True,
        verbose: bool = True,
    ) -> Encoded:
        """Return the tokens of a text or of several, or of pairs; see `transformers.PreTrainedTokenizerBase.__call__`.

        `verbose` asks transformers for warnings, which are not given here.
        """
        if truncation and max_length is not None:
            self.backend.enable_truncation(max_length, direction=self.truncation_side)
        else:
            self.backend.no_truncation()
        if isinstance(text, str):
            inputs: Sequence[Any] = [(text, text_pair)] if text_pair else [text]
        else:
            inputs = list(text) if text_pair is None else list(zip(text, text_pair, strict=True))
        encodings = self.backend.encode_batch(inputs, add_special_tokens=add_special_tokens)
        values = {"input_ids": [encoding.ids for encoding in encodings]}
        if "token_type_ids" in self.inputs:
            values["token_type_ids"] = [encoding.type_ids for encoding in encodings]
        if return_attention_mask and "attention_mask" in self.inputs:
            values["attention_mask"] = [encoding.attention_mask for encoding in encodings]
        if isinstance(text, str):
            return Encoded({name: rows[0] for name, rows in values.items()}, encodings)
        return Encoded(values, encodings)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of tokens."""
        text: str = self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        if self.cleans_up:
            for spaced, close in CLEANED:
                text = text.replace(spaced, close)
        return text

    def convert_ids_to_tokens(self, token: int) -> str | None:
        """Return the token of a number, as the vocabulary spells it."""
        spelled: str | None = self.backend.id_to_token(token)
        return spelled

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """Return the text of the chat template, of several that for tools or the default one.

        Raises:
            ValueError: if there is none.
        """
        own = self.chat_template
        if isinstance(own, str | None):
            template = chat_template or own
        elif chat_template is not None:
            template = own.get(chat_template, chat_template)
        else:
            template = own["tool_use"] if tools is not None and "tool_use" in own else own.get("default")
        if template is None:
            raise ValueError("the tokenizer has no chat template, or several and none that is called default")
        return template

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        *,
        tools: Any = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        **variables: Any,
    ) -> Any:
        """Return a conversation as text, or with `tokenize` its tokens.

        With `return_assistant_tokens_mask` `assistant_masks` is 1 for each token of what the template marks as written
        by the model.
        """
        text, spans = fill_in(
            self.get_chat_template(chat_template, tools),
            conversation,
            tools=tools,
            open_answer=add_generation_prompt,
            variables={**self.specials, **variables},
        )
        if not tokenize:
            return text
        encoded = self(text, add_special_tokens=False)
        if not return_dict:
            return encoded["input_ids"]
        if not return_assistant_tokens_mask:
            return encoded
        places = encoded.encodings[0].offsets
        masks = [int(any(begin < stop and start < end for start, stop in spans)) for begin, end in places]
        return Encoded({**encoded.values, "assistant_masks": masks}, encoded.encodings)


def read_tokenizer(bundle: Bundle) -> EdgeTokenizer:
    """Return the tokenizer of a bundle.

    Raises:
        StoreError: naming the file that is missing or is none of a tokenizer.
    """
    listed = bundle.folder.listed or {}
    return tokenizer_of(
        {name: bundle.read(name) for name in (TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE) if name in listed}
    )


def tokenizer_of(files: Mapping[str, bytes]) -> EdgeTokenizer:
    """Return the tokenizer in files by name, as transformers stores them, but with the backend as it is in use.

    What transformers changes when it loads a tokenizer, such as the tokens that it puts around a text, must stand in
    tokenizer.json already: `fedtune.model.edge_tokenizer` writes it so.

    Raises:
        StoreError: naming the file that is missing or is none of a tokenizer.
    """
    if TOKENIZER not in files:
        raise StoreError(f"expected {TOKENIZER} in the bundle; got none; {AGAIN}")
    backend = _backend(files[TOKENIZER])
    config = _config(files.get(TOKENIZER_CONFIG, b"{}"))
    try:
        chat_template = files[CHAT_TEMPLATE].decode() if CHAT_TEMPLATE in files else None
    except UnicodeDecodeError as error:
        raise StoreError(f"{CHAT_TEMPLATE}: expected a text in UTF-8; got {error}; {AGAIN}") from error
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = bool(config.get("split_special_tokens"))
    return EdgeTokenizer(
        backend,
        _specials(config),
        _templates(config.get("chat_template"), chat_template),
        model_max_length=int(config.get("model_max_length") or ENDLESS),
        padding_side=config.get("padding_side") or "right",
        truncation_side=config.get("truncation_side") or "right",
        pad_token_type_id=config.get("pad_token_type_id") or 0,
        inputs=tuple(config.get("model_input_names") or EdgeTokenizer.inputs),
        cleans_up=bool(config.get("clean_up_tokenization_spaces")) and not _is_bpe(backend),
    )


def _backend(data: bytes) -> Backend:
    try:
        backend = Backend.from_str(data.decode())
        # A token that is put around a text and is not in the vocabulary is missed at the first text alone.
        backend.encode_batch(["a", ("a", "b")])
    except BaseException as error:
        # The package raises no narrower kind than Exception, and what its Rust code panics with is not even one.
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise StoreError(
            f"{TOKENIZER}: expected a tokenizer; got {' '.join(str(error).split())[:120]}; {AGAIN}"
        ) from None
    return backend


def _config(data: bytes) -> Mapping[str, Any]:
    """Return what stands beside a tokenizer, every value that is read of its type, or None."""
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{TOKENIZER_CONFIG}: expected JSON in UTF-8; got {error}; {AGAIN}") from error
    if not isinstance(config, dict):
        raise StoreError(f"{TOKENIZER_CONFIG}: expected an object; got {str(config)[:40]!r}; {AGAIN}")
    for key, is_right in READ.items():
        if config.get(key) is not None and not is_right(config[key]):
            got = f"{str(config[key])[:40]!r} under {key!r}"
            raise StoreError(f"{TOKENIZER_CONFIG}: expected what transformers writes there; got {got}; {AGAIN}")
    return config


def _is_named(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("name", "template"))


def _is_bpe(backend: Backend) -> bool:
    # It writes its own spaces: removing some would damage texts.
    return type(backend.model).__name__ == "BPE"


def _specials(config: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the special tokens, each a text or an object that holds one."""
    more = config.get("special_tokens")
    named = {name: config.get(name) for name in SPECIAL} | (dict(more) if isinstance(more, Mapping) else {})
    texts = {name: value.get("content") if isinstance(value, Mapping) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _templates(stated: Any, own_file: str | None) -> str | Mapping[str, str] | None:
    """Return the chat template, or several by name; that of a file of its own comes first."""
    if own_file is not None:
        return own_file
    if isinstance(stated, list):
        return {entry["name"]: entry["template"] for entry in stated}
    return stated if isinstance(stated, str) else None
