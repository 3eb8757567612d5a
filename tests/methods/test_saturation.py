from __future__ import annotations

from fedtune.methods.saturation import forecast, round_flops


def say(*, rounds: int, size: int = 1024, layers: int = 2) -> list[str]:
    modules = {f"layers.{i}.q_proj": (size, size) for i in range(layers)} | {"layers.0.v_proj": (256, size)}
    return list(forecast(modules, grows_by=160, largest=16, rounds=rounds, number_bytes=2))


def test_ten_clients_of_rank_16_fill_a_layer_of_1024_in_round_7() -> None:
    assert say(rounds=30) == [
        "the exact state of 2 q_proj (1024 x 1024) is full in round 7 of 30",
        "the exact state of 1 v_proj (256 x 1024) is full in round 2 of 30",
        "from then on a client downloads 4.72 MB a round for these layers, and the server works about 0.54 s a round "
        'on one core; method.state_max_rank = "auto" keeps rank 32 at most',
    ]


def test_what_ends_before_it_is_full_says_nothing() -> None:
    assert say(rounds=1) == []
    assert len(say(rounds=2)) == 2  # v_proj alone


def test_a_round_of_more_than_a_minute_is_warned_about_with_the_number() -> None:
    *_, last = say(rounds=50, size=4096, layers=64)
    seconds = 64 * round_flops(4096, 4096, grows_by=160, largest=16) / 1e10
    assert seconds > 60
    assert f"about {seconds:.2g} s a round on one core, more than 60" in last
    assert "more than" not in say(rounds=50, size=4096, layers=2)[-1]
