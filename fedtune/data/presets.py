"""Data sets of the literature by name: where they are, what their columns mean, and what they are divided by."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from fedtune.data.settings import Part, PresetName
from fedtune.errors import ConfigError, Fault


@dataclass(frozen=True)
class Preset:
    """What a recipe need not say of a data set that has a name."""

    file: str
    """Name of the file as it was published."""
    home: str
    """Repository that publishes it."""
    columns: Mapping[Part, Sequence[str]]
    """By part, the columns that may hold it: as published first, then as others have stored it."""
    by: str
    """Column that the rows may be divided by; empty if there is none."""
    rows: str
    """How many there are, about."""
    hub: str = ""
    """Its name on the Hugging Face hub; empty if it is not there in this form."""
    subset: str | None = None
    revision: str | None = None
    """Commit of the hub's copy; None where none is known that today's `datasets` reads."""

    @property
    def hint(self) -> str:
        """Return what to do where its hub cannot be reached."""
        return f"name a local copy in data.source: {self.file}, from {self.home}"


TEMPLATE = "alpaca"
"""What all of them are published with."""
INSTRUCTION: Mapping[Part, Sequence[str]] = {
    "instruction": ("instruction",),
    "input": ("input",),
    "output": ("output",),
}
PRESETS: Mapping[PresetName, Preset] = {
    "alpaca": Preset(
        "alpaca_data.json",
        "github.com/tatsu-lab/stanford_alpaca",
        INSTRUCTION,
        by="",
        rows="52,000",
        hub="tatsu-lab/alpaca",
        revision="dce01c9b08f87459cf36a430d809084718273017",
    ),
    "alpaca-cleaned": Preset(
        "alpaca_data_cleaned.json",
        "github.com/gururise/AlpacaDataCleaned",
        INSTRUCTION,
        by="",
        rows="52,000",
        hub="yahma/alpaca-cleaned",
        revision="12567cabf869d7c92e573c7c783905fc160e9639",
    ),
    "dolly": Preset(
        "databricks-dolly-15k.jsonl",
        "github.com/databrickslabs/dolly",
        {"instruction": ("instruction",), "input": ("context", "input"), "output": ("response", "output")},
        by="category",
        rows="15,000",
        hub="databricks/databricks-dolly-15k",
        revision="bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a",
    ),
    "gsm8k": Preset(
        "train.jsonl",
        "github.com/openai/grade-school-math",
        {"instruction": ("question", "instruction"), "input": ("input",), "output": ("answer", "output")},
        by="",
        rows="7,500, and 1,300 to test on",
        hub="openai/gsm8k",
        subset="main",
        revision="e53f048856ff4f594e959d75785d2c2d37b678ee",
    ),
    "rosetta": Preset(
        "rosetta_alpaca.json",
        "github.com/sahil280114/codealpaca",
        INSTRUCTION,
        by="input",
        rows="8,000 to 9,000",
    ),
    "code-search-net": Preset(
        "python_train_0.jsonl.gz and its like",
        "github.com/github/CodeSearchNet",
        {
            "instruction": ("docstring", "func_documentation_string"),
            "input": ("language",),
            "output": ("code", "func_code_string"),
        },
        by="language",
        rows="2 million, in 6 languages",
        hub="code-search-net/code_search_net",
    ),
}


def columns_of(
    preset: PresetName, names: Sequence[str], where: str, *, mapped: Collection[Part] = ()
) -> Mapping[Part, str]:
    """Return the columns in a file of the parts of a preset that the recipe does not map; `input` may be absent.

    Raises: ConfigError naming the columns that one of the others may have, and those that there are.
    """
    chosen: dict[Part, str] = {}
    answered = {"chosen", "rejected"} & {*mapped}  # two answers in place of its one
    for part, candidates in PRESETS[preset].columns.items():
        if part in mapped or (part == "output" and answered):
            continue
        there = [column for column in candidates if column in names]
        if there:
            chosen[part] = there[0]
        elif part != "input":
            got = f"{', '.join(names) or 'none'} in {where}"
            hint = f"map it with fields = {{ {part} = ... }}, or leave data.preset out"
            raise ConfigError(Fault("data.preset", f"a column {' or '.join(candidates)}, as {preset} has", got, hint))
    return chosen


@contextmanager
def naming_file(preset: PresetName | None) -> Iterator[None]:
    """Add to the errors of a source that is not there which file it could be."""
    try:
        yield
    except ConfigError as error:
        if preset is None:
            raise
        hint = PRESETS[preset].hint
        faults = [replace(fault, hint="; ".join(filter(None, [fault.hint, hint]))) for fault in error.faults]
        raise ConfigError(faults, source=error.source) from error
