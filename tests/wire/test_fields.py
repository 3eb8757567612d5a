from __future__ import annotations

from fedtune.wire.fields import fields
from fedtune.wire.v1 import round_pb2 as pb

WORDS = {field.name: f"what {field.name} says" for field in pb.ClientProfile.DESCRIPTOR.fields}


def test_values_are_short_and_say_how_long_they_are() -> None:
    modules = [pb.Module(name="a", out_features=2)]
    message = pb.ClientProfile(manifest=bytes(5000), labels=["a", "b", "c", "d"], modules=modules, examples=3)
    shown = {field.name: field.value for field in fields(message, WORDS)}
    assert shown["manifest"].endswith("... (5000 bytes)")
    assert (shown["labels"], shown["modules"], shown["examples"]) == ("a, b, c, ... (4)", "a", "3")


def test_fields_add_up_to_the_message() -> None:
    scores = pb.ScoreUpdate(client="ann", metrics={"loss": 2.5, "examples": 4}, seconds=1.5)
    words = {field.name: "" for field in pb.ScoreUpdate.DESCRIPTOR.fields}
    shown = fields(scores, words)
    assert sum(field.num_bytes for field in shown) == len(scores.SerializeToString())
    assert [field.value for field in shown] == ["ann", "examples 4, loss 2.5", "1.5"]
    device = pb.ClientProfile(device=pb.Device(cores=4), transposed=True)
    assert [field.value for field in fields(device, WORDS)] == ["True", "cores: 4"]
