from __future__ import annotations

from typing import Any

import pytest
import torch

from fedtune.errors import ClientError
from fedtune.messages import BaseDtype
from fedtune.model.base import Base, digest
from fedtune.model.lora import with_adapters
from fedtune.model.quantised_layers import quantised_layers
from fedtune.model.settings import QUANTISED
from fedtune.model.variants import variant


def logits(base: Base) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = base.model(input_ids=torch.arange(3, 19)[None]).logits
        return result


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_variant_holds_codes_beside_the_base_s_own_weights(name: str, loaded: Any) -> None:
    """And nothing else: embeddings, norms and biases are the base's own tensors."""
    base = loaded(name, targets=["all-linear"])
    before, expected = digest(base.model), logits(base)
    for kind in QUANTISED:
        other = variant(base, kind)
        assert variant(base, kind) is other
        streamed = loaded(name, targets=["all-linear"], dtype=kind)
        assert torch.equal(logits(other), logits(streamed))
        assert (other.digest, other.manifest, other.codes) == (base.digest, base.manifest, streamed.codes)
        assert (other.dtype, other.num_parameters, other.transposed) == (kind, base.num_parameters, base.transposed)
        own = {id(parameter) for parameter in base.model.parameters()}
        assert all(id(parameter) in own for parameter in other.model.parameters())
        assert not quantised_layers(base.model)
        assert variant(streamed, kind) is variant(streamed, "") is streamed
    assert variant(base, "") is base
    assert digest(base.model) == before
    assert torch.equal(logits(base), expected)


def test_codes_of_one_format_are_not_made_of_those_of_another(loaded: Any) -> None:
    base = loaded(dtype="nf4")
    wanted: BaseDtype = "int8"
    with pytest.raises(ClientError, match=r"expected a plan over nf4, .*; got int8; .*model.dtype = \"float32\""):
        variant(base, wanted)


def test_adapters_on_a_variant_leave_the_base_as_it_is(loaded: Any) -> None:
    base = loaded(saved=["lm_head"])
    other, before = variant(base, "nf4"), digest(base.model)
    saved = {name: array + 1.0 for name, array in base.saved_tensors().items()}
    with with_adapters(other, saved=saved):
        assert not torch.equal(logits(other), logits(base))
    assert digest(base.model) == before
