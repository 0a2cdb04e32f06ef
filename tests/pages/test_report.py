"""The page: whole, true to its sources, and never broken by what is missing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from connectomics.errors import InputError
from connectomics.pages.report.build import build_report
from connectomics.pages.report.sources import ReportOptions, ReportSources

from .conftest import GRIDS, Made, balls

CHROMIUM = Path("/usr/bin/chromium")


class Reader(HTMLParser):
    """Collects tags with their attributes, ``<data>`` values, and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data + " "

    @property
    def values(self) -> list[float]:
        return [float(a["value"]) for tag, a in self.tags if tag == "data"]

    @property
    def notes(self) -> list[str]:
        return re.findall(r'<p class="note">(.*?)</p>', self.source)


@pytest.fixture(scope="module")
def page(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """The page of everything there is."""
    path = build_report(tmp_path_factory.mktemp("page") / "report.html", made.sources)
    return Reader(path)


# -- the whole page ----------------------------------------------------------------------------------------------------
def test_nothing_is_fetched_from_anywhere(page: Reader) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert tag != "script" or "src" not in attributes
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            value = attributes.get(name, "")
            assert not value or value.startswith(("#", "data:image/png;base64,", "data:image/jpeg;base64,")), (
                tag,
                value,
            )
    assert not re.search(r"url\(|@import|//[a-z]+\.", re.sub(r"data:image[^\"]*", "", page.source))


def test_links_within_the_page_lead_somewhere(page: Reader) -> None:
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for _, a in page.tags if a.get("href", "").startswith("#")} <= set(ids)


def test_every_tag_that_is_opened_is_closed(page: Reader) -> None:
    for tag in ("div", "section", "figure", "svg", "table", "tr", "td", "details", "article", "g", "dl", "p", "span"):
        assert page.source.count(f"<{tag}>") + page.source.count(f"<{tag} ") == page.source.count(f"</{tag}>"), tag


def test_every_crop_and_class_has_its_slices_in_three_planes(page: Reader) -> None:
    pictures = [a["aria-label"] for tag, a in page.tags if tag == "svg" and "aria-label" in a]
    for crop in GRIDS:
        for name in ("mito", "er"):
            for kind in ("raw", "truth", "prediction", "errors", "probability"):
                for plane in ("xy", "xz", "yz"):
                    assert any(p.startswith(f"{kind}: {crop} {name}, {plane} at ") for p in pictures), (
                        crop,
                        name,
                        kind,
                    )


def test_the_worst_crop_comes_first(page: Reader) -> None:
    articles = [a["id"] for tag, a in page.tags if tag == "article"]
    assert articles == ["crop-crop9", "crop-crop7"]


def test_numbers_are_those_of_the_scores_file(page: Reader, made: Made) -> None:
    for key in ("overall_score", "overall_instance_score", "overall_semantic_score"):
        assert page.values.count(made.scores[key]) >= 2  # ours and the baseline's
    for name, entry in made.scores["label_scores"].items():
        for key in ("combined_score", "iou", "f1", "normalized_hausdorff_distance"):
            if key in entry:
                assert entry[key] in page.values, (name, key)


def test_a_crops_numbers_are_the_challenges_formulas_on_its_counts(page: Reader, made: Made) -> None:
    entry = made.scores["crop9"]["er"]
    assert entry["tp"] / (entry["tp"] + entry["fp"] + entry["fn"]) in page.values


def test_the_run_its_curves_and_times_are_shown(page: Reader) -> None:
    assert "Best validation Dice" in page.text
    assert 0.5 in page.values
    for words in ("Training loss", "Validation Dice", "Learning rate", "waiting for data", "0123456789abcdef"):
        assert words in page.text or words in page.source, words
    assert {100.0, 25.0, 125.0, 70.0} <= set(page.values)
    assert "resolution: [8.0, 8.0, 8.0]" in page.text


def test_the_data_are_summed_up(page: Reader) -> None:
    assert "2 data sets, 1 annotated crops, 1 label arrays" in page.text


def test_the_page_is_valid_for_a_reader_with_a_phone(page: Reader) -> None:
    assert any(tag == "meta" and a.get("name") == "viewport" for tag, a in page.tags)
    assert "prefers-color-scheme:dark" in page.source
    assert "@media print" in page.source


def test_nothing_is_reported_missing_where_nothing_is(page: Reader) -> None:
    assert page.notes == []


# -- parts that are missing --------------------------------------------------------------------------------------------
def test_a_report_of_nothing_says_so_part_by_part(tmp_path: Path) -> None:
    page = Reader(build_report(tmp_path, ReportSources()))
    assert (tmp_path / "report.html").is_file()
    said = " ".join(page.notes)
    for words in ("No run folder", "No scores", "No pictures", "No training curves", "No times", "No data summary"):
        assert words in said, words


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("run", "run folder"),
        ("data_root", "no data root at"),
        ("truth", "No truth"),
        ("crop_table", "no crop table"),
        ("labels", "No labels"),
        ("probabilities", "No probabilities"),
        ("submission", "The submission"),
        ("scores", "The scores cannot be shown"),
        ("baseline_scores", "cannot be shown"),
        ("evaluation", "no file"),
    ],
)
def test_a_part_that_is_not_there_is_one_line(made: Made, tmp_path: Path, part: str, words: str) -> None:
    parts: dict[str, Any] = {part: made.root / "nowhere"}
    options = ReportOptions(max_pictures=1, viewers=0)
    page = Reader(build_report(tmp_path / "x.html", replace(made.sources, **parts), options))
    assert any(words in note and "nowhere" in note for note in page.notes), page.notes


@pytest.mark.parametrize("name", ["scores", "baseline_scores", "evaluation"])
@pytest.mark.parametrize("content", ["{", "[]", '{"overall_score": 1}', '{"classes": 3, "label_scores": {}}'])
def test_a_broken_file_is_one_line(made: Made, tmp_path: Path, name: str, content: str) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text(content)
    sources = ReportSources(**{name: broken})  # type: ignore[arg-type]
    page = Reader(build_report(tmp_path / "x.html", sources))
    assert sum("broken.json" in note for note in page.notes) == 1


def test_half_written_labels_are_not_shown_as_whole(made: Made, tmp_path: Path) -> None:
    labels = tmp_path / "labels"
    shutil.copytree(made.root / "labels", labels)
    attrs = labels / "jrc_iso.zarr/crop7/mito/.zattrs"
    content = json.loads(attrs.read_text())
    content["connectomics"]["complete"] = False
    attrs.write_text(json.dumps(content))
    page = Reader(build_report(tmp_path, replace(made.sources, labels=labels), ReportOptions(viewers=0)))
    assert sum("only half written" in note for note in page.notes) == 1
    shown = [a["aria-label"] for tag, a in page.tags if tag == "svg" and "aria-label" in a]
    assert not any(s.startswith("prediction: crop7 mito") for s in shown)
    assert any(s.startswith("truth: crop7 mito") for s in shown)


def test_a_corrupt_chunk_spoils_one_class_only(made: Made, tmp_path: Path) -> None:
    labels = tmp_path / "labels"
    shutil.copytree(made.root / "labels", labels)
    (labels / "jrc_iso.zarr/crop7/mito/s0/0/0/0").write_bytes(b"no")
    page = Reader(build_report(tmp_path, replace(made.sources, labels=labels), ReportOptions(viewers=0)))
    assert [("crop7/mito" in note) for note in page.notes if "No pictures" in note] == [True]
    assert page.source.count('<figure class="plane') == 3 * 3


def test_labels_that_were_not_submitted_are_marked(made: Made, tmp_path: Path) -> None:
    scores = json.loads((made.root / "scores/scores.json").read_text())
    scores["crop7"]["er"] |= {"is_missing": True, "status": "missing", "tp": 0}
    scores["crop7"]["mito"] |= {"status": "skipped_too_many_instances", "tp": 0, "fp": 0, "fn": 0, "n_hausdorff": 0}
    changed = tmp_path / "scores.json"
    changed.write_text(json.dumps(scores))
    page = Reader(build_report(tmp_path, ReportSources(scores=changed)))
    assert any("1 of 4 labels were not submitted" in note for note in page.notes)
    assert "dropped" in page.text
    assert 'title="not submitted"' in page.source


def test_without_labels_the_submission_is_shown_and_then_the_probabilities(made: Made, tmp_path: Path) -> None:
    options = ReportOptions(viewers=0)
    pictures = []
    for parts in ({}, {"labels": None}, {"labels": None, "submission": None}):
        page = Reader(build_report(tmp_path, replace(made.sources, **parts), options))  # type: ignore[arg-type]
        layers = [a["href"] for tag, a in page.tags if tag == "image" and a.get("class") == "over"]
        assert page.source.count('<figure class="plane') == 4 * 3
        pictures.append(layers)
    assert pictures[0] == pictures[1]
    assert len(pictures[2]) == len(pictures[0])


def test_without_truth_the_annotation_of_the_data_root_is_the_truth(made: Made, tmp_path: Path) -> None:
    dataset, grid = GRIDS["crop7"]
    labels = tmp_path / "labels"
    from .conftest import write_class

    write_class(labels, dataset, "crop1", "er", np.ones(grid.shape, np.uint8), grid, artefact="labels", kind="semantic")
    sources = ReportSources(data_root=made.root / "data", labels=labels)
    page = Reader(build_report(tmp_path, sources))
    assert "errors: crop1 er" in page.source
    assert "6 480 voxels are not annotated" in page.text.replace("\u2009", " ")


def test_truth_without_a_crop_table_finds_its_data_sets_by_the_labels(made: Made, tmp_path: Path) -> None:
    options = ReportOptions(viewers=0)
    page = Reader(build_report(tmp_path, replace(made.sources, crop_table=None), options))
    assert page.notes == []
    assert page.source.count("errors: crop") == 4 * 3


def test_truth_alone_is_shown_on_flat_grey(made: Made, tmp_path: Path) -> None:
    page = Reader(build_report(tmp_path, ReportSources(truth=made.root / "truth.zarr")))
    assert sum("No prediction for this crop and class" in note for note in page.notes) == 4
    assert page.source.count('"truth: crop') == page.source.count("truth: crop") == 4 * 3
    assert "errors: crop" not in page.source


# -- bounds ------------------------------------------------------------------------------------------------------------
def test_pictures_are_limited_and_every_class_is_still_named(made: Made, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    options = ReportOptions(max_pictures=2, viewers=0)
    page = Reader(build_report(tmp_path, made.sources, options, lambda *what: told.append(what)))
    assert page.source.count('<figure class="plane') == 2 * 3
    assert any("2 of 4" in note for note in page.notes)
    drawn, counted = ["crop9", "crop7"], ["voxels of crop7", "voxels of crop9", "the data root"]
    assert [(done, of) for done, of, _ in told] == [(n, 5) for n in range(1, 6)]
    assert [name.split("/")[0] for *_, name in told] == [*drawn, *counted]
    assert page.source.count('<details class="class"') == 4


def test_no_picture_is_larger_than_asked(made: Made, tmp_path: Path) -> None:
    from base64 import b64decode
    from io import BytesIO

    from PIL import Image

    page = Reader(build_report(tmp_path, made.sources, ReportOptions(picture_size=16, viewers=0)))
    images = [a["href"] for tag, a in page.tags if tag == "image"]
    assert images
    for uri in images:
        assert max(Image.open(BytesIO(b64decode(uri.split(",")[1]))).size) <= 16


def test_the_page_says_how_large_it_is(made: Made, tmp_path: Path) -> None:
    path = build_report(tmp_path / "x.html", replace(made.sources, title="@size@"), ReportOptions(max_pictures=2))
    said = re.search(r"This page is one file of ([\d.]+) kB\.", path.read_text())
    assert said is not None
    assert float(said[1]) == pytest.approx(path.stat().st_size / 1000, abs=0.06)
    assert "<h1>@size@</h1>" in path.read_text()


def test_pictures_end_where_their_bytes_are_spent(made: Made, tmp_path: Path) -> None:
    page = Reader(build_report(tmp_path / "x.html", made.sources, ReportOptions(max_bytes=1)))
    assert page.source.count('<figure class="plane') == 3  # the first that passed the bound was the last
    assert sum("limited to 1 B of pictures" in note for note in page.notes) == 3
    assert '<figure class="viewer"' not in page.source


def test_the_worst_the_best_and_the_objects_are_shown(page: Reader) -> None:
    assert page.source.count('<figure class="thumb">') == 4
    uses = {a["href"][1:] for tag, a in page.tags if tag == "use"}
    assert uses <= {a["id"] for tag, a in page.tags if tag == "image" and "id" in a}
    buttons = [a for tag, a in page.tags if tag == "button" and a.get("class") == "go"]
    assert len(buttons) >= 1
    assert all(len(a["data-at"].split(",")) == 3 for a in buttons)


def test_throughput_memory_and_what_the_network_saw_are_shown(page: Reader) -> None:
    for words in ("Patches a second", "Memory, GB", "Share of training spent waiting"):
        assert words in page.text, words
    saw = page.text[page.text.index("What the network saw") :]
    assert "mito" in saw
    assert "25 %" in saw  # 250 of 1000 voxels, in each epoch
    assert "1 500" in saw.replace("\u2009", " ")


def test_voxels_are_counted_for_confusion_and_calibration(page: Reader) -> None:
    assert "Of the voxels of a row's class" in page.text
    assert "ECE" in page.text
    assert page.source.count('<line class="ideal"') == 1


def test_options_and_places_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="picture_size"):
        ReportOptions(picture_size=1)
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="is a file"):
        build_report(tmp_path / "out", ReportSources())


def test_what_others_wrote_is_shown_as_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'&"
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(json.dumps({"name": evil, "dataset": {"classes": [evil]}}))
    (run / "metrics.csv").write_text('epoch,step,val/dice,"val/<img src=x>/dice"\n0,1,0.5,0.4\n1,2,0.6,0.5\n')
    sources = ReportSources(title=evil, run=run, environment={evil: evil}, stages={evil: 1.0})
    page = Reader(build_report(tmp_path, sources))
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not any(tag == "img" for tag, _ in page.tags)
    assert evil in page.text


def test_crops_of_one_name_in_two_data_sets_are_kept_apart(made: Made, tmp_path: Path) -> None:
    from .conftest import write_class

    for dataset, grid in GRIDS.values():
        write_class(tmp_path / "labels", dataset, "crop1", "er", np.ones(grid.shape, np.uint8), grid, artefact="labels")
    page = Reader(build_report(tmp_path, ReportSources(labels=tmp_path / "labels")))
    assert len([a for tag, a in page.tags if tag == "article"]) == 2
    assert "No raw: no data root was given" in " ".join(page.notes)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))


# -- in a browser ------------------------------------------------------------------------------------------------------
def browse(address: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Headless Chromium on a page, with a new profile in ``folder``."""
    command = (
        f"{CHROMIUM} --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
        "--disable-background-networking --disable-component-update --disable-sync --virtual-time-budget=3000"
    ).split()
    place = [f"--user-data-dir={folder / 'profile'}", *options, address]
    return subprocess.run([*command, *place], capture_output=True, text=True, check=True, timeout=120)


needs_browser = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no browser at {CHROMIUM}")


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width", [1400, 500])  # headless Chromium makes no window narrower than 500
def test_a_browser_draws_the_page(made: Made, tmp_path: Path, width: int) -> None:
    from PIL import Image

    path = build_report(tmp_path / "report.html", made.sources)
    shot = tmp_path / "shot.png"
    browse(path.as_uri(), tmp_path, f"--screenshot={shot}", f"--window-size={width},2000")
    picture = np.asarray(Image.open(shot).convert("RGB"))
    assert picture.shape == (2000, width, 3)
    colors = np.unique(picture.astype(np.uint32) @ np.array([1, 256, 65536], np.uint32))
    assert len(colors) > 500  # the greys of raw under coloured layers, not only text on white


@pytest.mark.slow
@needs_browser
def test_on_a_phone_nothing_is_wider_than_the_screen(made: Made, tmp_path: Path) -> None:
    """The page in a frame of 390 pixels: what is wider scrolls in its own box."""
    path = build_report(tmp_path / "report.html", made.sources)
    told = '<script>document.title = "width " + document.documentElement.scrollWidth;</script>'
    path.write_text(path.read_text().replace("</body>", told + "</body>"))
    frame = tmp_path / "frame.html"
    frame.write_text(
        '<iframe id=f src="report.html" style="width:390px;height:800px;border:0"></iframe><script>'
        "f.onload = () => { document.body.dataset.said = f.contentDocument.title; }</script>"
    )
    dom = browse(frame.as_uri(), tmp_path, "--dump-dom", "--allow-file-access-from-files").stdout
    assert 'data-said="width 390"' in dom


@pytest.mark.slow
@needs_browser
def test_sliders_toggles_and_links_work_in_a_browser(made: Made, tmp_path: Path) -> None:
    path = build_report(tmp_path / "report.html", made.sources)
    act = """<script>
      const ortho = document.querySelector(".ortho"), slider = ortho.querySelector(".z");
      slider.value = 3; slider.dispatchEvent(new Event("input"));
      const box = ortho.querySelector("[data-kind=truth]");
      box.checked = false; box.dispatchEvent(new Event("change"));
      const fade = ortho.querySelector(".opacity");
      fade.value = 40; fade.dispatchEvent(new Event("input"));
      document.querySelector(".pic").click();
    </script>"""
    path.write_text(path.read_text().replace("</body>", act + "</body>"))
    dom = browse(path.as_uri() + "#crop-crop7-er", tmp_path, "--dump-dom").stdout
    assert "--ov: 0.4" in dom
    viewers = re.findall(r'<figure class="viewer".*?</figure>', dom, re.S)
    assert len(viewers) == 2 * 3
    _, grid = GRIDS["crop9"]
    top = float(re.findall(r'<svg viewBox="0 ([\d.]+) ', viewers[0])[0])
    assert top == pytest.approx(3 * grid.shape[1] * grid.voxel_size[1])
    line = re.findall(r'<line class="cross" data-of="0"[^>]*y1="([\d.]+)"', viewers[1])
    assert float(line[0]) == pytest.approx(3.5 * grid.voxel_size[0], abs=0.02)  # the slice, marked in the other planes
    for viewer in viewers[:3]:
        layers = re.findall(r'<image class="over (truth|prediction)"([^>]*)>', viewer)
        assert [kind for kind, attributes in layers if "hidden" not in attributes] == ["prediction"]
    assert re.search(r'<details class="class" id="crop-crop7-er" open="">', dom)  # the link unfolded it
    assert re.search(r'<dialog id="large" open="">.*?<svg', dom, re.S)  # the click enlarged it


@pytest.mark.slow
@needs_browser
def test_a_click_on_a_missed_object_shows_its_slices(made: Made, tmp_path: Path) -> None:
    """The second ball of crop9 is missed: its middle is where the conftest put it."""
    path = build_report(tmp_path / "report.html", made.sources)
    act = '<script>document.querySelector("#crop-crop9 button.go").click();</script>'
    path.write_text(path.read_text().replace("</body>", act + "</body>"))
    dom = browse(path.as_uri(), tmp_path, "--dump-dom").stdout
    row = re.search(r'<tr class="shown">.*?</tr>', dom, re.S)
    assert row is not None
    assert "missed" in row.group()
    _, grid = GRIDS["crop9"]
    middle = balls(grid)[1][0]
    shown = [float(v) for v in re.findall(r"<output>[zyx] = ([\d.-]+) nm", dom)[:3]]
    assert np.abs(np.subtract(shown, middle)).max() <= 2 * max(grid.voxel_size)
