"""What the values of a submitted array say, read one slab at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.classes import is_instance_class
from connectomics.submission.archive import ArchivedArray
from connectomics.submission.findings import Finding, Severity

# Without a truth, so many instances are taken as the fewest that a crop may hold: of these a crop holds one or two.
_FEW = {"cell": 1, "nuc": 1}
_USUAL = 5


@dataclass
class Summary:
    """One pass over an array.

    Attributes:
        low, high: smallest and largest value (0 where nothing is stored); NaN left out.
        foreground: voxels above 0. nan: voxels that are NaN.
        whole: whether all values are whole numbers.
        used: how many different values above 0; counted with the components, for 8 and 16 bits only.
        components: 26-connected pieces of one value, as the scorer counts instances; None where not asked for.
    """

    low: float = 0.0
    high: float = 0.0
    foreground: int = 0
    nan: int = 0
    whole: bool = True
    used: int = 0
    components: int | None = None


def summarize(array: ArchivedArray, count_components: bool) -> Summary:
    """Read an array slab by slab (one chunk thick); memory is about six bytes a voxel of a slab."""
    result = Summary()
    counter = ComponentCounter() if count_components else None
    unsigned = array.dtype.kind in "bu"
    narrow = count_components and array.dtype.kind == "u" and array.dtype.itemsize <= 2
    used = np.zeros(1 << 16, np.bool_) if narrow else None
    for slab in array.slabs():
        if slab is None or not slab.any():
            if counter is not None:
                counter.add(None)
            continue
        if slab.dtype.kind == "f":
            missing = np.isnan(slab)
            result.nan += int(missing.sum())
            slab = np.where(missing, 0, slab)
            result.whole = result.whole and bool(np.all(slab == np.rint(slab)))
        result.low = result.low if unsigned else min(result.low, float(slab.min()))
        result.high = max(result.high, float(slab.max()))
        result.foreground += int(np.count_nonzero(slab if unsigned else slab > 0))
        if used is not None:
            used[slab] = True
        if counter is not None and result.whole:
            counter.add(slab.astype(np.int64) if slab.dtype.kind == "f" else slab)
    if used is not None:
        result.used = int(used[1:].sum())
    if counter is not None and result.whole:
        result.components = counter.number()
    return result


class ComponentCounter:
    """Counts the 26-connected pieces of one value in a volume that comes slab by slab along its first axis."""

    def __init__(self) -> None:
        self._total = 0
        self._links: list[NDArray[np.int64]] = []
        self._last: tuple[NDArray[np.generic], NDArray[np.int64]] | None = None

    def add(self, slab: NDArray[np.generic] | None) -> None:
        """The next slab; None for one that is empty."""
        if slab is None:
            self._last = None
            return
        import cc3d

        pieces, number = cc3d.connected_components(np.ascontiguousarray(slab), connectivity=26, return_N=True)
        if self._last is not None:
            self._link(slab[0], pieces[0].astype(np.int64) + self._total)
        self._last = slab[-1].copy(), pieces[-1].astype(np.int64) + self._total
        self._total += int(number)

    def _link(self, values: NDArray[np.generic], pieces: NDArray[np.int64]) -> None:
        """Remember which pieces of the last plane before meet which of this plane."""
        import fastremap

        assert self._last is not None
        before, before_pieces = self._last
        width = self._total + int(pieces.max(initial=0)) + 1
        found = []
        rows, columns = values.shape
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                here = (slice(max(0, dy), rows + min(0, dy)), slice(max(0, dx), columns + min(0, dx)))
                there = (slice(max(0, -dy), rows + min(0, -dy)), slice(max(0, -dx), columns + min(0, -dx)))
                touching = (values[here] == before[there]) & (values[here] != 0)
                if touching.any():
                    found.append(fastremap.unique(before_pieces[there][touching] * width + pieces[here][touching]))
        if found:
            keys = fastremap.unique(np.concatenate(found))
            self._links.append(np.stack([keys // width, keys % width], axis=1))

    def number(self) -> int:
        """How many pieces all slabs together hold."""
        if not self._links:
            return self._total
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        pairs = np.concatenate(self._links) - 1
        ones = np.ones(len(pairs), np.int8)
        graph = coo_matrix((ones, (pairs[:, 0], pairs[:, 1])), shape=(self._total, self._total))
        return int(connected_components(graph, directed=False, return_labels=False))


def instance_limit(truths: int) -> float:
    """How many predicted instances a crop with ``truths`` true ones may have before the scorer drops it."""
    return truths * (10 + 50 * math.exp(-truths / 5))


def check_content(array: ArchivedArray, class_name: str, truth: ArchivedArray | None) -> list[Finding]:
    """Compare the values with what the scorer makes of them; `CorruptDataError` names a chunk that cannot be read."""
    path = array.path
    findings = _chunk_names(array)
    instance = is_instance_class(class_name)
    found = summarize(array, instance)
    if found.nan:
        what = f"{found.nan} voxels that are NaN"
        findings.append(Finding("warning", "nan", path, what, "numbers", "they count as background; write 0"))
    if found.low < 0:
        what = f"negative values (down to {found.low:.6g}) in {array.dtype}"
        advice = "ids have wrapped or background is not 0; export it with an unsigned type that holds the ids"
        findings.append(Finding("error", "dtype", path, what, "0 for background, ids above", advice))
    if array.dtype.kind == "f":
        findings.append(_floats(path, array, found))
    if instance and found.components is not None:
        findings += _instances(path, array, found, class_name, truth)
    if found.foreground == 0:
        findings += _empty(path, truth)
    return findings


def _chunk_names(array: ArchivedArray) -> list[Finding]:
    """Files of the array that are no chunk of it: with other names, no chunk is found and all reads as 0."""
    files = array.archive.files_below(array.path)
    strange = sorted(name for name in files if not name.startswith(".") and not array.is_chunk(name))
    if not strange:
        return []
    what = f"{len(strange)} files that are no chunk of it, such as {array.path}/{strange[0]}"
    sample = f"{array.path}/{array.chunk_name((0, 0, 0))}"
    advice = "they are not read; set dimension_separator and chunks in .zarray as they were written"
    return [Finding("error", "chunk-names", array.path, what, f"names like {sample}", advice)]


def _floats(path: str, array: ArchivedArray, found: Summary) -> Finding:
    if found.whole:
        advice = "it is read, but wastes space; export it again"
        return Finding("warning", "dtype", path, f"whole numbers as {array.dtype}", "unsigned integers", advice)
    what = f"fractions (up to {found.high:.6g}) in {array.dtype}, such as probabilities"
    advice = "every voxel above 0 counts as present; decode and export it"
    return Finding("error", "dtype", path, what, "labels", advice)


def _instances(
    path: str, array: ArchivedArray, found: Summary, class_name: str, truth: ArchivedArray | None
) -> list[Finding]:
    findings = []
    components = found.components or 0
    top = np.iinfo(array.dtype).max if array.dtype.kind == "u" else None
    if top is not None and array.dtype.itemsize <= 2 and found.used == top and components > top:
        what = f"{components} objects, but ids 1 to {top} of {array.dtype} all in use"
        advice = "ids beyond the type have probably wrapped; export it with a type that holds them"
        findings.append(Finding("error", "wrapped-ids", path, what, "a type that holds every id", advice))
    if found.high > np.iinfo(np.uint32).max:
        what = f"ids up to {found.high:.6g}"
        findings.append(
            Finding("warning", "large-ids", path, what, "ids that fit in 32 bits", "number them anew; export does")
        )
    truths = None if truth is None else int(_largest(truth))
    if truths == 0:
        return findings
    assumed = truths if truths is not None else _FEW.get(class_name, _USUAL)
    if components > instance_limit(assumed):
        needed = next(n for n in range(assumed, components + 2) if components <= instance_limit(n))
        what = f"{components} objects"
        if truths is not None:
            expected = f"at most {math.floor(instance_limit(truths))} for {truths} true ones"
            advice = "the crop is dropped from the class's score; remove small objects"
        else:
            expected = f"at most {math.floor(instance_limit(assumed))} if there are {assumed}"
            advice = f"the crop is dropped unless the truth holds at least {needed}; remove small objects"
        severity: Severity = "error" if truths is not None else "warning"
        findings.append(Finding(severity, "too-many-instances", path, what, expected, advice))
    return findings


def _empty(path: str, truth: ArchivedArray | None) -> list[Finding]:
    if truth is None:
        advice = "every object of the truth counts as missed; check the threshold"
        return [Finding("warning", "empty", path, "no voxel above 0", "some, unless the class is absent", advice)]
    if _largest(truth) > 0:
        advice = "all of it counts as missed; check the threshold"
        return [Finding("error", "empty", path, "no voxel above 0", "some: the truth is not empty", advice)]
    return []


def _largest(truth: ArchivedArray) -> float:
    return max((float(slab.max()) for slab in _stored(truth)), default=0.0)


def _stored(array: ArchivedArray) -> Iterable[NDArray[np.generic]]:
    return (slab for slab in array.slabs() if slab is not None and slab.size)
