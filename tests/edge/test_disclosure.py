from __future__ import annotations

from typing import Any

from fedtune.edge.disclosure import STEPS, WORDS, profile_sent, scores_sent, statement_sent, update_sent
from fedtune.link.envelopes import build_version
from fedtune.link.settings import Policy
from fedtune.messages import ProbeSeeds
from fedtune.wire.codec import decode_update
from fedtune.wire.profile import ClientProfile, ModelSpec, decode_profile
from fedtune.wire.scores import decode_scores
from fedtune.wire.v1 import link_pb2, round_pb2

PROFILE = ClientProfile(
    "kitchen", 357, ModelSpec("ab" * 32, {"layer": (2, 3)}, parameters=6), methods=("fedkseed",), held_out=40
)


def test_every_field_of_every_message_has_words() -> None:
    for message in (round_pb2.ClientProfile, round_pb2.ProbeUpdate, round_pb2.ScoreUpdate, link_pb2.Header):
        names = {field.name for field in message.DESCRIPTOR.fields}
        assert names == WORDS[message.DESCRIPTOR.name].keys(), message.DESCRIPTOR.name


def test_no_field_without_words_is_sent() -> None:
    messages = [profile_sent(PROFILE), update_sent(PROFILE, steps=20, policy=Policy()), scores_sent(PROFILE)]
    messages.append(statement_sent("kitchen", messages[1].data, federation="care"))
    assert all(field.words for message in messages for field in message.fields)


def test_the_fields_of_a_message_are_all_of_its_bytes() -> None:
    for message in (profile_sent(PROFILE), update_sent(PROFILE, steps=20, policy=Policy()), scores_sent(PROFILE)):
        assert sum(field.num_bytes for field in message.fields) == len(message.data)


def test_what_is_shown_is_what_the_server_reads() -> None:
    sent = profile_sent(PROFILE)
    blob = round_pb2.ClientProfile.FromString(sent.data).saved
    read = decode_profile(sent.data, {blob.digest.hex(): b""})
    assert (read.client, read.num_examples, read.held_out) == ("kitchen", 357, 40)
    for steps in STEPS:
        update = decode_update(
            update_sent(PROFILE, steps=steps, policy=Policy()).data,
            client="kitchen",
            limit_bytes=1 << 20,
            task=ProbeSeeds,
        )
        assert len(update.probe.scalars) == steps
    assert decode_scores(scores_sent(PROFILE).data, client="kitchen").metrics["examples"] == 40


def test_an_answer_is_a_byte_for_each_direction_and_little_more() -> None:
    sizes = [len(update_sent(PROFILE, steps=steps, policy=Policy()).data) for steps in (100, 101, 200)]
    assert sizes[1] == sizes[0] + 1
    assert sizes[2] <= 260


def test_losses_and_joules_are_sent_only_where_the_policy_sends_them() -> None:
    def names(**policy: Any) -> set[str]:
        return {field.name for field in update_sent(PROFILE, steps=20, policy=Policy(**policy)).fields}

    assert names() & {"loss_before", "loss_after", "joules"} == {"loss_before", "loss_after"}
    assert not names(scores="keep") & {"loss_before", "loss_after"}
    assert "joules" in names(energy="send")


def test_the_statement_names_the_device_its_federation_and_its_program() -> None:
    shown = {field.name: field.value for field in statement_sent("kitchen", b"x" * 76, federation="care").fields}
    assert (shown["author"], shown["federation"], shown["build"]) == ("kitchen", "care", build_version())
