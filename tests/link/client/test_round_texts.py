from __future__ import annotations

from fedtune.link.client.round_texts import format_scores, format_work, verdict_text
from fedtune.wire.v1 import link_pb2 as pb


def test_a_training_is_its_losses_its_rank_and_its_time() -> None:
    measured = {"loss_before": 3.46912, "loss_after": 3.3, "seconds": 1.25, "tokens": 9.0}
    assert format_work(measured, 8) == "own loss 3.469 to 3.300, rank 8, 1.2 s"
    assert format_work({}, None) == "scalars along seeds, 0.0 s"


def test_scores_name_the_rows_that_they_are_of() -> None:
    assert (
        format_scores({"loss": 2.5, "perplexity": 12.2, "tokens": 40, "examples": 4}) == "loss 2.500 on 4 held-out rows"
    )
    assert format_scores({"accuracy": 0.75, "examples": 4.0, "loss": 1.0}).startswith("loss 1.000, accuracy 0.750 on 4")


def test_every_verdict_has_words() -> None:
    known = [one.number for one in pb.Verdict.DESCRIPTOR.values if one.number]
    assert not [number for number in known if verdict_text(number).startswith("verdict")]
    assert verdict_text(99) == "verdict 99"
