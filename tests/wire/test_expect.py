from __future__ import annotations

import pytest

from fedtune.errors import WireError
from fedtune.wire.expect import expect


def test_what_holds_passes_and_what_does_not_is_named_with_what_came() -> None:
    expect(True, "anything", "something")
    with pytest.raises(WireError, match=r"^expected at most 2 bytes; got 3$"):
        expect(False, "at most 2 bytes", 3)
    with pytest.raises(WireError, match=r"^expected this release; got another; update it$"):
        expect(False, "this release", "another", hint="update it")
