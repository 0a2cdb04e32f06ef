"""What ``evaluate`` prints and writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from connectomics.cli import show

_MEASURES = ("score", "dice", "iou", "precision", "recall", "rand_error", "voi_split", "voi_merge")
_HEADS = ("score", "dice", "iou", "precision", "recall", "rand error", "split", "merge")
#: So many crops are shown, the worst first; files have all of them.
_SHOWN = 20


def show_evaluation(result: Mapping[str, Any]) -> None:
    """Tables by class, data set and crop, and the challenge's totals over these crops."""
    classes = [{"class": name, **row} for name, row in result["classes"].items()]
    _print("By class", ("class",), classes, intervals=True)
    _print("By data set", ("dataset", "class"), result["datasets"], intervals=True)
    crops = sorted(result["crops"], key=lambda row: float(row["dice"]))
    title = "By crop" + (f", the worst {_SHOWN} of {len(crops)}" if len(crops) > _SHOWN else "")
    _print(title, ("crop", "dataset", "class"), crops[:_SHOWN], intervals=False)
    from connectomics.metrics.challenge.rules import trust

    said = f"rules {result['rules']}, {trust(result['verified'])}"
    print(f"\nThe challenge's score over these crops, known voxels only, {said}")
    for name in ("instance", "semantic", "overall"):
        interval = _interval(result["totals"], name)
        print(f"  {name:8} {_number(result['totals'][name])}" + (f"  (95 %: {interval})" if interval != "-" else ""))
    for name, share in result["unknown"].items():
        print(f"{name}: {100 * share:.3g} % was not predicted (accepted failed blocks) and counts as predicted absent")
    show_rules(result["by_rules"])
    left_out = result["left_out"]
    if left_out:
        shown = ", ".join(left_out[:6]) + (", ..." if len(left_out) > 6 else "")
        print(f"{len(left_out)} arrays without annotated truth left out: {shown}")


def show_rules(rows: Sequence[Mapping[str, Any]]) -> None:
    """The overall score by each of the rules, and how far it moves from what was asked for."""
    if not rows:
        return
    cells = []
    for row in rows:
        by = "-" if row["moves"] is None else f"{row['moves']:+.4f}"
        verified = "verified" if row["verified"] else "not verified"
        cells.append([row["rules"], _number(row["overall"]), by, verified, row["summary"]])
    show.table(["rules", "overall", "moves by", "", "what they are"], cells, "By other rules (score.rules)")


def evaluation_files(path: Path) -> dict[str, Path]:
    """The paths that `write_evaluation` writes, by table; `WriteError` if one holds something else."""
    from connectomics.io.replacing import has_column, has_keys, require_own

    tables = {"class": "class", "dataset": "dataset", "crop": "dataset"}  # and their first columns
    files = {"": require_own(path, has_keys("rules", "classes", "totals"), "evaluate")}
    for name, column in tables.items():
        files[name] = require_own(path.with_name(f"{path.stem}_per_{name}.csv"), has_column(column), "evaluate")
    return files


def write_evaluation(result: Mapping[str, Any], path: Path) -> list[Path]:
    """The numbers as JSON, and CSV by class, data set and crop beside it; returns the paths."""
    from connectomics.metrics.tables import write_csv, write_json

    files = evaluation_files(path)
    write_json(files[""], result)
    tables = {
        "class": [{"class": name, **row} for name, row in result["classes"].items()],
        "dataset": result["datasets"],
        "crop": result["crops"],
    }
    for name, rows in tables.items():
        trust = {"rules": result["rules"], "verified": result["verified"]}
        write_csv(files[name], [{k: v for k, v in row.items() if not k.endswith("_interval")} | trust for row in rows])
    return list(files.values())


def _print(title: str, names: Sequence[str], rows: Sequence[Mapping[str, Any]], intervals: bool) -> None:
    header = [*names, *(("crops",) if intervals else ()), *_HEADS]
    if intervals:
        header.insert(header.index("score") + 1, "95 %")
        header.insert(header.index("dice") + 1, "95 %")
    cells = []
    for row in rows:
        line = [str(row[name]) for name in names] + ([str(row["crops"])] if intervals else [])
        for measure in _MEASURES:
            line.append(_number(row.get(measure)))
            if intervals and measure in ("score", "dice"):
                line.append(_interval(row, measure))
        cells.append(line)
    show.table(header, cells, title)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _interval(row: Mapping[str, Any], name: str) -> str:
    return f"{row[f'{name}_low']:.3f}-{row[f'{name}_high']:.3f}" if f"{name}_low" in row else "-"
