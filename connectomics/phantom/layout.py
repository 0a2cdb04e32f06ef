"""Which data sets a phantom has, where its crops lie, and what is annotated in each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.classes import ATOMIC_CLASSES, CLASSES
from connectomics.errors import InputError
from connectomics.geometry import Box, Triple, VoxelGrid, index, slices_of, triple
from connectomics.phantom.options import PhantomOptions
from connectomics.phantom.scene import Scene, Tone, class_mask


@dataclass(frozen=True)
class DatasetPlan:
    """One data set: its name, its finest raw grid, the tone of its detector, its seed, the number of its first crop."""

    name: str
    raw: VoxelGrid
    tone: Tone
    seed: int
    first_crop: int

    def scene(self) -> Scene:
        """Its world."""
        return Scene.build(self.seed, self.raw.box, tone=self.tone, lattice=self.raw)


@dataclass(frozen=True)
class CropPlan:
    """One crop before it is written.

    Attributes:
        number: as in ``crop7``. test: whether it is held back for the crop table.
        grids: the grid of each class that is annotated.
        partial: classes of which a part of the crop is unknown.
        shifted_id: instance classes of the first of which that is there, one object gets id 255.
        odd_encoding: a semantic class that is stored with other numbers than usual, or None.
    """

    number: int
    test: bool
    grids: dict[str, VoxelGrid]
    partial: frozenset[str] = frozenset()
    shifted_id: tuple[str, ...] = ()
    odd_encoding: str | None = None

    @property
    def finest(self) -> VoxelGrid:
        """The grid with the smallest voxels."""
        return min(self.grids.values(), key=lambda g: math.prod(g.voxel_size))


@dataclass(frozen=True)
class _Template:
    """A kind of crop: voxel size in halves of the raw's, edges (z, y, x) relative to the usual edge, what is annotated.

    ``isotropic`` crops have cubic voxels also where the raw's are not.
    """

    factor: int
    edges: Triple
    annotated: str
    isotropic: bool = False
    partial: bool = False
    shifted_id: bool = False
    odd_encoding: bool = False


# Voxel sizes and proportions as they occur in the challenge: most crops at 4 nm or finer, some coarse, some tiny, some
# long and thin. Larger ones first in space, whatever their order here.
_TRAINING = (
    _Template(2, (1.2, 1.2, 1.2), "most", shifted_id=True),
    _Template(4, (1.3, 1.0, 1.3), "groups", isotropic=True),
    _Template(1, (0.6, 0.6, 0.6), "all", odd_encoding=True),
    _Template(2, (0.4, 0.4, 2.0), "all", partial=True),
    _Template(8, (1.5, 1.5, 0.9), "coarse", isotropic=True),
    _Template(1, (0.3, 0.3, 0.3), "atoms"),
    _Template(4, (0.5, 1.1, 1.1), "groups"),
)

_INSTANCES = ("nuc", "mito", "ld", "lyso", "endo", "perox", "cell")
_COARSE = frozenset({*_INSTANCES, "er", "ecs", "cyto", "ne", "chrom"})
_GROUPS = frozenset(
    {*(c.name for c in CLASSES.values() if c.is_group), "ecs", "cyto", "hchrom", "echrom", "nucpl"} - {"golgi", "mt"}
)
_UNKNOWN_IN_PART = frozenset({"er", "er_mem", "er_lum", "ves", "ves_mem", "ves_lum", "cyto", "mito_mem", "lyso"})

# How much a crop is wanted for each class that it holds.
_WANTED = dict(mito=3.0, nuc=1.5, ld=1.5, er=1.5, pm=1.5, ecs=1.0, golgi=0.6, lyso=0.8, endo=0.8, ves=0.4, np=0.4,
               mt=0.2, perox=0.4)  # fmt: skip


def datasets(options: PhantomOptions) -> list[DatasetPlan]:
    """The two data sets: isotropic raw that starts at 0, and anisotropic raw that starts at a fraction of a voxel."""
    iso = VoxelGrid.covering(Box((-2.0, -2.0, -2.0), triple([options.extent - 2.0] * 3)), (4.0, 4.0, 4.0))
    begin = (1043.37, 2210.5, 815.25)
    end = triple([b + options.extent for b in begin])
    aniso = VoxelGrid.covering(Box(begin, end), (5.24, 4.0, 4.0))
    return [
        DatasetPlan("phantom-iso", iso, Tone(1.0, 0.0, 10.0), 2 * options.seed, 1),
        DatasetPlan("phantom-aniso", aniso, Tone(0.9, -6.0, 8.5), 2 * options.seed + 1, 201),
    ]


def crops(plan: DatasetPlan, scene: Scene, options: PhantomOptions) -> list[CropPlan]:
    """Training and test crops of a data set: apart from each other, each where it holds much that the others lack.

    Raises `InputError` where they do not fit into the raw volume.
    """
    chooser = _Chooser(plan, scene)
    wanted = [
        (plan.first_crop + 100 + k, True, _Template(2, triple([1.35 if k == 0 else 1.35 * 0.8] * 3), "all"))
        for k in range(options.testing_crops)
    ]
    for k in range(options.training_crops):
        wanted.append((plan.first_crop + k, False, _TRAINING[k % len(_TRAINING)]))
    wanted.sort(key=lambda w: (not w[1], -math.prod(w[2].edges), w[0]))
    made = []
    for number, test, template in wanted:
        box = chooser.choose([e * options.crop_edge for e in template.edges], inner=test)
        made.append(_plan(plan, number, test, template, box, options))
    return sorted(made, key=lambda c: c.number)


def _plan(
    plan: DatasetPlan, number: int, test: bool, template: _Template, box: Box, options: PhantomOptions
) -> CropPlan:
    names = [n for n in options.class_names if test or n in _annotated(template.annotated, options.class_names)]
    if test:  # as fine as a class needs it: whole cells coarse, thin things fine
        factors = {n: 8 if n in ("nuc", "cell") else (4 if n in _COARSE else 2) for n in names}
        return CropPlan(number, True, {n: _grid(plan, box, f, f == 8) for n, f in factors.items()})
    grid = _grid(plan, box, template.factor, template.isotropic)
    return CropPlan(
        number,
        False,
        {n: grid for n in names},
        frozenset(names) & _UNKNOWN_IN_PART if template.partial else frozenset(),
        tuple(n for n in ("mito", "cell") if template.shifted_id and n in names),
        "ecs" if template.odd_encoding and "ecs" in names else None,
    )


def _annotated(which: str, names: tuple[str, ...]) -> frozenset[str]:
    chosen = {
        "all": frozenset(names),
        "most": frozenset(n for n in names if not n.startswith(("perox", "mt", "eres", "nucpl"))),
        "groups": _GROUPS,
        "coarse": _COARSE,
        "atoms": ATOMIC_CLASSES,
    }
    return chosen[which] & frozenset(names)  # a class without an array is unknown, never absent


def _grid(plan: DatasetPlan, box: Box, factor: int, isotropic: bool) -> VoxelGrid:
    """Voxels of ``factor`` halves of the raw's (or cubes of ``2 * factor`` nm) from the box's first face, within it."""
    size = triple([2.0 * factor] * 3) if isotropic else triple([v * factor / 2 for v in plan.raw.voxel_size])
    shape = [max(1, math.floor(e / s + 1e-6)) for e, s in zip(box.extent, size, strict=True)]
    first = triple([round(b + s / 2, 6) for b, s in zip(box.begin, size, strict=True)])
    return VoxelGrid(size, first, index(shape))


class _Chooser:
    """Finds places for crops, on an overview of the scene that is coarse enough to try thousands."""

    _CELLS = 100

    def __init__(self, plan: DatasetPlan, scene: Scene) -> None:
        self.raw = plan.raw
        # whole groups of eight raw voxels, so that crops of every voxel size end at raw faces
        self.step = max(4, 4 * round(max(plan.raw.shape) / self._CELLS / 4))
        size = np.multiply(plan.raw.voxel_size, self.step)
        z, y, x = (n // self.step for n in plan.raw.shape)
        self.overview = VoxelGrid(triple(size), triple(plan.raw.box.begin + size / 2), (z, y, x))
        atoms = scene.atoms(self.overview)
        self.sums = {name: _integral(class_mask(atoms, name)) for name in _WANTED}
        self.taken = np.zeros((z, y, x), bool)
        self.have = dict.fromkeys(_WANTED, 0.0)

    def choose(self, edges: list[float], inner: bool) -> Box:
        """A free box of about ``edges`` (nm), away from the raw's end if ``inner``; shrunk where nothing is free."""
        for shrink in (1.0, 0.85, 0.7, 0.55, 0.4):
            shape = [max(1, round(e * shrink / s)) for e, s in zip(edges, self.overview.voxel_size, strict=True)]
            begin = self._best(shape, max(1, self._CELLS // 20) if inner else 0)
            if begin is not None:
                self.taken[slices_of(begin, shape)] = True
                for name, sums in self.sums.items():
                    self.have[name] += 0.0 if inner else float(_boxes(sums, shape)[begin])
                return self.raw.crop([b * self.step for b in begin], [n * self.step for n in shape]).box
        raise InputError(
            f"no room for a crop of {'x'.join(f'{e:.0f}' for e in edges)} nm in a phantom of "
            f"{self.raw.box.extent[0]:.0f} nm; ask for fewer or smaller crops, or a larger size_nm"
        )

    def _best(self, shape: list[int], margin: int) -> tuple[int, ...] | None:
        if any(n + 2 * margin > m for n, m in zip(shape, self.overview.shape, strict=True)):
            return None
        free = _boxes(_integral(self.taken), shape) == 0
        inside = np.zeros_like(free)
        inside[tuple(slice(margin, n - margin) for n in free.shape)] = True
        if not (free & inside).any():
            return None
        score = np.zeros(free.shape)
        for name, weight in _WANTED.items():
            # in units of what a box anywhere holds: some of every class is worth more than much of one, and most so of
            # a class of which the crops have little so far
            usual = math.prod(shape) * float(self.sums[name][-1, -1, -1]) / math.prod(self.overview.shape)
            gain = _boxes(self.sums[name], shape) / (usual + self.have[name] + 1.0)
            score += weight * gain / (gain + 0.35)
        best = np.unravel_index(int(np.argmax(np.where(free & inside, score, -1.0))), free.shape)
        return tuple(int(n) for n in best)


def _integral(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Sums over all boxes that start at the first voxel, with a leading zero on each axis."""
    sums = np.zeros([n + 1 for n in mask.shape], np.int64)
    sums[1:, 1:, 1:] = mask.cumsum(0).cumsum(1).cumsum(2)
    return sums


def _boxes(sums: NDArray[np.int64], shape: list[int]) -> NDArray[np.int64]:
    """The sum over the box of ``shape`` that begins at each voxel where it fits."""
    for axis, n in enumerate(shape):
        high = np.take(sums, np.arange(n, sums.shape[axis]), axis)
        sums = high - np.take(sums, np.arange(0, sums.shape[axis] - n), axis)
    return sums
