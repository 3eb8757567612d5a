"""The blocks of a transformers model of any family: the list that its config counts, and what flows between them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fedtune.errors import ConfigError, Fault


def find_blocks(model: Any) -> tuple[str, nn.ModuleList]:
    """Return full name and list of a model's blocks: the outermost list as long as its config says.

    Raises:
        ConfigError: if there is none, or more than one.
    """
    config = model.config.get_text_config()
    count = getattr(config, "num_hidden_layers", None)
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    outer = [name for name in lists if len(lists[name]) == count and not any(name.startswith(f"{o}.") for o in lists)]
    if len(outer) != 1:
        expected = f"a model with one list of {count} blocks"
        got = f"{len(outer)} in a {config.model_type}"
        raise ConfigError(Fault("model.base", expected, got, "choose another base, such as a Llama, Qwen or GPT-2"))
    return outer[0], lists[outer[0]]


def block_numbers(model: Any) -> Sequence[int]:
    """Return the numbers of a model's blocks; none where it has no list of them."""
    try:
        return range(len(find_blocks(model)[1]))
    # ValueError: transformers refuses to choose among the texts of a model of several; no base may fail by that.
    except (ConfigError, ValueError, AttributeError):
        return ()


def hidden_input(args: Sequence[Any], options: Mapping[str, Any]) -> torch.Tensor:
    """Return the hidden states that a block was called with."""
    hidden: torch.Tensor = args[0] if args else options["hidden_states"]
    return hidden


def hidden_output(output: Any) -> torch.Tensor:
    """Return the hidden states among what a block returns: alone, or first of several."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@contextmanager
def without_blocks(model: Any, numbers: Collection[int]) -> Iterator[None]:
    """Have blocks give back their input while the `with` block runs; all others keep their places."""

    def skip(_: nn.Module, args: tuple[Any, ...], options: Mapping[str, Any], output: Any) -> Any:
        hidden = hidden_input(args, options)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    blocks = find_blocks(model)[1]
    hooks = [blocks[number].register_forward_hook(skip, with_kwargs=True) for number in numbers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def listen_to_output(block: nn.Module, take: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Call `take` with the hidden states that leave a block in every forward pass of the `with` block."""
    hook = block.register_forward_hook(lambda _, args, output: take(hidden_output(output)))
    try:
        yield
    finally:
        hook.remove()
