"""What of a device's own file a bundle can follow, and whose bundle it takes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.config.site import Layers, SiteSettings, bind_site
from fedtune.edge.base import layer_faults, model_faults, named_modules, own_roster
from fedtune.edge.bundle import Bundle, Module, read_bundle
from fedtune.errors import ConfigError
from tests.edge.bundles import write_bundle
from tests.edge.speaking import write_device
from tests.link.ceremony import enroll_parties

FRONT = 'name = "site-a"\n[model]\nbase = "bundle"\n[data]\nsource = "rows.txt"\n'


@pytest.fixture
def settings(tmp_path: Path) -> SiteSettings:
    write_bundle(tmp_path / "bundle")
    (tmp_path / "site.toml").write_text(FRONT)
    return bind_site(tmp_path / "site.toml")


@pytest.fixture
def bundle(settings: SiteSettings) -> Bundle:
    whole = read_bundle(settings.root / "bundle")
    modules = {f"layers.{block}.{leaf}": Module(2, 3) for block in (0, 1) for leaf in ("q_proj", "up_proj")}
    return replace(whole, facts=replace(whole.facts, modules=modules))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "classification"}, "model.task: expected 'causal'"),
        ({"revision": "main"}, "model.revision: expected none"),
        ({"dtype": "nf4"}, "model.dtype: expected 'float32', the format of this bundle; got 'nf4'"),
        ({"kernels": "bitsandbytes"}, "model.kernels"),
        (
            {"device": "cuda"},
            "model.device: expected 'cpu' for a bundle; got 'cuda'; leave it out, or run fedtune-client",
        ),
        ({"processes": 2}, "model.processes: expected 1"),
        ({"digest": "cd" * 32}, "model.base: expected the base that the file names, cdcdcdcdcdcd"),
    ],
)
def test_a_setting_that_a_bundle_cannot_follow_is_named(
    changes: dict[str, Any], said: str, settings: SiteSettings, bundle: Bundle
) -> None:
    [fault] = model_faults(replace(settings.model, **changes), bundle)
    assert said in str(fault)


def test_settings_of_a_bundle_itself_are_no_fault(settings: SiteSettings, bundle: Bundle) -> None:
    own = replace(settings.model, dtype="float32", device="cpu", threads=4, digest=bundle.base_digest)
    assert not [*model_faults(own, bundle), *model_faults(settings.model, bundle), *layer_faults(settings, bundle)]


@pytest.mark.parametrize(
    ("targets", "count"), [(None, 4), (["all-linear"], 4), (["q_proj"], 2), (["layers.1.*"], 2), (["1.up_proj"], 1)]
)
def test_layers_are_those_that_the_file_names(targets: Any, count: int, settings: SiteSettings, bundle: Bundle) -> None:
    chosen = replace(settings, adapter=targets and Layers(targets))
    assert not [*layer_faults(chosen, bundle)]
    names = list(named_modules(chosen, bundle))
    assert (len(names), names) == (count, sorted(names))


def test_layers_that_the_bundle_lacks_are_named(settings: SiteSettings, bundle: Bundle) -> None:
    odd = replace(settings, adapter=Layers(["lm_head", "gate*"], ["score"]))
    first, second, third = map(str, layer_faults(odd, bundle))
    assert first == "adapter.modules_to_save: expected none for a device, which trains no module in full; got score"
    assert second == "adapter.targets: expected layers of the bundle (q_proj, up_proj); got 'lm_head', which is none"
    assert "'gate*', which fits none" in third


def test_a_device_that_is_enrolled_takes_a_bundle_that_its_coordinator_has_signed(
    settings: SiteSettings, tmp_path: Path
) -> None:
    assert own_roster(settings) is None
    places = enroll_parties(tmp_path / "ca")
    (tmp_path / "site.toml").write_text(FRONT + f'[link]\naddress = "localhost:1"\nidentity = "{places["site-a"]}"\n')
    enrolled = bind_site(tmp_path / "site.toml")
    roster = own_roster(enrolled)
    assert roster is not None
    assert "site-a" in roster.parties
    with pytest.raises(ConfigError, match="signed by a coordinator"):
        read_bundle(enrolled.root / "bundle", roster)


def test_reading_texts_takes_no_more_threads_than_the_file_allows(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    site, _ = write_device(tmp_path, checkpoints["llama"])
    site.write_text(site.read_text().replace("[data]", "threads = 3\n[data]"))
    code = f"""
import os
from pathlib import Path
from fedtune.config.site import bind_site
from fedtune.edge.base import open_base
before = len(os.listdir("/proc/self/task"))
opened = open_base(bind_site(Path({str(site)!r})), source="x")
opened.tokenizer(["the quick fox"] * 99)
print(len(os.listdir("/proc/self/task")) - before)
"""
    # The tests themselves run without threads of that package.
    own = ("RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == 3
