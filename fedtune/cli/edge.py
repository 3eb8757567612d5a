"""The command `fedtune-edge`: a device takes part in a federation by forward passes alone, without torch."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from fedtune.cli.edge_options import DONE, INTERRUPTED, PROGRAM, RETRY, TRAIN, USAGE, add_site

WIDTH = 80
"""Columns of the help."""
ABOUT = """\
Take part in the fine-tuning of a language model with a small device. The model
and your data stay here: what is sent are a few signed numbers in each round."""
FIRST_TIME = f"""\
First time here?
  {PROGRAM} enroll           makes this device's keys, and says what next
  {PROGRAM} inspect          shows what would be used and sent, to the byte
  {PROGRAM} join             connects and takes part, as site.toml says
  {PROGRAM} COMMAND --help   shows what a command does"""


@dataclass(frozen=True)
class Command:
    """One command: what it is for, its arguments, and what it does."""

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    """Returns the exit status."""
    examples: Sequence[str] = ()


def commands() -> Mapping[str, Command]:
    """Return the commands by name, in the order of the help."""
    # Imported here: each module names what it needs at its top, and `_train` needs none of them.
    from fedtune.cli import (
        edge_chat,
        edge_enroll,
        edge_export,
        edge_inspect,
        edge_join,
        edge_pause,
        edge_status,
    )

    return {
        "enroll": Command(
            "make this device's keys and request, or accept what the operator sent",
            edge_enroll.add_arguments,
            edge_enroll.run,
            ("enroll", "enroll --name kitchen --yes", "enroll CODE --server fl.example.org:9000"),
        ),
        "inspect": Command(
            "show what would be used of your data, and what would be sent, byte for byte",
            edge_inspect.add_arguments,
            edge_inspect.run,
            ("inspect", "inspect --data notes/ --bundle model/", "inspect --json"),
        ),
        "join": Command(
            "connect to the server, and take part",
            edge_join.add_arguments,
            edge_join.run,
            ("join", "join --dry-run", "join /etc/fedtune/site.toml --log json"),
        ),
        "status": Command(
            "show how this device is: connection, last loss, bytes of the day",
            edge_status.add_arguments,
            edge_status.run,
            ("status", "status --json"),
        ),
        "pause": Command(
            "let this device rest, also after it is started again",
            edge_pause.add_pause_arguments,
            edge_pause.pause,
            ("pause", "pause --for 2h", "pause --until 22:00"),
        ),
        "resume": Command("end a pause", add_site, edge_pause.resume, ("resume",)),
        "chat": Command(
            "talk to the model that this device has helped to tune",
            edge_chat.add_arguments,
            edge_chat.run,
            ("chat", "chat --base", "chat --json < questions.txt"),
        ),
        "export": Command(
            "write the tuned model as a LoRA adapter, for PEFT or llama.cpp",
            edge_export.add_arguments,
            edge_export.run,
            ("export adapter", "export adapter --form gguf"),
        ),
        "version": Command("show the version, and which models this program runs", lambda parser: None, show_version),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, and return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == [TRAIN]:
        from fedtune.edge.process import main as train

        train(words)
        return DONE
    allow_any_bytes()
    if not words:
        parser(commands()).print_help(sys.stderr)
        return USAGE
    # A word that people try with every program, beside the command of that name.
    options = parser(commands()).parse_args(["version"] if words == ["--version"] else words)
    return with_errors(partial(options.run, options), debug=options.debug)


def allow_any_bytes() -> None:
    """Read and write bytes of another encoding as marks: by the locale, they would end the program."""
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def parser(table: Mapping[str, Command]) -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    shape = partial(argparse.RawDescriptionHelpFormatter, width=WIDTH, max_help_position=24)
    top = argparse.ArgumentParser(PROGRAM, description=ABOUT, epilog=FIRST_TIME, formatter_class=shape)
    under = top.add_subparsers(metavar="COMMAND", required=True)
    for name, command in table.items():
        lines = [f"  {PROGRAM} {example}" for example in command.examples]
        own = under.add_parser(
            name,
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            epilog="\n".join(["examples:", *lines]) if lines else None,
            formatter_class=shape,
        )
        command.add_arguments(own)
        own.add_argument("--debug", action="store_true", help="show where an error came from")
        own.set_defaults(run=command.run)
    return top


def with_errors(work: Callable[[], int], *, debug: bool) -> int:
    """Do some work, and return its exit status; an error is one message on standard error."""
    from fedtune.errors import FedtuneError

    if debug or os.environ.get("FEDTUNE_DEBUG"):
        # In the environment, so that the process that trains shows where its work failed, too.
        os.environ.setdefault("FEDTUNE_DEBUG", "1")
        return work()
    try:
        return work()
    except FedtuneError as error:
        return complain(str(error), error)
    except BrokenPipeError:
        # The reader of our output has closed it; Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return complain(f"{where}{error.strerror or error}; --debug shows where", error)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: stopped by Ctrl-C", file=sys.stderr)
        return INTERRUPTED


def complain(text: str, error: Exception) -> int:
    """Print an error, and return the exit status: 75 if it may pass without a change, such as a full disk."""
    from fedtune.errors import may_pass
    from fedtune.terminal.text import printable

    print(f"{PROGRAM}: {printable(text, lines=True)}", file=sys.stderr)
    return RETRY if may_pass(error) else USAGE


def show_version(options: argparse.Namespace) -> int:
    """Print version, protocol and runtimes."""
    import platform
    from importlib.util import find_spec

    from fedtune.edge.runtime import PACKAGES
    from fedtune.link.envelopes import PROTOCOL, build_version

    runtimes = [runtime for runtime, package in PACKAGES.items() if find_spec(package) is not None]
    print(f"{build_version()}, protocol {PROTOCOL}, for {platform.machine()}")
    print(f"runs bundles for {' and '.join(runtimes) or 'no runtime'}; method fedkseed, bank kron")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
