"""The data on the page: data sets, crops, and how far each class is annotated. No voxel is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from connectomics.cellmap.catalog import Catalog, Crop
from connectomics.data.contents import said_counts
from connectomics.data.splits import Split
from connectomics.errors import ConnectomicsError
from connectomics.pages import page
from connectomics.pages.report.run_folder import class_names, read_metrics, read_timing

_MOST_DATASETS = 60
_MOST_NAMES = 24
_MOST_PROBLEMS = 5
_SIDES = {
    "train": "crops for training", "val": "crops for validation", "seen": "crops that model.weights was trained on",
}  # fmt: skip


@dataclass
class ClassState:
    """Sums over the label arrays of a class: how many there are, and voxels by state as far as their attributes say."""

    arrays: int = 0
    voxels: Counter[str] = field(default_factory=Counter)

    @property
    def shares(self) -> tuple[float | None, ...]:
        """Shares of present, absent and unknown voxels; None if no array says."""
        total = self.voxels.total()
        return tuple(self.voxels[state] / total if total else None for state in ("present", "absent", "unknown"))


def section(data_root: Path | str | None, run: Path | None, max_arrays: int) -> Markup:
    """Return what is annotated (in the data root), and what the network was trained on (in the run)."""
    try:
        annotated: dict[str, Any] | None = None if data_root is None else _annotated(str(data_root), max_arrays)
        problem = None if annotated else "No data summary: no data root was given."
    except ConnectomicsError as error:
        annotated, problem = None, str(error)
    seen = None if run is None else _seen(run)
    return page.render("report/data_summary", annotated=annotated, problem=problem, seen=seen)


def _seen(run: Path) -> dict[str, Any]:
    """Return crops of training and validation, and how often the training patches held each class."""
    columns = read_metrics(run)
    rows = {
        name: {k: sum(v for *_, v in columns.get(f"data/{name}/{k}", ())) for k in ("patches", "known", "present")}
        for name in class_names(columns, "patches", "data")
        if "/" not in name
    }
    patches = read_timing(run).get("samples")
    split, problem = {}, None
    try:
        if (run / "split.yaml").is_file():
            sides = vars(Split.load(run / "split.yaml"))
            split = {
                _SIDES[side]: f"{len(keys)}: {_names(keys)}" for side, keys in sides.items() if keys or side != "seen"
            }
    except ConnectomicsError as error:
        problem = str(error)
    return {"split": split, "problem": problem, "rows": rows, "patches": patches if isinstance(patches, int) else None}


def _names(values: Sequence[Any]) -> str:
    shown = ", ".join(map(str, values[:_MOST_NAMES]))
    return shown + (f" and {len(values) - _MOST_NAMES} more" if len(values) > _MOST_NAMES else "") or "none"


def _annotated(data_root: str, max_arrays: int) -> dict[str, Any]:
    """Return what the template shows of a data root."""
    catalog = Catalog.open(data_root)
    crops = [crop for d in catalog.datasets for n in catalog.crop_names(d) if (crop := catalog.crop(d, n)).labels]
    states, problems = _states(crops, max_arrays)
    lines = problems[:_MOST_PROBLEMS]
    arrays = sum(state.arrays for state in states.values())
    if arrays > max_arrays:
        lines.insert(0, f"Voxel counts are over the first {max_arrays} label arrays.")
    if len(problems) > _MOST_PROBLEMS:
        lines.append(f"{len(problems) - _MOST_PROBLEMS} more label arrays could not be read.")
    shown = catalog.datasets[:_MOST_DATASETS]
    if len(catalog.datasets) > len(shown):
        lines.append(f"{len(catalog.datasets) - len(shown)} more data sets.")
    datasets = []
    for name in shown:
        mine = [crop for crop in crops if crop.dataset == name]
        try:
            raw = page.nm(mine[0].raw_source.grid.voxel_size) if mine else "–"
        except ConnectomicsError as error:
            raw = str(error)
        datasets.append((name, len(mine), raw, _label_sizes(mine)))
    return {
        "problems": lines,
        "n_datasets": len(catalog.datasets),
        "n_crops": len(crops),
        "n_arrays": arrays,
        "datasets": datasets,
        "classes": sorted(states.items(), key=lambda item: (-item[1].arrays, item[0])),
    }


def _label_sizes(crops: Sequence[Crop]) -> str:
    sizes: Counter[str] = Counter()
    for crop in crops:
        try:
            sizes[page.nm(crop.grid.voxel_size)] += 1
        except ConnectomicsError:
            sizes["unreadable"] += 1
    return "; ".join(f"{n} at {size}" for size, n in sizes.most_common(4)) or "–"


def _states(crops: Sequence[Crop], max_arrays: int) -> tuple[dict[str, ClassState], list[str]]:
    states: dict[str, ClassState] = {}
    problems: list[str] = []
    for number, (name, label) in enumerate((item for crop in crops for item in crop.labels.items()), start=1):
        state = states.setdefault(name, ClassState())
        state.arrays += 1
        if number > max_arrays:
            continue
        try:
            state.voxels.update(said_counts(label))
        except ConnectomicsError as error:
            problems.append(str(error))
    return states, problems
