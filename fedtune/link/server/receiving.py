"""An upload as it arrives: written to the disk in batches, acknowledged when written, and never twice at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

from fedtune.link import uploads
from fedtune.link.rejections import rejection
from fedtune.link.server.dispatcher import Dispatcher
from fedtune.link.server.limits import OpenCall
from fedtune.link.settings import KIB, MIB
from fedtune.wire.v1 import link_pb2 as pb

P = ParamSpec("P")
T = TypeVar("T")
BATCH_BYTES = MIB
"""Hashed and written at once: one change of threads for many messages."""
FREE_MESSAGES = 64
"""That may be of any size; an honest upload has short ones only at its ends."""
MIN_MESSAGE_BYTES = 4 * KIB
"""Of the messages behind them, on average: tiny ones cost as much time each as large ones."""


async def receive(
    dispatcher: Dispatcher, disk: Executor, call: OpenCall, requests: AsyncIterator[pb.PushPart]
) -> AsyncGenerator[tuple[int, bool], None]:
    """Write an upload to the disk; yields the bytes received so far, and whether the part is whole.

    Args:
        dispatcher: knows which part is wanted, and takes it.
        disk: threads that write.
        call: this upload, whose progress is noted.
        requests: the messages.

    Raises:
        RejectionError: if it is not wanted, or not what was announced.
        StoreError: if it cannot be written.
    """
    stream = aiter(requests)
    first = await read(call, stream)
    if first is None:
        return
    admitted = call.check
    part = dispatcher.missing_part(call.client, first.answer, first.digest)
    # From here on the order must stay open, too.
    call.check = lambda: (admitted(), dispatcher.missing_part(call.client, first.answer, first.digest))
    path = uploads.part_path(dispatcher.folder, call.client, part.digest)
    incoming = await open_upload(disk, path, part, first.offset)
    call.left_bytes = part.num_bytes - incoming.received_bytes
    smallest = min(MIN_MESSAGE_BYTES, dispatcher.settings.part_kib * KIB)
    waiting, size, messages, begins = [first.data], len(first.data), 1, incoming.received_bytes
    call.move(size)
    try:
        while True:
            # The last bytes are written at once, all others in batches.
            if size >= BATCH_BYTES or incoming.received_bytes + size >= part.num_bytes:
                batch, written, waiting, size = b"".join(waiting), size, [], 0
                await in_thread(disk, incoming.append, batch)
                dispatcher.count_bytes(call.client, written)
                if incoming.received_bytes == part.num_bytes:
                    break
                # Acknowledged when written: the client's window then bounds what waits in this process's memory.
                yield incoming.received_bytes, False
            if (message := await read(call, stream)) is None:
                # Cut off: what came stays on the disk, and the next transfer goes on behind it.
                return
            waiting.append(message.data)
            size, messages = size + len(message.data), messages + 1
            call.move(len(message.data))
            # Not when a batch is full, which takes longer than `lost_s` on a slow line.
            dispatcher.note_bytes(call.client, part.digest, incoming.received_bytes + size)
            gained = incoming.received_bytes + size - begins
            if messages > FREE_MESSAGES and gained < (messages - FREE_MESSAGES) * smallest:
                raise rejection(pb.LENGTH, "data", f"messages of {smallest} bytes or more", f"{messages} in {gained}")
        if incoming.finish():
            # A part that is here is no longer missing; the call must not end for that.
            call.check = admitted
            dispatcher.add_pushed_part(call.client, first.answer, part.digest)
            yield incoming.received_bytes, True
    finally:
        # Also when the call is cancelled, so that nothing is sent twice; a batch at most, so the loop goes on.
        if waiting and incoming.received_bytes + size <= part.num_bytes and path.exists():
            incoming.append(b"".join(waiting))
            dispatcher.count_bytes(call.client, size)
        incoming.close()


async def read(call: OpenCall, stream: AsyncIterator[pb.PushPart]) -> pb.PushPart | None:
    """Return the next message, or None at the stream's end.

    Raises:
        RejectionError: if the call must end.
    """
    if call.error is not None:
        raise call.error
    call.reading = True
    try:
        return await anext(stream, None)
    except asyncio.CancelledError:
        # The client has gone, unless the call was ended here.
        if call.error is None:
            raise
        while (task := asyncio.current_task()) is not None and task.uncancel():
            pass
        raise call.error from None
    finally:
        call.reading = False


async def open_upload(disk: Executor, path: Path, part: pb.Part, offset: int) -> uploads.IncomingUpload:
    """Open the file of an upload in a thread; cancelled meanwhile, close it again."""
    work = asyncio.get_running_loop().run_in_executor(disk, uploads.IncomingUpload, path, part, offset)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        # It has hashed what is there already, and nothing else would close it before the next collection of garbage.
        await asyncio.wait([work])
        if work.exception() is None:
            work.result().close()
        raise


async def in_thread(disk: Executor, function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Call a function in a thread, and return what it does; when cancelled, wait for its end all the same."""
    work = asyncio.get_running_loop().run_in_executor(disk, partial(function, *arguments, **options))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        # Else the thread would still write to a file that is closed, or is written to anew.
        await asyncio.wait([work])
        raise
