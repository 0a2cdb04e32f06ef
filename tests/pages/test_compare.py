"""Runs side by side: what differs, what was reached, and nothing that a run's files can break."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from connectomics.cli import main
from connectomics.config.values import flat
from connectomics.pages.report import compare
from connectomics.pages.report.build import build_report
from connectomics.pages.report.sources import OtherRun, ReportOptions, ReportSources

from .conftest import Made
from .test_report import Reader

EVIL = "<script>alert(1)</script>\"'&"


def a_run(folder: Path, rate: float, dice: float, **config: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps({"optimizer": {"lr": rate, "name": "AdamW"}, **config}))
    lines = ["epoch,step,train/loss,val/dice,val/er/dice", f"0,4,0.9,{dice / 2},0.1", f"1,8,0.5,{dice},0.2"]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    by_epoch = [{"epoch": e, "samples_per_s": 3.5, "memory_bytes": 2_000_000_000} for e in range(2)]
    timing = {"total_s": 90.0, "samples_per_s": 3.5, "epochs": 2, "samples": 8, "by_epoch": by_epoch}
    (folder / "timing.json").write_text(json.dumps(timing))
    return folder


@pytest.fixture
def body(tmp_path: Path) -> str:
    runs = [a_run(tmp_path / "x/version_0", 0.1, 0.6), a_run(tmp_path / "y/version_0", 0.2, 0.8, extra=1)]
    return compare.section([(run, None) for run in runs])


def test_only_what_differs_of_the_configuration_is_shown(body: str) -> None:
    part = body[body.index("what differs") :]
    assert "optimizer.lr" in part
    assert "extra" in part
    assert "not set" in part
    assert "optimizer.name" not in part
    assert "1 of 3 keys are the same" in part


def test_the_best_is_marked_and_curves_lie_over_each_other(body: str) -> None:
    assert '<td class="num mean"><data value="0.8">' in body
    assert '<td class="num"><data value="0.6">' in body
    for title in ("Training loss", "Validation Dice", "Patches a second", "Memory, GB"):
        chart = body[body.index(f"<figcaption>{title}") :].split("</figure>")[0]
        assert chart.count("<polyline") == 2, title
    assert "2.0 GB" in body
    assert "Validation Dice by class" in body


def test_runs_are_named_by_what_tells_them_apart() -> None:
    assert compare.short_names([Path("/a/x/version_0"), Path("/a/y/version_0")]) == ["x/version_0", "y/version_0"]
    assert compare.short_names([Path("/a/first"), Path("/b/second")]) == ["first", "second"]
    assert len(set(compare.short_names([Path("/a"), Path("/a")]))) == 2


def test_nested_keys_are_flattened() -> None:
    assert flat({"a": {"b": {"c": 1}, "d": []}, "e": {}}) == {"a.b.c": 1, "a.d": [], "e": {}}


def test_scores_of_submissions_are_set_side_by_side(made: Made, tmp_path: Path) -> None:
    scores = json.loads((made.root / "scores/scores.json").read_text())
    scores["overall_score"] = 0.123
    (tmp_path / "other.json").write_text(json.dumps(scores))
    other = OtherRun(a_run(tmp_path / "other", 0.1, 0.5), tmp_path / "other.json")
    sources = ReportSources(run=made.root / "run", scores=made.root / "scores/scores.json", others=(other,))
    page = Reader(build_report(tmp_path / "x.html", sources))
    assert 0.123 in page.values
    assert "Challenge score by class" in page.text


@pytest.mark.parametrize("what", ["rules", "crops"])
def test_scores_of_other_rules_or_crops_have_no_best(made: Made, tmp_path: Path, what: str) -> None:
    scores = json.loads((made.root / "scores/scores.json").read_text())
    scores["overall_score"] = 0.123
    runs = [(a_run(tmp_path / name, 0.1, 0.5), tmp_path / f"{name}.json") for name in ("one", "two")]
    runs[0][1].write_text((made.root / "scores/scores.json").read_text())
    runs[1][1].write_text(json.dumps(scores))
    best = r'<td class="[^"]*mean[^"]*">'
    note = "The scores are not of the same crops and classes by the same rules, so none is called the best."
    body = compare.section(runs)
    assert note not in body
    assert re.search(best, body)
    if what == "rules":
        scores["rules"] = "2026-07-affine"
    else:
        del scores["crop9"]
    runs[1][1].write_text(json.dumps(scores))
    body = compare.section(runs)
    assert note in body
    assert not re.search(best, body)


@pytest.mark.parametrize("file", ["config.yaml", "metrics.csv", "timing.json"])
def test_a_broken_file_of_one_run_is_one_line_and_the_rest_stands(tmp_path: Path, file: str) -> None:
    runs = [a_run(tmp_path / name, 0.1, 0.5) for name in ("one", "two")]
    (runs[1] / file).write_bytes(b"\xff\xfe [1,\n")
    sources = ReportSources(run=runs[0], others=(OtherRun(runs[1]),))
    page = Reader(build_report(tmp_path / "x.html", sources))
    assert sum(note.startswith("two: ") and file in note for note in page.notes) == 1
    assert "Runs compared" in page.text


def test_a_run_that_is_not_whole_is_said(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / name, rate, 0.5) for name, rate in (("one", 0.1), ("two", 0.2))]
    about = {"pid": 1, "process_started": 0.0, "host": "here"}
    for run, state in zip(runs, ("finished", "failed"), strict=True):
        (run / "state.json").write_text(json.dumps({"state": state, "note": "no <data> root", **about}))
    page = Reader(build_report(tmp_path, ReportSources(run=runs[0], others=(OtherRun(runs[1]),))))
    assert [note for note in page.notes if "not complete" in note] == [
        "two is not complete: it is failed (no &lt;data&gt; root)."
    ]
    page = Reader(build_report(tmp_path, ReportSources(run=runs[1])))
    assert "This run is not complete: it is failed (no &lt;data&gt; root)." in page.notes


def test_a_folder_that_is_no_run_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    body = compare.section([(a_run(tmp_path / "one", 0.1, 0.5), None), (tmp_path / "empty", None)])
    assert "is not a run folder" in body


def test_hostile_names_are_shown_as_text(made: Made, tmp_path: Path) -> None:
    """Of runs, classes, keys, packages and columns: a page that others' files are shown on runs none of them."""
    plain = EVIL.replace("/", "")  # a folder's name has no slash
    runs = [a_run(tmp_path / f"{k}{plain}", 0.1 * k, 0.5, **{EVIL: {EVIL: f"{EVIL}{k}"}}) for k in (1, 2)]
    for run in runs:
        column = EVIL.replace('"', '""')
        head = f'epoch,step,val/dice,"val/{column}x/dice","data/<img src=x onerror=a>/patches"'
        (run / "metrics.csv").write_text(f"{head}\n0,1,0.5,0.4,3\n1,2,0.6,0.5,3\n")
        (run / "environment.json").write_text(json.dumps([{"git": {"commit": EVIL}, "packages": {"torch": EVIL}}]))
        (run / "split.yaml").write_text(json.dumps({"train": [EVIL], EVIL: [EVIL]}))
    scores = json.loads((made.root / "scores/scores.json").read_text())
    for name in ("er", "mito"):
        scores["label_scores"][EVIL + name] = scores["label_scores"][name]
        scores["crop7"][EVIL + name] = scores["crop7"][name]
    scores[EVIL] = scores["crop9"]
    (tmp_path / "s.json").write_text(json.dumps(scores))
    others = (OtherRun(runs[1], tmp_path / "s.json"),)
    sources = ReportSources(title=EVIL, run=runs[0], others=others, scores=tmp_path / "s.json", baseline_name=EVIL)
    page = Reader(build_report(tmp_path / "x.html", sources, ReportOptions(max_pictures=1)))
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not any(tag == "img" or any(name.startswith("on") for name in a) for tag, a in page.tags)
    assert EVIL in page.text


# -- the verb ----------------------------------------------------------------------------------------------------------
def test_the_verb_compares_runs_and_says_size_and_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [a_run(tmp_path / name, 0.1 * k, 0.5) for k, name in enumerate(("one", "two"))]
    out = tmp_path / "r.html"
    assert main(["report", str(out), *(w for run in runs for w in ("--run", str(run))), "--title", "A & B"]) == 0
    assert re.search(r"r\.html  [\d.]+ kB$", capsys.readouterr().out.strip())
    assert "Runs compared" in out.read_text()
    assert "<h1>A &amp; B</h1>" in out.read_text()


def test_more_scores_than_runs_are_one_line(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = ["--scores", str(made.root / "scores/scores.json")] * 2
    assert main(["report", str(tmp_path / "r.html"), "--run", str(made.root / "run"), *scores]) == 1
    assert "2 --scores for 1 --run" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()
