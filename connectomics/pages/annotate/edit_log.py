"""Edits of predicted instances that are made on the page: a line of the log for each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from connectomics.decoding.edits import Edit, append_edit, drop_edit, read_edits
from connectomics.errors import InputError, MissingError
from connectomics.pages.annotate.predicted import PredictedLabels


class EditLog:
    """The log of the predicted instances on a page. IDs are those of the page, places are voxels of its grid."""

    def __init__(self, path: Path, predicted: Mapping[str, PredictedLabels]) -> None:
        """Open or start a log.

        Raises `MissingError` if its folder does not exist, and `InputError` for a line that is no edit, or if several
        crops of the prediction have a class here: their IDs mean different instances.
        """
        if not path.absolute().parent.is_dir():
            raise MissingError(f"no folder {path.absolute().parent} for the log {path.name}; make it first")
        self._path = path
        self._predicted = {name: one for name, one in predicted.items() if one.labels.kind == "instance"}
        if not self._predicted:
            raise InputError(f"{', '.join(predicted)} have no instances to edit; give a class with instances")
        for name, one in self._predicted.items():
            if len(one.crops) > 1:
                raise InputError(f"several crops of the prediction have {name} here ({', '.join(one.crops)})")
        self._read()

    def lines(self) -> list[dict[str, Any]]:
        """Return the edits of the instances on the page."""
        return [
            {"op": e.op, "class": e.class_name, "ids": [self._predicted[e.class_name].to_page(i) for i in e.ids]}
            for e in self._read()
            if self._is_here(e)
        ]

    def add(self, body: bytes) -> None:
        """Append an edit: JSON with ``op``, ``class``, ``ids`` and, of a split, ``seeds`` (voxels, z y x)."""
        try:
            data = json.loads(body)
            name, ids, seeds = data["class"], data["ids"], data.get("seeds", [])
            here = self._predicted[name]
            grid = here.labels.grid
            found = [tuple(float(v) for v in grid.to_world([float(v) for v in seed])) for seed in seeds]
            edit = Edit(
                str(data["op"]), name, tuple(here.to_file(int(i)) for i in ids), tuple((z, y, x) for z, y, x in found),
                dataset=here.dataset, crop=here.crops[0],
            )  # fmt: skip
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"expected an edit with op, class, ids and seeds: {error}") from error
        if edit.op not in ("merge", "split", "delete"):
            raise InputError(f"the page merges, splits and deletes, got {edit.op}")
        append_edit(self._path, edit)

    def undo(self) -> None:
        """Drop the last line of the log; `InputError` if it is not of this page."""
        edits = self._read()
        if not edits or not self._is_here(edits[-1]):
            raise InputError("the last edit of the log is not of this page" if edits else "the log has no edits")
        drop_edit(self._path)

    def _read(self) -> list[Edit]:
        return read_edits(self._path) if self._path.exists() else []

    def _is_here(self, edit: Edit) -> bool:
        here = self._predicted.get(edit.class_name)
        crop = f"crop{edit.crop}" if edit.crop.isdigit() else edit.crop
        return here is not None and edit.dataset in ("", here.dataset) and crop in ("", here.crops[0])
