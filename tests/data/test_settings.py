from __future__ import annotations

import subprocess
import sys

from fedtune.data.settings import DataSettings, Split, faults


def test_settings_that_fit_have_no_faults() -> None:
    assert faults(DataSettings("x.jsonl", Split("iid", clients=2))) == []
    assert (
        faults(DataSettings("x.jsonl", Split("key", by="site", clients=2), template="Q: {instruction}\nA: {output}"))
        == []
    )


def test_a_split_names_every_setting_it_lacks_and_every_one_it_cannot_use() -> None:
    found = faults(DataSettings("x.jsonl", Split("dirichlet", sizes=[1])))
    assert [fault.path for fault in found] == [
        "data.split.by",
        "data.split.clients",
        "data.split.alpha",
        "data.split.sizes",
    ]


def test_a_template_must_be_known_or_end_in_the_output_once() -> None:
    for template in ("alpacca", "{output} and {input}", "{output}{output}"):
        (fault,) = faults(DataSettings("x.jsonl", Split("iid", clients=2), template=template))
        assert fault.path == "data.template"


def test_the_settings_can_be_imported_without_a_data_library() -> None:
    code = (
        "import sys, fedtune.data.settings; sys.exit(any(m in sys.modules for m in ('datasets', 'pyarrow', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
