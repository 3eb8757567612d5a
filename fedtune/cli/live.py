"""The live page of `fedtune simulate`, `serve` and `report`: its options, and the page as long as a run goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedtune.live.feed import Feed
    from fedtune.live.server import LiveAddress
    from fedtune.rounds.events import Event, Watch

LiveOption = Annotated[bool, typer.Option("--live", help="Show the run as a page in a browser of this machine.")]
LivePortOption = Annotated[
    int | None,
    typer.Option("--live-port", metavar="PORT", min=0, max=65535, help="Port of that page; 8008 or the next free one."),
]
LiveAddressOption = Annotated[
    str | None,
    typer.Option("--live-address", metavar="HOST", help="Show the page to other machines too, by a token."),
]


@dataclass(frozen=True)
class LiveOptions:
    """Where a page is wanted."""

    host: str
    port: int | None

    @property
    def words(self) -> list[str]:
        """The same on a command line."""
        port = [] if self.port is None else ["--live-port", str(self.port)]
        return ["--live", *port, "--live-address", self.host]


def live_feed(name: str, rounds: int, resume: Path | None = None) -> Feed:
    """Return the feed of a run, with the rounds of its directory where it is resumed."""
    from fedtune.live.feed import Feed
    from fedtune.store.round_records import read_rounds

    feed = Feed(name, rounds=rounds)
    if resume is not None:
        feed.load(read_rounds(resume))
    return feed


def live_options(live: bool, port: int | None, host: str | None) -> LiveOptions | None:
    """Return where a page is wanted; None where none is. A port or an address asks for one by itself."""
    from fedtune.live.server import LOOPBACK

    return LiveOptions(host or LOOPBACK, port) if live or port is not None or host is not None else None


@contextmanager
def live_page(options: LiveOptions | None, feed: Feed, watch: Watch) -> Iterator[Watch]:
    """Give an observer of a run that shows it on a page too, and says on the page how the block ends.

    The page is served from the first event on: worker processes are forked before that, while there is no thread.
    """
    from fedtune.live.server import serve_live
    from fedtune.rounds.events import Note

    if options is None:
        yield watch
        return
    with ExitStack() as stack:
        begun = False

        def observe(event: Event) -> None:
            nonlocal begun
            if not begun:
                begun = True
                for text in announcement(stack.enter_context(serve_live(feed, host=options.host, port=options.port))):
                    watch(Note(text))
            feed(event)
            watch(event)

        with end_of(feed):
            yield observe


@contextmanager
def live_server(options: LiveOptions | None, feed: Feed, say: Callable[[str], None]) -> Iterator[None]:
    """Serve the page of a feed from now until the block ends, and say where."""
    from fedtune.live.server import serve_live

    if options is None:
        yield
        return
    with serve_live(feed, host=options.host, port=options.port) as address:
        for text in announcement(address):
            say(text)
        with end_of(feed):
            yield


@contextmanager
def end_of(feed: Feed) -> Iterator[None]:
    """Say on a page how the block ended."""
    try:
        yield
    except BaseException as error:
        feed.set_state("stopped", "by a signal" if isinstance(error, KeyboardInterrupt) else str(error).split("\n")[0])
        raise
    feed.set_state("finished")


def announcement(address: LiveAddress) -> list[str]:
    return [f"live page: {address.url}", *([f"warning: {address.warning}"] if address.warning else [])]


def show_directory(run: Path, options: LiveOptions, say: Callable[[str], None]) -> None:
    """Show a run directory as a page until Ctrl-C."""
    from fedtune.live.directory import follow_directory, open_directory
    from fedtune.live.server import serve_live

    feed = open_directory(run)
    with follow_directory(run, feed), serve_live(feed, host=options.host, port=options.port) as address:
        for text in announcement(address):
            say(text)
        say("Ctrl-C ends it")
        wait_for_ctrl_c()


def wait_for_ctrl_c() -> None:
    with suppress(KeyboardInterrupt):
        threading.Event().wait()
