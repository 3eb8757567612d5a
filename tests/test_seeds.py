from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.seeds import derive, generator

ARGUMENTS = st.tuples(st.integers(0, 99), st.text(max_size=4), st.integers(0, 99), st.text(max_size=4))


def test_the_key_is_the_documented_hash() -> None:
    fields = [b"7", b"cohort", b"3", b"anna"]
    data = b"".join(len(field).to_bytes(8, "little") + field for field in fields)
    assert derive(7, "cohort", 3, "anna") == int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


@settings(max_examples=100, deadline=None)
@given(one=ARGUMENTS, other=ARGUMENTS)
def test_keys_are_equal_exactly_where_all_arguments_are(
    one: tuple[int, str, int, str], other: tuple[int, str, int, str]
) -> None:
    assert (derive(*one) == derive(*other)) == (one == other)


def test_fields_do_not_run_into_each_other() -> None:
    assert derive(1, "1a") != derive(11, "a")
    assert derive(0, "a", 1, "1") != derive(0, "a", 11, "")


def test_a_generator_repeats_and_differs_by_key() -> None:
    first, again, other = (generator(derive(seed, "test")).standard_normal(4) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
