"""The script that made the embedded model: text that every CPython brings along, a tokenizer, a small Llama, a loop.

    python -m fedtune.model.embedded.train OUT --seed 0 --steps 1500

The text is the interpreter's own, so the same command under another Python version trains another model.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedtune.model.torch_seed import torch_seed
from fedtune.seeds import derive

MODULES = """
    _collections_abc _pydecimal _pyio _strptime _weakrefset abc argparse ast base64 bdb bisect bz2 calendar cmd code
    codecs codeop collections compileall configparser contextlib copy copyreg csv curses dataclasses datetime dbm
    difflib dis doctest enum filecmp fileinput fnmatch fractions ftplib functools genericpath getopt getpass gettext
    glob graphlib gzip hashlib heapq hmac html imaplib inspect io ipaddress linecache locale lzma mailbox mimetypes
    modulefinder netrc ntpath numbers operator optparse os pathlib pdb pickle pickletools pkgutil platform plistlib
    poplib posixpath pprint profile pstats pty py_compile pyclbr pydoc queue quopri random re reprlib rlcompleter
    runpy sched secrets selectors shelve shlex shutil signal site smtplib socket socketserver ssl stat statistics
    string stringprep subprocess symtable sysconfig tabnanny tarfile tempfile textwrap threading timeit tokenize
    tomllib trace traceback tracemalloc tty types typing uuid venv warnings wave weakref webbrowser wsgiref xmlrpc
    zipapp zipfile zipimport zoneinfo
"""
"""Modules and packages of the standard library to learn from; those of the demo's clients are left out."""

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
PIECE = 2000
"""Least number of characters of a piece of text; a piece is held out or trained on as a whole."""
HELD_OUT = 40
"""One of so many pieces is never trained on."""


@dataclass(frozen=True)
class Size:
    """Shape of the model."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    context: int
    """Tokens per training window."""


@dataclass(frozen=True)
class Learning:
    """How the model is trained: AdamW, a linear warm-up over the first 5 %, then a cosine to a twentieth."""

    steps: int
    batch: int
    """Windows per step."""
    learning_rate: float
    weight_decay: float
    """Of matrices; norms have none."""


def sources(module: str) -> Sequence[Path]:
    """Return the files of a standard-library module or package, in a fixed order, tests left out."""
    library = Path(sysconfig.get_path("stdlib"))
    package = library / module
    files = sorted(package.rglob("*.py")) if package.is_dir() else [package.with_suffix(".py")]
    return [file for file in files if "test" not in file.relative_to(library).parts]


def documents() -> Sequence[str]:
    """Return the documentation topics of `pydoc` and the sources of `MODULES`."""
    code = [file.read_text(encoding="utf-8") for module in MODULES.split() for file in sources(module)]
    return [topics[name] for name in sorted(topics)] + [text for text in code if text]


def pieces(text: str) -> Sequence[str]:
    """Cut a text into runs of whole lines, each of at least `PIECE` characters but the last."""
    finished, run, length = [], [], 0
    for line in text.splitlines(keepends=True):
        run.append(line)
        length += len(line)
        if length >= PIECE:
            finished.append("".join(run))
            run, length = [], 0
    return [*finished, "".join(run)] if run else finished


def train_tokenizer(texts: Sequence[str], vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer: any text encodes, and a text begins with `<bos>`."""
    tokenizer = Tokenizer(models.BPE())
    # Without a space put in front, decoding gives back the text that was encoded.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS],
        # All 256 bytes, so that texts with bytes that the corpus lacks still encode.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def new_model(size: Size, tokenizer: PreTrainedTokenizerFast, key: int) -> LlamaForCausalLM:
    """Return a Llama with tied embeddings and fresh float32 weights drawn from the key."""
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        intermediate_size=size.feed_forward,
        max_position_embeddings=size.context,
        initializer_range=size.hidden**-0.5 / 2,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    # transformers draws from torch's global generator and takes no other.
    with torch_seed(key, torch.device("cpu")):
        return LlamaForCausalLM(config)


def windows(stream: torch.Tensor, starts: torch.Tensor, bos: int, context: int) -> torch.Tensor:
    """Return one window per start, (starts, context), each opened by `<bos>`.

    A user's text may begin anywhere in a file, so the model must know such beginnings.
    """
    cut = stream[starts[:, None] + torch.arange(context - 1)]
    return torch.cat([torch.full((len(starts), 1), bos), cut], dim=1)


def token_loss(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Return the mean loss (nats) of predicting each token of the windows (batch, context) but the first."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits  # (batch, context - 1, vocabulary)
    return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: torch.Tensor, bos: int, context: int) -> float:
    """Return the mean loss (nats per token) over the stream in windows that do not overlap."""
    # A window opens with <bos>, so it holds one token less of the stream.
    starts = torch.arange(0, len(stream) - context, context - 1)
    groups = [starts[first : first + 16] for first in range(0, len(starts), 16)]
    total = sum(len(group) * token_loss(model, windows(stream, group, bos, context)).item() for group in groups)
    return total / len(starts)


def learning_rate(step: int, learning: Learning) -> float:
    """Return the learning rate of a step that counts from 0."""
    warmup = max(1, learning.steps // 20)
    if step < warmup:
        return learning.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, learning.steps - warmup)
    return learning.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def fit(model: LlamaForCausalLM, stream: torch.Tensor, learning: Learning, *, bos: int, context: int, key: int) -> None:
    """Train the model in place on random windows of the stream."""
    generator = torch.Generator().manual_seed(key)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": learning.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim != 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning.learning_rate, betas=(0.9, 0.95))
    started, every = time.monotonic(), max(1, learning.steps // 40)
    running = 0.0
    for step in range(learning.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, learning)
        # From a generator of its own: the batches follow from the key, whatever else draws.
        starts = torch.randint(len(stream) - context, (learning.batch,), generator=generator)
        loss = token_loss(model, windows(stream, starts, bos, context))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running += loss.item()
        if (step + 1) % every == 0:
            elapsed = time.monotonic() - started
            print(f"step {step + 1}/{learning.steps}  loss {running / every:.3f}  {elapsed:.0f} s", flush=True)
            running = 0.0


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> torch.Tensor:
    """Return the texts as one stream of token ids, each text ended by `<eos>`."""
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for text in ids for token in (*text, tokenizer.eos_token_id)])


def build(out: Path, *, seed: int, size: Size, learning: Learning, characters: int | None) -> None:
    """Train tokenizer and model and write them to a folder that transformers loads.

    Args:
        characters: use only so many characters of each document; None uses all.
    """
    # Equal pieces (licence headers, whole copies) count once, so that no held-out piece was also trained on.
    unique = list(dict.fromkeys(piece for text in documents() for piece in pieces(text[:characters])))
    train = [piece for index, piece in enumerate(unique) if index % HELD_OUT]
    held_out = unique[::HELD_OUT]
    tokenizer = train_tokenizer(train, size.vocabulary, size.context)
    stream, test = encode(tokenizer, train), encode(tokenizer, held_out)
    model = new_model(size, tokenizer, derive(seed, "embedded.weights"))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(stream):,} training tokens", flush=True)
    bos = tokenizer.bos_token_id
    fit(model, stream, learning, bos=bos, context=size.context, key=derive(seed, "embedded.batches"))
    loss = held_out_loss(model, test, bos, size.context)
    # Per byte of text: models with other vocabularies can be compared by it.
    bits = loss / math.log(2) * len(test) / len("".join(held_out).encode())
    print(f"held out: {loss:.4f} nats per token, {bits:.4f} bits per byte ({len(test):,} tokens)")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train from the command line; the defaults are those of the model in the package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=8, help="windows per step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--feed-forward", type=int, default=344)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--characters", type=int, help="use only so many characters of each document")
    parser.add_argument("--threads", type=int, default=1, help="of torch; bits are the same per thread count")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    size = Size(
        vocabulary=args.vocabulary,
        hidden=args.hidden,
        layers=args.layers,
        heads=args.heads,
        kv_heads=args.kv_heads,
        feed_forward=args.feed_forward,
        context=args.context,
    )
    learning = Learning(
        steps=args.steps, batch=args.batch, learning_rate=args.learning_rate, weight_decay=args.weight_decay
    )
    build(args.out, seed=args.seed, size=size, learning=learning, characters=args.characters)


if __name__ == "__main__":
    main()
