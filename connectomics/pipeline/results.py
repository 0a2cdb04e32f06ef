"""What the verbs return: folders on disk that know what they hold and that the next verb takes.

`connectomics.pipeline.runs.Run` is the fourth one, of training.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connectomics.cellmap.crop_table import CropTable
from connectomics.errors import MissingError, first_of, number_of, require_known
from connectomics.io.multiscale import Multiscale
from connectomics.io.place import array_place
from connectomics.io.place import place as place_of

if TYPE_CHECKING:
    from connectomics.config import RunConfig
    from connectomics.metrics.challenge.results import SubmissionScore

#: Data set, crop and class of an array.
Place = tuple[str, str, str]


def chosen_arrays(
    root: str | Path,
    datasets: Collection[str] | None = None,
    crops: Collection[str] | None = None,
    classes: Collection[str] | None = None,
) -> list[Place]:
    """Return data set, crop and class of the arrays in a folder, sorted; only these (``crop7`` or ``7``), by default
    all. Raises `UnknownNameError` for a name that none of them has."""
    from connectomics.decoding.prediction import find_arrays

    found = list(find_arrays(root))
    for place, what, wanted in ((0, "data set", datasets), (1, "crop", crops), (2, "class", classes)):
        if not wanted:
            continue
        there = {item[place] for item in found}
        names = {f"crop{name}" if what == "crop" and f"crop{name}" in there else name for name in wanted}
        require_known(what, sorted(names), there, str(root))
        found = [item for item in found if item[place] in names]
    return found


def find_labels(
    root: Path, datasets: Collection[str] | None = None, crops: Collection[str] | None = None
) -> list[Place]:
    """Return the label arrays of a folder, see `chosen_arrays`; `MissingError` if there are none."""
    places = chosen_arrays(root, datasets, crops)
    if not places:
        raise MissingError(f"no labels in {root}: expected {{dataset}}.zarr/{{crop}}/{{class}}; run decode first")
    return places


@dataclass(frozen=True, repr=False)
class ArrayFolder:
    """A folder of arrays, ``{folder}/{dataset}.zarr/{crop}/{class}/s0``.

    Attributes:
        folder: where the arrays are.
        config: configuration that made them, if it is known: `decode` takes its parameters from there.
        crops: crop table whose grids the arrays have, if one was given: `export` packs its crops.
        written: what the call that returned it wrote or found finished.
    """

    folder: Path
    config: RunConfig | None = field(default=None, compare=False)
    crops: CropTable | None = field(default=None, compare=False)
    written: tuple[Path, ...] = field(default=(), compare=False)

    @classmethod
    def open(cls, place: Any, config: RunConfig | None = None) -> Any:
        """Return ``place`` if it is one of these, else the folder at that path; `MissingError` if there is none."""
        if isinstance(place, cls):
            return place
        if isinstance(place, ArrayFolder):
            raise MissingError(f"expected {cls.__name__}, got {place!r}")
        folder = place_of(place)
        if not folder.is_dir():
            raise MissingError(f"no folder {folder}; expected one with {{dataset}}.zarr/{{crop}}/{{class}} arrays")
        return cls(folder, config)

    @property
    def arrays(self) -> list[tuple[str, str, str]]:
        """Data set, crop and class of every array, sorted."""
        return chosen_arrays(self.folder)

    @property
    def classes(self) -> list[str]:
        """Classes in the folder, sorted."""
        return sorted({name for _, _, name in self.arrays})

    def array(self, class_name: str, crop: str | None = None, dataset: str | None = None) -> Multiscale:
        """Return one array, to read on any grid.

        Args:
            class_name: the class.
            crop, dataset: may be left out if only one has the class.

        Raises:
            UnknownNameError: no such data set, crop or class.
            MissingError: several arrays fit.
        """
        fits = chosen_arrays(self.folder, dataset and [dataset], crop and [crop], [class_name])
        if len(fits) > 1:
            names = ", ".join("/".join(item) for item in fits[:6])
            raise MissingError(
                f"{len(fits)} arrays in {self.folder} are of {class_name}: {names}; give crop= (dataset=)"
            )
        return Multiscale.open(array_place(self.folder, *fits[0]))

    def __repr__(self) -> str:
        arrays = self.arrays
        crops = len({item[:2] for item in arrays})
        held = f"{number_of(len(arrays), 'array')}, {number_of(crops, 'crop')}"
        return f"{type(self).__name__}({str(self.folder)!r}: {held}, classes {first_of(self.classes, 6)})"

    def _repr_html_(self) -> str:
        from connectomics.pages import page

        return page.render("notebook/arrays", kind=type(self).__name__, folder=self.folder, arrays=self.arrays)


class Probabilities(ArrayFolder):
    """What `predict` wrote: probabilities (z, y, x) of every class (uint8, 255 for 1, or float16), and heads."""


class Labels(ArrayFolder):
    """What `decode` wrote: unsigned integers (z, y, x), instance IDs or 1 for semantic classes, 0 elsewhere."""


@dataclass(frozen=True, repr=False)
class Scores(Mapping[str, Any]):
    """Scores of a submission or of labels; a mapping with the keys of the JSON file.

    Attributes:
        content: what the JSON file holds.
        file: where it was written; None if it was not.
        result: the scores as values of `connectomics.metrics`, with every crop and instance; None for `evaluate`.
    """

    content: Mapping[str, Any] = field(hash=False)
    file: Path | None = None
    result: SubmissionScore | None = None

    def __getitem__(self, key: str) -> Any:
        return self.content[key]

    def __iter__(self) -> Any:
        return iter(self.content)

    def __len__(self) -> int:
        return len(self.content)

    @property
    def overall(self) -> float | None:
        """The challenge's overall score; None if nothing was scored."""
        totals = self.content.get("totals", {})
        value: float | None = totals["overall"] if "overall" in totals else self.content.get("overall_score")
        return value

    @cached_property
    def classes(self) -> dict[str, Mapping[str, Any]]:
        """Measures by class."""
        rows: Mapping[str, Any] = self.content.get("classes") or self.content.get("label_scores") or {}
        return dict(rows)

    def __repr__(self) -> str:
        overall = "-" if self.overall is None else f"{self.overall:.4f}"
        where = f", {str(self.file)!r}" if self.file else ""
        return f"Scores(overall {overall}, {number_of(len(self.classes), 'class')}{where})"

    def _repr_html_(self) -> str:
        from connectomics.pages import page

        names = sorted({key for row in self.classes.values() for key, v in row.items() if isinstance(v, int | float)})
        return page.render("notebook/scores", title=repr(self), names=names, classes=self.classes)
