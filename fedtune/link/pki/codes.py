"""A request, a bundle or an invitation as one line of text that can be pasted through a chat program or a mail."""

from __future__ import annotations

import base64
import re
import zlib
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Literal, TypeAlias

from fedtune.errors import Fault, WireError
from fedtune.link.pki.enrollment import read_received

Kind: TypeAlias = Literal["request", "bundle", "invitation"]

DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
"""Letters and digits alone: chat programs turn what stands between marks into italics, and two hyphens into a dash."""
GROUP, WIDTH = 32, 43
"""Bytes that are written together, and the digits that they take: 62^43 is just above 256^32."""
CHECK = 8
"""Digits of the check, of the SHA-256 of kind and content: a code that was changed by chance passes once in 10^14."""
MAX_BYTES = 64 * 2**10
"""Of the content; longer ones travel as files."""
DEPTH = 3
"""Levels of Base64 within each other: keys in a signed text, in an envelope."""
WRAPPED = re.compile(rb"(?:[A-Za-z0-9+/]{4}){6,}(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")
MAX_PASTED = 4000
"""Characters of a code that common chat programs send as one message."""
LONGEST_PATH = 512
MAX_TEXT = 2 * MAX_BYTES
"""Characters of a text in which a code is looked for."""

# Chat programs and mails put breaks, quote marks and invisible characters between the letters of a line.
NOISE = re.compile(r"[\s>|`*\u00ad\u200b-\u200f\u2028-\u202f\u2060-\u2069\ufeff]+")
START = re.compile(r"fedtune\.(request|bundle|invitation)\.(\d{1,6})\.([0-9A-Za-z]*)(?:\.([0-9A-Za-z]*))?")


def encode(kind: Kind, data: bytes) -> str:
    """Return a file that parties send each other as a line of letters, digits and dots.

    The line says what it is, how long its content is, the content (compressed) and a check.

    >>> encode("request", b"abc")
    'fedtune.request.19.fi1c8QQKdokT6xwbPi6.v1lpzGzc'
    """
    body = _write(zlib.compress(_unwrap(data), 9))
    return f"fedtune.{kind}.{len(body)}.{body}.{_check(kind, data)}"


def decode(kind: Kind, text: str) -> bytes:
    """Return the file that a pasted text holds, whatever a chat program has put around and between its letters.

    Raises:
        WireError: if there is no code in it, half of one, one of the other kind, or one that was changed.
    """
    match = START.search(NOISE.sub("", text[:MAX_TEXT]))
    if match is None:
        got = f"{text.strip()[:24]!r}" if text.strip() else "nothing"
        raise _fault(kind, f"{got}, in which none begins with fedtune.{kind}.")
    found_kind, length, body, check = match.groups()
    if found_kind != kind:
        places = {
            "bundle": "a bundle goes to the device: fedtune-edge enroll CODE, or fedtune enroll accept",
            "request": "a request goes to the operator: fedtune enroll sign CODE",
            "invitation": "an invitation goes to the site: fedtune enroll --code CODE, or fedtune-edge enroll CODE",
        }
        raise _fault(kind, f"that of a {found_kind}", places[found_kind])
    # What follows the check, such as the next line of the message, has run into it with the spaces gone.
    if len(body) < int(length) or check is None or len(check) < CHECK:
        have, total = len(match[0]), len(f"fedtune.{kind}.{length}..") + int(length) + CHECK
        raise _fault(kind, f"the first {have} of its {total} characters", "copy the whole of it")
    try:
        data = _wrap(_inflate(kind, _read(body)))
    except (ValueError, IndexError, zlib.error):
        data = None
    if data is None or len(body) > int(length) or check[:CHECK] != _check(kind, data):
        hint = "copy it again, or send the file"
        raise _fault(kind, "one that was changed on its way: its check does not hold", hint)
    return data


def kind_of(given: str) -> Kind | None:
    """Return what a code says that it is, pasted or in a file; None if it is no code."""
    if (match := START.search(NOISE.sub("", given[:MAX_TEXT]))) is None and len(given) <= LONGEST_PATH:
        try:
            with Path(given).open("rb") as file:
                match = START.search(NOISE.sub("", file.read(MAX_TEXT).decode("utf-8", "replace")))
        except (OSError, ValueError):
            return None
    kinds: dict[str, Kind] = {"request": "request", "bundle": "bundle", "invitation": "invitation"}
    return kinds.get(match[1]) if match is not None else None


def read_given(kind: Kind, given: str, step: str, lines: Iterable[str] = ()) -> bytes:
    """Return what another party has sent, given as the path of a file, as a pasted code, or as `-` for lines to read.

    Args:
        kind: of what is expected; a file may hold it as it was written, or as a code.
        given: the path, the code or `-`.
        step: the command that writes it, for messages.
        lines: read up to the end of the first code, for `-`.

    Raises:
        WireError: as `decode`.
        ConfigError: if there is no such file.
    """
    if given == "-":
        return decode(kind, _first_code(lines))
    # No file has so long a name: it is a text in which the start of the code is missing.
    if START.search(NOISE.sub("", given)) is not None or len(given) > LONGEST_PATH:
        return decode(kind, given)
    data = read_received(Path(given), f"a {kind}", step)
    text = data[:MAX_TEXT].decode("utf-8", "replace")
    # A saved message; the file itself is JSON, in which no code can stand.
    return decode(kind, text) if not text.lstrip().startswith("{") and START.search(NOISE.sub("", text)) else data


def _first_code(lines: Iterable[str]) -> str:
    """Return the lines up to the end of a code: at a terminal the last line break may be the only sign of it."""
    text = ""
    for line in lines:
        text += line
        match = START.search(NOISE.sub("", text))
        if len(text) > MAX_TEXT or (match and len(match[3]) >= int(match[2]) and len(match[4] or "") >= CHECK):
            break
    return text


def _check(kind: Kind, data: bytes) -> str:
    return _write(sha256(f"{kind}\0".encode() + data).digest())[:CHECK]


def _write(data: bytes) -> str:
    groups = (data[at : at + GROUP] for at in range(0, len(data), GROUP))
    return "".join(
        _digits(int.from_bytes(b"\1" + group) if len(group) < GROUP else int.from_bytes(group), len(group))
        for group in groups
    )


def _digits(number: int, count: int) -> str:
    # Of a last, shorter group the leading byte 1 says how many bytes there are.
    digits = ""
    while number:
        number, digit = divmod(number, len(DIGITS))
        digits = DIGITS[digit] + digits
    return digits.rjust(WIDTH, DIGITS[0]) if count == GROUP else digits


def _read(body: str) -> bytes:
    data = b""
    for at in range(0, len(body), WIDTH):
        number = 0
        for digit in body[at : at + WIDTH]:
            number = number * len(DIGITS) + DIGITS.index(digit)
        if len(body) - at >= WIDTH:
            if number >> (8 * GROUP):
                raise ValueError
            data += number.to_bytes(GROUP)
        else:
            last = number.to_bytes((number.bit_length() + 7) // 8)
            if last[:1] != b"\1":
                raise ValueError
            data += last[1:]
    return data


def _inflate(kind: Kind, packed: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    data = unpacker.decompress(packed, MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise _fault(kind, f"one of more than {MAX_BYTES} bytes", "send the file instead")
    if not unpacker.eof or unpacker.unused_data:
        raise ValueError
    return data


def _unwrap(data: bytes, depth: int = DEPTH) -> bytes:
    """Return bytes with what is in Base64 decoded, at any depth: what repeats in it is found by the compression.

    Pieces, each with its length before it, are alternately as they were and out of Base64.
    """
    pieces, end = list[bytes](), 0
    for match in WRAPPED.finditer(data) if depth else ():
        content = base64.b64decode(match[0])
        if base64.b64encode(content) == match[0]:
            pieces += [data[end : match.start()], _unwrap(content, depth - 1)]
            end = match.end()
    return b"".join(len(piece).to_bytes(3) + piece for piece in [*pieces, data[end:]])


def _wrap(data: bytes, depth: int = DEPTH) -> bytes:
    """Return the bytes that `_unwrap` was given."""
    pieces, at, inside = list[bytes](), 0, False
    while at < len(data):
        length = int.from_bytes(data[at : at + 3])
        piece = data[at + 3 : at + 3 + length]
        if len(piece) < length or (inside and not depth):
            raise ValueError
        pieces.append(base64.b64encode(_wrap(piece, depth - 1)) if inside else piece)
        at, inside = at + 3 + length, not inside
    return b"".join(pieces)


def _fault(kind: Kind, got: str, hint: str = "copy the whole line, or send the file") -> WireError:
    return WireError(str(Fault("code", f"the code of a {kind}", got, hint)))
