"""What neuroglancer shows of segments: names of classes, and the columns of instance tables to sort and filter by."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.io.store import read_json
from connectomics.io.tables import read_columns
from connectomics.pages.view.volume_server import Made

MOST = 100_000  # instances with properties, the largest ones: the page holds them all in memory
_TABLES = ("instances.parquet", "instances.csv")  # that decode writes into the folder of a class
_OWN = ("voxels", "volume_nm3")
_MEASURED = ("voxels", "volume_nm3", "surface_nm2", "sphericity", "touches_border")
_CONTACT = ("contact_nm2", "partners")


def _served(content: Callable[[], dict[str, Any]]) -> Made:
    """Serve a result of `info`, which is made when the page asks for it."""
    return lambda path: json.dumps(content()).encode() if path == "info" else None


def info(
    ids: Sequence[int], labels: Sequence[str], tags: Sequence[str], numbers: Mapping[str, NDArray[Any]]
) -> dict[str, Any]:
    """Return segment properties as neuroglancer reads them (``neuroglancer_segment_properties``).

    Args:
        ids: of the segments, unsigned 64 bit. labels: a name for each. tags: one for each; () for none.
        numbers: further columns, (n,) each; a value that is not finite becomes 0.
    """
    properties: list[dict[str, Any]] = [{"id": "label", "type": "label", "values": list(labels)}]
    if tags:
        names = sorted(set(tags))
        values = [[names.index(tag)] for tag in tags]
        properties.append({"id": "tags", "type": "tags", "tags": names, "values": values})
    for name, column in numbers.items():
        finite = np.nan_to_num(np.asarray(column, np.float32), posinf=0.0, neginf=0.0).tolist()
        properties.append({"id": name, "type": "number", "data_type": "float32", "values": finite})
    inline = {"ids": [str(label) for label in ids], "properties": properties}
    return {"@type": "neuroglancer_segment_properties", "inline": inline}


def of_classes(numbers: Mapping[str, int]) -> Made:
    """Return the names of the classes of a map."""
    return _served(lambda: info(list(numbers.values()), list(numbers), (), {}))


def of_instances(labels: Path, tables: Path | None, dataset: str, crop: str, class_name: str) -> Made | None:
    """Return what the tables say of the instances of one class of one crop; None if there is no table.

    Args:
        labels: folder of the class that decode wrote, with its instance table. tables: folder that measure wrote.
    """
    here = {"dataset": dataset, "crop": crop}
    wanted: list[tuple[Path, dict[str, str], dict[str, str]]] = []  # table, rows, column -> property
    own = next((labels / name for name in _TABLES if (labels / name).exists()), None)
    if own is not None:
        wanted.append((own, {}, {name: name for name in _OWN}))
    for file in sorted(tables.glob("*.summary.json")) if tables is not None else []:
        about = read_json(file) or {}
        table = file.with_name(str(about.get("file")))
        if about.get("class") == class_name and table.exists():
            wanted.append((table, here, {name: name for name in _MEASURED}))
        elif about.get("of") == class_name and table.exists():
            with_other = f"{about['to']}_{about['nm']:g}nm"
            wanted.append((table, here, {name: f"{name}_{with_other}" for name in _CONTACT}))
    return _served(lambda: _joined(wanted, class_name)) if wanted else None


def _joined(wanted: Sequence[tuple[Path, dict[str, str], dict[str, str]]], class_name: str) -> dict[str, Any]:
    """Read the tables and join their rows by ID, of all instances that any table has."""
    read = [(read_columns(table, ["id", *names], rows), names) for table, rows, names in wanted]
    ids = np.unique(np.concatenate([columns["id"] for columns, _ in read]))
    numbers: dict[str, NDArray[np.float64]] = {}
    for columns, names in read:
        at = np.searchsorted(ids, columns["id"])
        for name, shown in names.items():
            numbers.setdefault(shown, np.full(len(ids), np.nan))[at] = columns[name]
    size = next((numbers[name] for name in _OWN if name in numbers), np.zeros(len(ids)))
    largest = np.sort(np.argsort(-np.nan_to_num(size), kind="stable")[:MOST])
    chosen = ids[largest].tolist()
    titles = [f"{class_name} {label}" for label in chosen]
    return info(chosen, titles, [class_name] * len(chosen), {name: v[largest] for name, v in numbers.items()})
