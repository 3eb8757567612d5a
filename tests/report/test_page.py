from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedtune.api import report
from fedtune.errors import StoreError
from fedtune.report.headline import headline
from fedtune.report.page import loss_tiles, report_page, write_report
from fedtune.report.plots import PLOTS
from fedtune.report.reader import read_run
from tests.golden.archives import unpack
from tests.report.conftest import WriteRun, write_directory

HOSTILE = '<script>alert("x")</script>&\'--><img src=http://evil.example/x>$y^2$病'


class Reader(HTMLParser):
    """Collects elements, addresses and text; every element that is opened must be closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.handlers: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag != "meta":
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag != "meta":
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the plain run; drawing it takes a second or two."""
    run = write_directory(tmp_path_factory.mktemp("plain") / "run", clients=4, rounds=3, seed=0)
    (run / "adapter").mkdir()
    return write_report(run)


def test_the_page_needs_nothing_else(page: Path) -> None:
    reader = read(page)
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in reader.addresses)
    assert not reader.tags & {"script", "link", "iframe", "img", "object", "form", "base"}
    assert "@import" not in page.read_text(encoding="utf-8")
    assert "url(http" not in page.read_text(encoding="utf-8")
    assert len(reader.ids) == len(set(reader.ids))


def test_the_page_tells_the_key_numbers_digests_and_recipe(page: Path) -> None:
    text = " ".join(read(page).text)
    # Mean of 3.0 to 3.3 before; three rounds later 1 - 0.8^3 less.
    for expected in ("3.150 → 2.662", "3.300 → 2.812", "4 of 4", "12 kB", "24 kB", "9f3c2b7d" * 8, "41aa0c55" * 8):
        assert expected in text
    for expected in ("flora", "torch 2.13.0", "tiny-llama", 'name = "dolly-4"', "The pancreas.", "client-3"):
        assert expected in text


def test_the_first_sentence_says_what_happened_and_how_to_load_it(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert headline(read_run(page.parent)) in "".join(read(page).text)
    assert text.index('<p class="lead">') < text.index("<dl>")
    assert "fedtune chat run" in text
    assert "2027-01-15 08:00 UTC" in text


def test_links_lead_to_sections_that_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    anchors = re.findall(r'<a href="#([a-z]+)"', text)
    assert len(anchors) == 7
    assert all(f'<section id="{anchor}">' in text for anchor in anchors)


def test_figures_follow_the_page_and_the_width_and_show_texts_under_the_pointer(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    figures = "".join(re.findall(r"<svg .*?</svg>", text, flags=re.DOTALL))
    assert "var(--ink)" in figures
    assert "#1d2b33" not in figures
    assert "min-width: 33rem" not in text
    assert "<title>client-0, round 1: failed: out of memory</title>" in figures
    assert re.search(r"<title>round 1: [0-9.]+ kB up</title>", figures)
    assert "<title>test, round 0: 3.150</title>" in figures


def test_figures_for_experts_are_folded(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    folded = "".join(re.findall(r"<details>.*?</figure>", text, flags=re.DOTALL))
    for name in ("loss-by-bytes", "ranks"):
        assert f'<figure class="{name}">' in folded
    assert text.index('<figure class="loss-by-round">') < text.index("Loss by traffic and by time")


def test_failures_are_told_by_name_and_reason(page: Path) -> None:
    text = "|".join(read(page).text)
    assert "1|client-0|failed|out of memory" in text
    assert "norm 41.2 > 10.0" in text


def test_every_figure_stands_beside_the_page_as_png(page: Path) -> None:
    folder = page.parent / "plots"
    assert page.name == "report.html"
    assert {file.name for file in folder.iterdir()} == {f"{name}.png" for name in PLOTS}
    assert all(file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for file in folder.iterdir())
    assert page.read_text(encoding="utf-8").count("<svg ") == len(PLOTS)
    assert page.read_text(encoding="utf-8").count("<summary>Numbers</summary>") == len(PLOTS)


def test_the_same_run_gives_the_same_page(page: Path, write_run: WriteRun) -> None:
    run = write_run(clients=4, rounds=3, seed=0)
    (run / "adapter").mkdir()
    second = write_report(run)
    assert second.read_bytes() == page.read_bytes()
    for name in PLOTS:
        assert (second.parent / f"plots/{name}.png").read_bytes() == (page.parent / f"plots/{name}.png").read_bytes()


def poison(value: Any) -> Any:
    """Put the hostile text in place of every text and every client's, module's, package's name."""
    if isinstance(value, dict):
        kept = value.keys() & {"status", "state"}
        return {
            (key if key.isidentifier() else f"{HOSTILE}{key}"): (item if key in kept else poison(item))
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [poison(item) for item in value]
    return f"{HOSTILE}{value}" if isinstance(value, str) else value


def test_hostile_names_samples_reasons_and_recipes_stay_text(write_run: WriteRun) -> None:
    path = write_run()
    lines = [poison(json.loads(line)) for line in (path / "rounds.jsonl").read_text().splitlines()]
    (path / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "summary.json").write_text(json.dumps(poison(json.loads((path / "summary.json").read_text()))))
    (path / "recipe.toml").write_text(f"# {HOSTILE}\n", encoding="utf-8")
    page = write_report(path)
    reader = read(page)
    assert not reader.tags & {"script", "img"}
    assert reader.handlers == []
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in reader.addresses)
    assert f"{HOSTILE}out of memory" in reader.text
    assert f"{HOSTILE}The pancreas." in reader.text
    assert f"# {HOSTILE}\n" in reader.text


@pytest.mark.usefixtures("unrendered")
def test_an_interrupted_run_says_so_and_shows_what_it_has(write_run: WriteRun) -> None:
    path = write_run(rounds=3)
    (path / "summary.json").unlink()
    (path / "rounds.jsonl").write_bytes((path / "rounds.jsonl").read_bytes()[:-30])
    text = " ".join(read(write_report(path)).text)
    assert "interrupted after round 2" in text
    assert "was cut off by the interruption" in text
    assert "3.150 → 2.790" in text


@pytest.mark.usefixtures("unrendered")
def test_a_figure_that_a_run_cannot_fill_is_left_out(write_run: WriteRun) -> None:
    def edit(lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        for line in lines:
            line |= {"held_out": {}, "modules": {}, "test": None, "loss_before": None, "loss_after": None}
        summary |= {"before": {}, "after": {}, "sample": None, "failures": []}

    path = write_run(edit=edit)
    (path / "plots").mkdir()
    (path / "plots" / "spectrum.png").write_bytes(b"of an earlier report")
    page = write_report(path)
    assert {file.stem for file in (path / "plots").iterdir()} == {"choices", "clients", "device-times", "traffic"}
    text = " ".join(read(page).text)
    assert "Answers before and after" not in text
    assert "every update that was asked for came back" in text


@pytest.mark.slow
def test_a_hundred_clients_and_two_hundred_rounds_fit(write_run: WriteRun) -> None:
    page = write_report(write_run(clients=100, rounds=200, layers=22))
    assert page.stat().st_size < 50_000_000
    assert len(re.findall("<svg ", page.read_text())) == len(PLOTS)


def test_every_prompt_has_its_answers_and_their_scores(write_run: WriteRun) -> None:
    path = write_run("run")
    question = {"prompt": "Who <guards>?", "before": "No", "after": "The dog.", "reference": "A dog."}
    scores = {"before": {"rouge_l": 0.0, "loss": 3.25}, "after": {"rouge_l": 0.5, "loss": 1.5}}
    summary = json.loads((path / "summary.json").read_text())
    summary["samples"] = [{**question, "scores": scores}, {"prompt": "Why?", "before": "", "after": "So."}]
    (path / "summary.json").write_text(json.dumps(summary))
    text = report_page(read_run(path), {})
    assert text.count('<div class="sample">') == 3
    assert "Who &lt;guards&gt;?" in text
    assert "Rouge-L 0.5000, reference loss 1.500" in text
    assert "A dog." in text


def test_the_worst_client_at_the_end_stands_beside_its_own_start(write_run: WriteRun) -> None:
    path = write_run("run", clients=2, rounds=1)
    summary = json.loads((path / "summary.json").read_text())
    for moment, losses in (("before", (5.0, 4.0)), ("after", (1.0, 3.0))):
        for name, loss in zip(("client-0", "client-1"), losses, strict=True):
            summary[moment]["held_out"][name]["loss"] = loss
        worst = max(("client-0", "client-1"), key=lambda name: summary[moment]["held_out"][name]["loss"])
        summary[moment]["worst"] = {"client": worst, **summary[moment]["held_out"][worst]}
    (path / "summary.json").write_text(json.dumps(summary))
    [tile] = [tile for tile in loss_tiles(read_run(path)) if tile.title == "worst client"]
    assert (tile.value, tile.note) == ("4.000 → 3.000", "client-1")


def test_the_worst_tenth_has_a_tile_and_rows_of_its_own(write_run: WriteRun) -> None:
    path = write_run("run", clients=2, rounds=1)
    assert "worst tenth" not in [tile.title for tile in loss_tiles(read_run(path))]
    summary = json.loads((path / "summary.json").read_text())
    for moment, loss in (("before", 5.0), ("after", 3.0)):
        summary[moment]["worst_tenth"] = {"loss": loss, "accuracy": 0.25, "clients": 2, "examples": 9}
    (path / "summary.json").write_text(json.dumps(summary))
    run = read_run(path)
    [tile] = [tile for tile in loss_tiles(run) if tile.title == "worst tenth"]
    assert (tile.value, tile.note) == ("5.000 → 3.000", "2 clients")
    assert "worst tenth of clients (2)" in report_page(run, {})


@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize("files", [(), ("recipe.toml",), ("summary.json",), ("recipe.toml", "summary.json")])
@pytest.mark.parametrize("name", ["flora", "fedkseed"])
def test_a_copy_of_a_run_of_0_2_0_is_drawn_from_what_is_there(
    tmp_path: Path, name: str, files: tuple[str, ...]
) -> None:
    run, copy = unpack(name, tmp_path), tmp_path / "a copy, elsewhere"
    copy.mkdir()
    for file in ("rounds.jsonl", *files):
        if (run / file).exists():
            shutil.copy(run / file, copy / file)
    page = report(copy, pictures=False).read_text(encoding="utf-8")
    assert ("recipe.toml is not in the folder" in page) == ("recipe.toml" not in files)
    assert "Loss by round" in page


@pytest.mark.usefixtures("unrendered")
def test_a_copy_without_its_adapter_does_not_say_how_to_load_it(write_run: WriteRun) -> None:
    run = write_run()
    assert "PeftModel.from_pretrained" not in write_report(run, pictures=False).read_text(encoding="utf-8")
    (run / "adapter").mkdir()
    assert "PeftModel.from_pretrained" in write_report(run, pictures=False).read_text(encoding="utf-8")


@pytest.mark.usefixtures("unrendered")
def test_a_folder_that_cannot_be_written_is_named(write_run: WriteRun) -> None:
    run = write_run(rounds=1)
    (run / "report.html.part").mkdir()  # as a read-only folder, which an administrator could write all the same
    with pytest.raises(StoreError, match="run: expected to read or write it; Is a directory"):
        report(run, pictures=False)
