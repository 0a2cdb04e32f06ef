"""Where the windows of a prediction lie, and how much each of their voxels counts."""

from __future__ import annotations

import itertools
import math
import operator
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from connectomics.config import RunConfig
from connectomics.errors import InputError
from connectomics.geometry import Box, Index, Triple, VoxelGrid, index, shape_between, triple
from connectomics.inference.symmetry import Symmetry
from connectomics.io.mirror import Extent
from connectomics.models.registry import fixed_patch_size, required_multiple, takes_any_window

if TYPE_CHECKING:
    import torch

BLOCK = 256  # voxels: edge of a block, if nothing else is given
BLENDINGS = ("crop", "gaussian", "constant")
_SIGMA_SCALE = 0.125  # MONAI's default: sigma in window widths
_LEAST_WEIGHT = 1e-3  # MONAI clamps its importance map here
_LARGE_CORE = 192  # voxels: three chunks
_COARSEST = 32  # voxels between two of a network's coarse grid, of most networks


def whole_index(values: Sequence[int] | int, what: str, least: int) -> Index:
    """Return three whole numbers (one stands for all axes), each at least ``least``."""
    numbers = [values] * 3 if isinstance(values, int) else [int(v) for v in values]
    if len(numbers) != 3 or min(numbers) < least:
        raise InputError(f"{what} must be three whole numbers >= {least} (z, y, x), got {values!r}")
    return index(numbers)


def overlap_per_axis(overlap: Sequence[float] | float) -> Triple:
    """Return the overlap along z, y and x (one number stands for all axes); `InputError` outside [0, 1)."""
    shares = tuple(map(float, (overlap,) * 3 if isinstance(overlap, int | float) else overlap))
    if len(shares) != 3 or not all(0 <= share < 1 for share in shares):
        raise InputError(f"overlap must be at least 0 and below 1, one number or three (z, y, x), got {overlap}")
    return triple(shares)


def window_for(config: RunConfig, box: Box) -> tuple[Index, Triple]:
    """Return window and overlap with which to predict a box: those of the configuration, or larger windows.

    Cropped windows cost less the larger they are. So if ``inference.window`` is not given, windows of a 3-D network
    over a large volume have cores of `_LARGE_CORE` voxels, if that is about twice a patch and costs less. They lose as
    many voxels at each face as a patch would, or a few more.
    """
    overlap, patch, model = overlap_per_axis(config.inference.overlap), config.patch, config.model
    lost = [n - _step(n, share, True) for n, share in zip(patch, overlap, strict=True)]
    multiple = required_multiple(model.architecture, model.options)
    shape = VoxelGrid.covering(box, config.voxel_size).shape
    window = index(math.ceil((_LARGE_CORE + o) / m) * m for o, m in zip(lost, multiple, strict=True))
    if (
        config.inference.window is None
        and config.inference.blending == "crop"
        and not config.data.inputs
        and not fixed_patch_size(model.architecture)
        and all(p < w <= 9 / 4 * p and n >= w for p, w, n in zip(patch, window, shape, strict=True))
        and all(w / _LARGE_CORE < p / (p - o) for p, w, o in zip(patch, window, lost, strict=True))
    ):
        return window, overlap_per_axis([1 - _LARGE_CORE / w for w in window])
    return config.window, overlap


@dataclass(frozen=True)
class WindowFit:
    """How windows may shrink along an axis where fewer voxels are wanted than they hold.

    For networks whose value at a voxel depends on the voxels around it alone, whatever the size of the window.

    Attributes:
        multiple: sides of windows are multiples of it, voxels z y x.
        alike: a letter for each axis; windows keep equal sides along axes with the same letter.
    """

    multiple: Index
    alike: str = "zyx"

    @classmethod
    def of(cls, config: RunConfig) -> WindowFit | None:
        """Return how the windows of a run's network may shrink; None: its windows have one size."""
        model = config.model
        if config.data.inputs or not takes_any_window(model.architecture, model.options):
            return None
        return cls(required_multiple(model.architecture, model.options))

    def sides(self, most: Index, wanted: Sequence[int], overlaps: Sequence[int]) -> Index:
        """Return the sides of the smallest windows with which no more windows cover ``wanted`` voxels.

        Args:
            most: sides of the largest windows.
            wanted: voxels to cover.
            overlaps: voxels that windows share.
        """
        unit, least = dict.fromkeys(self.alike, 1), dict.fromkeys(self.alike, 1)
        for letter, multiple in zip(self.alike, self.multiple, strict=True):
            unit[letter] = math.lcm(unit[letter], multiple)
        for letter, side, n, shared in zip(self.alike, most, wanted, overlaps, strict=True):
            number = max(1, math.ceil((n - shared) / (side - shared)))
            needed = math.ceil((n + (number - 1) * shared) / number)
            least[letter] = max(least[letter], min(side, math.ceil(needed / unit[letter]) * unit[letter]))
        return index(least[letter] for letter in self.alike)


@dataclass(frozen=True)
class Windows:
    """The windows of a network along the axes of a volume, z y x.

    Attributes:
        size: voxels.
        overlap: share of a window that the next one sees too.
        fit: how they may shrink; None: they have this size everywhere.
        crop: whether only the core of each counts (blending ``crop``).
    """

    size: Index
    overlap: Triple
    fit: WindowFit | None = None
    crop: bool = False

    @property
    def step(self) -> Index:
        """Voxels from a window to the next."""
        return index(_step(n, share, self.crop) for n, share in zip(self.size, self.overlap, strict=True))

    def over(
        self, grid: VoxelGrid, context: Sequence[int] | None, extent: Extent | None, cores: Cores | None = None
    ) -> WindowLattice:
        """Return them over a grid, see `WindowLattice.over`."""
        cores = (cores or Cores()) if self.crop else None
        return WindowLattice.over(grid, self.size, self.overlap, context, extent, self.fit, cores)

    def seen_by(self, chosen: Sequence[Symmetry]) -> Windows:
        """Return the windows that become these in every one of the symmetries, which agree in their size."""
        letters = list("zyx")
        for symmetry in chosen:
            for a, b in enumerate(chosen[0].before(symmetry.axes)):  # exchanged by one of two
                letters = [letters[a] if letter == letters[b] else letter for letter in letters]
        most: dict[str, float] = {}
        for letter, share in zip(letters, (self.overlap[chosen[0].axes.index(axis)] for axis in range(3)), strict=True):
            most[letter] = max(share, most.get(letter, 0.0))
        overlap = overlap_per_axis([most[letter] for letter in letters])
        fit = None if self.fit is None else WindowFit(chosen[0].before(self.fit.multiple), "".join(letters))
        return Windows(chosen[0].before(self.size), overlap, fit, self.crop)


PerAxis = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Cores:
    """Where the cores of windows must end, for blocks that hold whole cores.

    Attributes:
        marks: per axis the faces of such blocks, voxels, from 0 to the grid's shape; None: only these two.
        reach: voxels beyond its cores that a block also takes from its own windows, for interpolation.
    """

    marks: PerAxis | None = None
    reach: Index = (0, 0, 0)


@dataclass(frozen=True)
class WindowLattice:
    """All windows of one prediction.

    Attributes:
        grid: the voxels to predict.
        window: window shape in voxels, z y x.
        starts: per axis the first voxels of the windows, ascending, in voxels of ``grid``; negative if a window begins
            in the context outside the grid.
        extent: where there is raw, in voxels of ``grid``; None: everywhere.
        faces: per axis where the windows' cores begin and end, ascending, one more than windows: each voxel is taken
            from the window whose core holds it. None: windows are blended by weights.
        reach: see `Cores`.
    """

    grid: VoxelGrid
    window: Index
    starts: PerAxis
    extent: Extent | None = None
    faces: PerAxis | None = None
    reach: Index = (0, 0, 0)

    @classmethod
    def over(
        cls,
        grid: VoxelGrid,
        window: Sequence[int] | int,
        overlap: Sequence[float] | float = 0.25,
        context: Sequence[int] | int | None = None,
        extent: Extent | None = None,
        fit: WindowFit | None = None,
        cores: Cores | None = None,
    ) -> WindowLattice:
        """Return the windows over ``grid`` and ``context`` voxels on every side of it, as far as there is raw.

        ``context=None`` takes half the overlap, at least 8 and at most a quarter of the window (none along an axis
        without overlap), so that a voxel at a face of the grid is as far from a window's face as any other voxel; it
        takes less, down to half of that, on an axis where the grid then fits into one window. A grid smaller than a
        window gets one centered window, shifted inside the raw. A window leaves the raw only if the raw is smaller than
        the window, or if the grid leaves it. With ``fit`` windows are as small as covers the grid.

        With ``cores`` each window counts in its core only. Cores tile the grid; they are no wider than a window less
        the overlap, and each lies in the middle of its window unless that would leave the grid with its context.

        Raises `InputError` for an empty grid, ``overlap`` outside [0, 1) or a negative context.
        """
        most = whole_index(window, "window", 1)
        if grid.size == 0:
            raise InputError(f"nothing to predict in an empty grid ({grid})")
        given = None if context is None else whole_index(context, "context", 0)
        raws, spans, shared = [], [], []
        for axis, (n, w, share) in enumerate(zip(grid.shape, most, overlap_per_axis(overlap), strict=True)):
            margin = _default_context(n, w, share) if given is None else given[axis]
            raws.append(None if extent is None or extent.is_empty else (extent.low[axis], extent.high[axis]))
            spans.append(_span(n, margin, raws[-1]))
            shared.append(w - _step(w, share, cores is not None))
        wanted, faces = [end - begin for begin, end in spans], list[tuple[int, ...]]()
        if cores is not None:
            marks = cores.marks or tuple((0, n) for n in grid.shape)
            fits = [len(m) == 2 and n <= w for m, n, w in zip(marks, wanted, most, strict=True)]  # in one window
            reach = index(min(r, o // 4) for r, o in zip(cores.reach, shared, strict=True))
            cut = zip(marks, fits, most, shared, reach, strict=True)
            faces = [m if f else _faces(m, w - o, r) for m, f, w, o, r in cut]
            widest = [max(b - a for a, b in itertools.pairwise(f)) for f in faces]
            wanted = [min(n, core + o) for n, core, o in zip(wanted, widest, shared, strict=True)]
        size = most if fit is None else fit.sides(most, wanted, shared)
        if cores is None:
            z, y, x = (_scan(*a) for a in zip(spans, size, map(operator.sub, size, shared), raws, strict=True))
            return cls(grid, size, (z, y, x), extent)
        z, y, x = (_around(*a) for a in zip(faces, spans, size, raws, strict=True))
        return cls(grid, size, (z, y, x), extent, (faces[0], faces[1], faces[2]), reach)

    @property
    def count(self) -> int:
        return math.prod(len(s) for s in self.starts)

    @property
    def leaves_raw(self) -> bool:
        return self.extent is not None and not self.extent.holds((0, 0, 0), self.grid.shape)

    def begin_of(self, numbers: Index) -> Index:
        """Return the first voxel of the window with these numbers along z, y and x."""
        return index(starts[number] for starts, number in zip(self.starts, numbers, strict=True))

    def sees_raw(self, numbers: Index) -> bool:
        """Return whether any voxel of a window has raw."""
        begin = self.begin_of(numbers)
        return self.extent is None or self.extent.meets(begin, [b + n for b, n in zip(begin, self.window, strict=True)])

    def touching(self, axis: int, begin: int, end: int) -> range:
        """Return the numbers of the windows along ``axis`` that count in any of the voxels ``begin`` to ``end``."""
        if self.faces is not None:
            faces, beyond = self.faces[axis], min(self.reach[axis], (end - begin - 1) // 2)
            return range(bisect_right(faces, begin + beyond) - 1, bisect_left(faces, end - beyond))
        starts = self.starts[axis]
        return range(bisect_right(starts, begin - self.window[axis]), bisect_left(starts, end))

    def touched(self, begin: Index, shape: Index) -> list[range]:
        """Return the numbers of the windows that count in any voxel of a region, along each axis."""
        return [self.touching(axis, b, b + n) for axis, (b, n) in enumerate(zip(begin, shape, strict=True))]

    def counted(self, numbers: Index) -> VoxelGrid:
        """Return the grid in which the window with these numbers counts: its core, or all of it."""
        if self.faces is None:
            return self.grid.crop(self.begin_of(numbers), self.window)
        begin = [faces[number] for faces, number in zip(self.faces, numbers, strict=True)]
        end = [faces[number + 1] for faces, number in zip(self.faces, numbers, strict=True)]
        return self.grid.crop(begin, shape_between(begin, end))


def _step(window: int, overlap: float, crop: bool) -> int:
    if not crop:
        return max(1, int(window * (1 - overlap)))
    step = max(1, int(window * (1 - overlap) + 1e-9))
    return max(1, step - (window - step) % 2)  # both faces lose as much


def _default_context(n: int, window: int, overlap: float) -> int:
    wanted = min(max(8, math.ceil(window * overlap / 2)), window // 4) if overlap else 0
    spare = (window - n) // 2
    return spare if wanted / 2 <= spare < wanted else wanted


def _span(n: int, margin: int, raw: tuple[int, int] | None) -> tuple[int, int]:
    """First and last (exclusive) voxel to cover along an axis of ``n`` voxels: these and a margin, as far as there is
    raw (from ``raw[0]`` to ``raw[1]``, exclusive; None: everywhere)."""
    begin, end = -margin, n + margin
    return (begin, end) if raw is None else (min(0, max(begin, raw[0])), max(n, min(end, raw[1])))


def _scan(span: tuple[int, int], window: int, step: int, raw: tuple[int, int] | None) -> tuple[int, ...]:
    """Window starts over a span of voxels, by the rule of `monai.data.utils.dense_patch_slices`."""
    begin, end = span
    spare = window - (end - begin)
    if spare < 0:
        return *range(begin, end - window, step), end - window
    start = begin - spare // 2
    if raw is not None:
        low, high = min(begin, raw[0]), max(end, raw[1])
        start = min(max(start, low), high - window) if high - low >= window else low - (window - (high - low)) // 2
    return (start,)


def _faces(marks: Sequence[int], most: int, spare: int) -> tuple[int, ...]:
    """Faces of cores of at most ``most`` voxels (and ``spare`` if that saves one), as few as possible and of about one
    size, between the marks. Their size is a multiple of a power of two, so that windows begin at the same place of a
    network's coarse grid: elsewhere, its values are a little different."""
    unit = min(_COARSEST, 1 << max(0, most.bit_length() - 4))
    faces = list[int]()
    for begin, end in itertools.pairwise(marks):
        number = max(1, math.ceil((end - begin - spare) / (most // unit * unit)))
        core = math.ceil((end - begin) / number)
        whole = math.ceil(core / unit) * unit
        faces += range(begin, end, whole if whole <= most else core)
    return (*faces, marks[-1])


def _around(faces: Sequence[int], span: tuple[int, int], window: int, raw: tuple[int, int] | None) -> tuple[int, ...]:
    """Window starts: each window has its core in the middle, moved inside the span if it is large enough."""
    begin, end = span
    if end - begin < window:
        return _scan(span, window, window, raw) * (len(faces) - 1)
    middles = (a - (window - (b - a)) // 2 for a, b in itertools.pairwise(faces))
    return tuple(min(max(start, begin), end - window) for start in middles)


def importance_map(window: Sequence[int], blending: str = "gaussian") -> torch.Tensor:
    """Return the weight of a window's voxels, float32 (d, h, w).

    ``gaussian``: a product of Gaussians around the center with sigma 1/8 of the width, never below the larger of 1e-3
    and its own smallest value, as `monai.data.utils.compute_importance_map` computes it; ``constant``: ones.
    """
    import torch

    if blending not in BLENDINGS[1:]:
        raise InputError(f"blending must be one of {', '.join(BLENDINGS[1:])}, got {blending!r}")
    size = whole_index(window, "window", 1)
    if blending == "constant":
        return torch.ones(size, dtype=torch.float32)
    profiles = []
    for n in size:
        x = torch.arange(n, dtype=torch.float32) - (n - 1) / 2
        profiles.append(torch.exp(x**2 / (-2 * (_SIGMA_SCALE * n) ** 2)))
    weights = profiles[0][:, None, None] * profiles[1][None, :, None] * profiles[2][None, None, :]
    return torch.clamp_(weights, min=max(float(weights.min()), _LEAST_WEIGHT))
