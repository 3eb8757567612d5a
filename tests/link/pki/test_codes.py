from __future__ import annotations

import io
import textwrap
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import ConfigError, WireError
from fedtune.link.pki import codes, enrollment


@pytest.fixture(scope="module")
def request_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return enrollment.make_request(tmp_path_factory.mktemp("pki") / "x", name="site-a", org="a", role="client")


def refusal(text: str, kind: codes.Kind = "request") -> str:
    with pytest.raises(WireError) as caught:
        codes.decode(kind, text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@given(st.binary(max_size=300) | st.text("ab+/=").map(str.encode), st.sampled_from(["request", "bundle"]))
def test_any_bytes_come_back(data: bytes, kind: codes.Kind) -> None:
    assert codes.decode(kind, codes.encode(kind, data)) == data


def test_a_code_is_shorter_than_its_file_and_has_letters_and_digits_alone(request_file: bytes) -> None:
    code = codes.encode("request", request_file)
    assert len(code) <= len(request_file) < 1100
    assert code.replace(".", "").isalnum()
    assert code.isascii()


@given(st.data())
def test_what_chat_programs_do_to_a_line_is_undone(request_file: bytes, data: st.DataObject) -> None:
    code = codes.encode("request", request_file)
    noise = st.sampled_from(["\n", "\r\n> ", " ", "\u200b", "\xa0", "`", "**", "\u2028", "\t|"])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(code)), max_size=6)))
    pieces = [code[a:b] for a, b in zip([0, *cuts], [*cuts, len(code)], strict=True)]
    text = "".join(piece + data.draw(noise) for piece in pieces)
    before, after = (
        data.draw(st.sampled_from(["", "Here it is: ", "[10:42] kitchen: "])),
        data.draw(st.sampled_from(["", "\nregards", "\n\n[10:43] kitchen: did it work?", "."])),
    )
    assert codes.decode("request", before + text + after) == request_file


def test_lines_of_a_mail_are_one_code(request_file: bytes) -> None:
    code = codes.encode("request", request_file)
    assert codes.decode("request", "\n> ".join(textwrap.wrap(code, 72))) == request_file


def test_half_a_code_says_how_much_of_it_there_is(request_file: bytes) -> None:
    code = codes.encode("request", request_file)
    text = refusal(code[: len(code) // 2])
    assert f"got the first {len(code) // 2} of its {len(code)} characters; copy the whole of it" in text
    for end in (len("fedtune.request.9"), len(code) - 1, len(code) - 9, len(code) - 8):
        assert "code: expected the code of a request; got" in refusal(code[:end])
    assert "in which none begins with fedtune.request." in refusal(code[len(code) // 2 :])
    assert "got nothing" in refusal("  \n")


@given(st.data())
def test_any_other_letter_is_found(request_file: bytes, data: st.DataObject) -> None:
    code = codes.encode("request", request_file)
    start = code.index(".", len("fedtune.request.")) + 1
    place = data.draw(st.integers(start, len(code) - 1).filter(lambda at: code[at] != "."))
    other = data.draw(st.sampled_from(codes.DIGITS).filter(lambda digit: digit != code[place]))
    text = refusal(code[:place] + other + code[place + 1 :])
    assert "its check does not hold; copy it again" in text or "more than" in text


def test_a_lost_or_doubled_letter_is_found(request_file: bytes) -> None:
    code = codes.encode("request", request_file)
    assert "characters" in refusal(code[:200] + code[201:])
    assert "its check does not hold" in refusal(code[:200] + code[199:])


def test_a_code_of_the_other_kind_says_where_it_belongs(request_file: bytes) -> None:
    text = refusal(codes.encode("request", request_file), "bundle")
    assert text.startswith("code: expected the code of a bundle; got that of a request; a request goes to the operator")
    assert "fedtune-edge enroll CODE" in refusal(codes.encode("bundle", b"x"))


def test_a_code_of_endless_content_is_refused() -> None:
    body = codes._write(zlib.compress(bytes(10 * codes.MAX_BYTES)))
    text = refusal(f"fedtune.request.{len(body)}.{body}.AAAAAAAA")
    assert "send the file instead" in text


def test_a_file_its_code_a_saved_message_and_lines_are_read_alike(tmp_path: Path, request_file: bytes) -> None:
    code = codes.encode("request", request_file)
    (tmp_path / "a.json").write_bytes(request_file)
    (tmp_path / "a.txt").write_text(f"hello\n{code}\n")
    for given_ in (str(tmp_path / "a.json"), code, f" {code}\n", str(tmp_path / "a.txt")):
        assert codes.read_given("request", given_, "fedtune enroll request") == request_file
    lines = iter(["hello\n", code[:100] + "\n", code[100:] + "\n", "never read"])
    assert codes.read_given("request", "-", "x", lines) == request_file
    assert list(lines) == ["never read"]
    assert codes.read_given("request", "-", "x", io.StringIO(code)) == request_file
    with pytest.raises(ConfigError, match="it is made by fedtune enroll request"):
        codes.read_given("request", "none.json", "fedtune enroll request")
    with pytest.raises(WireError, match="in which none begins with"):
        codes.read_given("request", code[50:], "x")
    with pytest.raises(WireError, match="got nothing"):
        codes.read_given("request", "-", "x", [])


def test_a_code_says_what_it_is_pasted_or_in_a_file(tmp_path: Path) -> None:
    line = codes.encode("invitation", b"content")
    (tmp_path / "mail.txt").write_text(f"> {line[:9]}\n> {line[9:]}")
    assert codes.kind_of(line) == codes.kind_of(str(tmp_path / "mail.txt")) == "invitation"
    assert codes.kind_of(codes.encode("bundle", b"x")) == "bundle"
    assert [codes.kind_of(text) for text in ("", "-", str(tmp_path), "none", "x" * 9000, "\0")] == [None] * 6
