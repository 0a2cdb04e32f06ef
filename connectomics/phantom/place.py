"""Where the objects of a phantom's cell are: seeded placement by rejection, so that nothing overlaps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from connectomics.geometry import Box
from connectomics.phantom import kinds, shapes
from connectomics.phantom.shapes import BALL, BOWL, DISC, cell_distance, distance, unit
from connectomics.phantom.textures import Floats

#: Objects keep this distance (nm), which the bending of the world (see `render`) cannot close.
GAP = 11.0
#: Objects affect the gray value up to this distance (nm) from their surface; ER sheets farther, because of ribosomes.
MARGIN, BOWL_MARGIN = 4.5, 26.0
_ER_GROUP = 1


@dataclass(frozen=True)
class Objects:
    """Everything in a scene. Arrays run over primitives; an object may consist of many.

    Attributes:
        cell: parameters of the cell's body (`shapes.cell_distance`). nucleus: those of a ball.
        parameters: (n, 12) float64, see `shapes`.
        table: (n, 3) int64: shape, index into `kinds.KINDS`, and the object's id among its kind, from 1.
        bounds: (n, 6) float64, a box (begin, end) around each primitive, with its margin.
    """

    cell: Floats
    nucleus: Floats
    parameters: Floats
    table: NDArray[np.int64]
    bounds: Floats

    def count(self, kind: int) -> int:
        """Number of objects of a kind."""
        return int(self.table[self.table[:, 1] == kind, 2].max(initial=0))


def place(seed: int, box: Box) -> Objects:
    """Fill ``box`` (nm) with a cell and its organelles; the same seed and box give the same objects."""
    builder = _Builder(seed, box)
    builder.pores()
    builder.processes()
    builder.golgi()
    builder.mitochondria()
    builder.er_sheets()
    builder.balls(kinds.LD, 7.0, 5, 58.0, 108.0)
    builder.balls(kinds.LYSO, 5.5, 3, 58.0, 105.0)
    builder.balls(kinds.ENDO, 5.5, 3, 52.0, 100.0)
    builder.balls(kinds.PEROX, 2.5, 2, 52.0, 78.0)
    builder.er_tubules()
    builder.microtubules()
    builder.vesicles()
    table = np.array([row[:3] for row in builder.rows], np.int64).reshape(-1, 3)
    parameters = np.array([row[3] for row in builder.rows]).reshape(-1, shapes.PARAMETERS)
    bounds = shapes.bounds(table, parameters, MARGIN, BOWL_MARGIN)
    return Objects(builder.cell, builder.nucleus, parameters, table, bounds)


class _Builder:
    """The state of a placement: what is there, what is taken, the random stream."""

    def __init__(self, seed: int, box: Box) -> None:
        self.rng = np.random.default_rng(np.random.SeedSequence([0xCE11, seed]))
        self.box, self.begin, self.end = box, np.array(box.begin, float), np.array(box.end, float)
        self.extent = float(min(box.extent))
        # Organelles of a small world are smaller, so that it still holds some of every kind; membranes are not.
        self.scale = float(np.clip((self.extent / 1600.0) ** 0.6, 0.5, 1.3))
        self.cell, self.nucleus = self._bodies()
        self.taken = _Occupancy(box.grow(100.0), 240.0 * self.scale)
        self.rows: list[tuple[int, int, int, Floats]] = []  # shape, kind, number, parameters
        self.numbers = [0] * len(kinds.KINDS)
        self.er_nodes: list[Floats] = []
        self.golgi_places: list[Floats] = []
        to_cell, to_nucleus = shapes.body_distances(self.cell, self.nucleus, self._anywhere(4000))
        share = float(np.mean((to_cell < -kinds.RUFFLES) & (to_nucleus > 20)))
        self.cytoplasm = share * float(np.prod(box.extent)) * 1e-9  # cubic micrometers

    # -- the cell and its nucleus ------------------------------------------------------------------------------------
    def _bodies(self) -> tuple[Floats, Floats]:
        """The cell ends in the world on two sides; the nucleus is near the opposite edge, cut by the world's end."""
        begin, end, size = self.begin, self.end, self.end - self.begin
        at_end = self.rng.integers(0, 2, 3)[1:] == 1  # on which side of y and x the cell ends
        body_begin, body_end, center = begin - size, end + size, begin + size * 0.5
        inset = size[1:] * self.rng.uniform(0.13, 0.17, 2)
        body_end[1:] = np.where(at_end, end[1:] - inset, body_end[1:])
        body_begin[1:] = np.where(at_end, body_begin[1:], begin[1:] + inset)
        center[0] += size[0] * self.rng.uniform(-0.08, 0.08)
        inset = size[1:] * self.rng.uniform(0.10, 0.17, 2)
        center[1:] = np.where(at_end, begin[1:] + inset, end[1:] - inset)
        semi = min(0.40 * self.extent, 3200.0)
        direction = unit(np.array([1.0, *self.rng.uniform(-0.3, 0.3, 2)]))
        along, across = semi * self.rng.uniform(1.0, 1.2), semi * self.rng.uniform(0.92, 1.0)
        cell = shapes.parameters(body_begin, body_end, 0.3 * self.extent)
        return cell, shapes.parameters(center, direction, along, across)

    def pores(self) -> None:
        """Nuclear pores, spread over the envelope by rejection."""
        along, across = self.nucleus[6], self.nucleus[7]
        area = 4 * np.pi * (along * across**2) ** (2 / 3) * 1e-6
        for _ in range(int(area * 26 / self.scale)):
            spot = self._on_nucleus(self._direction(), -kinds.NE_THICKNESS / 2)
            ball = np.array([[*spot, 44.0]])
            if self.box.grow(60.0).contains(Box(tuple(spot), tuple(spot))) and self.taken.free(ball, 26.0):
                self.taken.add(ball)
                row = shapes.parameters(spot, self._nucleus_normal(spot), 40.0, kinds.NE_THICKNESS / 2 + 5.0)
                self._new(kinds.PORE, [(DISC, row)])

    # -- organelles --------------------------------------------------------------------------------------------------
    def mitochondria(self) -> None:
        """Bent tubes with round ends, a third of them long."""
        for _ in self._attempts(kinds.MITO, 11.0, 7):
            radius = self.rng.uniform(80, 114) * self.scale
            length = self.rng.uniform(180, 420) * self.scale * (1.7 if self.rng.random() < 0.3 else 1.0)
            step = 0.45 * radius
            bend = self.rng.uniform(0.0, 0.22)
            axis, heading, spot = self._direction(), self._direction(), self._anywhere(1)[0]
            path = [spot]
            for _ in range(max(2, int(length / step))):
                heading = unit(heading + bend * np.cross(axis, heading) + self.rng.normal(0, 0.06, 3))
                path.append(path[-1] + step * heading)
            ends = radius * (1 - 0.16 * np.abs(np.linspace(-1, 1, len(path))) ** 3)
            self._tube(kinds.MITO, np.array(path), ends * self.rng.uniform(0.94, 1.06, len(path)))

    def er_sheets(self) -> None:
        """Cisternae around the nucleus, singly or two in parallel; tubules start at their rims."""
        for _ in self._attempts(kinds.ER, 7.0, 3):
            layers = int(self.rng.integers(1, 3))
            height = self.rng.uniform(70, 420) * self.scale
            spot = self._on_nucleus(self._direction(), height)
            normal = unit(self._nucleus_normal(spot) + self.rng.normal(0, 0.2, 3))
            radius = self.nucleus[7] * self.rng.uniform(0.8, 1.2) + height
            reach = self.rng.uniform(130, 250) * self.scale
            half = self.rng.uniform(17, 21)
            center = spot - normal * radius
            sheets = [
                shapes.bowl(center, normal, radius + layer * 74.0, reach / radius, half, half + 4.0)
                for layer in range(layers)
            ]
            if self._stack(kinds.ER, sheets, _ER_GROUP):
                for sheet in sheets:
                    self.er_nodes.extend(shapes.rings(sheet, [(np.arctan2(sheet[8], sheet[7]), 10)]))

    def golgi(self) -> None:
        """Stacks of four to six thin bowls with swollen rims, and room around them for their vesicles."""
        for _ in self._attempts(kinds.GOLGI, 1.6, 1):
            radius = self.rng.uniform(300, 520) * self.scale
            normal, spot = self._direction(), self._anywhere(1)[0]
            reach = self.rng.uniform(135, 190) * self.scale
            cisternae = int(self.rng.integers(4, 7))
            wide = [(reach / radius) * self.rng.uniform(0.8, 1.0) for _ in range(cisternae)]
            center = spot - normal * radius
            bowls = [shapes.bowl(center, normal, radius + 35.0 * k, w, 11.0, 14.5) for k, w in enumerate(wide)]
            if self._stack(kinds.GOLGI, bowls):
                self.golgi_places.append(spot + normal * 17.5 * cisternae)

    def balls(self, kind: int, density: float, least: int, low: float, high: float) -> None:
        """Round organelles of radius ``low`` to ``high`` (nm, before scaling), slightly flattened or drawn out."""
        for _ in self._attempts(kind, density, least):
            radius = self.rng.uniform(low, high) * self.scale
            flat = 0.96 if kind == kinds.LD else self.rng.uniform(0.78, 1.0)
            self._ball(kind, self._anywhere(1)[0], radius * flat, radius)

    def er_tubules(self) -> None:
        """Tubes that grow from sheets and from each other through what room is left."""
        wanted = self._number(55.0, 10)
        if not self.er_nodes:
            self.er_nodes.append(self._anywhere(1)[0])
        for _ in range(4 * wanted):
            if wanted <= 0:
                return
            which = int(self.rng.integers(len(self.er_nodes)))
            radius = self.rng.uniform(23, 31)
            steps = int(self.rng.integers(8, 30))
            path = self._walk(self.er_nodes[which], radius, 26.0, steps, 0.32, group=_ER_GROUP)
            if len(path) >= 5:
                wanted -= 1
                radii = radius * self.rng.uniform(0.9, 1.1, len(path))
                self._new(kinds.ER, shapes.segments(path, radii, self._direction()))
                self.taken.add(np.column_stack([path, np.full(len(path), radius)]), _ER_GROUP)
                self.er_nodes[which] = path[-1]  # no stars: another tubule starts elsewhere
                self.er_nodes.extend(path[3:-2:4])

    def microtubules(self) -> None:
        """Nearly straight thin tubes, in loose bundles: each starts near the last, in about its direction."""
        start, heading = self._anywhere(1)[0], self._direction()
        for _ in self._attempts(kinds.MT, 26.0, 8, 4):
            if self.rng.random() < 0.4:
                start, heading = self._anywhere(1)[0], self._direction()
            else:
                start = start + self.rng.normal(0, 45, 3)
                heading = unit(heading + self.rng.normal(0, 0.1, 3))
            path = self._walk(start, 12.5, 22.0, int(self.rng.integers(16, 60) * self.scale), 0.02, heading)
            if len(path) >= 9:
                path = path[:: 1 + (len(path) > 20)]  # fewer, longer pieces where it is nearly straight
                self._tube(kinds.MT, path, np.full(len(path), 12.5))

    def vesicles(self) -> None:
        """Small vesicles: half around the Golgi stacks, half anywhere."""
        for attempt in self._attempts(kinds.VES, 95.0, 14):
            spot = self._anywhere(1)[0]
            if attempt % 2 and self.golgi_places:
                middle = self.golgi_places[int(self.rng.integers(len(self.golgi_places)))]
                spot = middle + self.rng.normal(0, 130 * self.scale, 3)
            radius = self.rng.uniform(21, 31) * max(0.85, min(1.0, self.scale))
            self._ball(kinds.VES, spot, radius, radius)

    def processes(self) -> None:
        """Thin processes of other cells in the space outside."""
        for _ in range(60):
            if self.numbers[kinds.PROCESS] >= 3:
                return
            radius = self.rng.uniform(48, 72) * self.scale
            heading = unit(np.array([1.0, *self.rng.normal(0, 0.15, 2)]))
            spot = self._anywhere(1)[0]
            spot[0] = self.box.begin[0] - 80.0
            path = []
            while spot[0] < self.box.end[0] + 80.0:
                path.append(spot)
                heading = unit(heading + self.rng.normal(0, 0.05, 3) * np.array([0.0, 1.0, 1.0]))
                spot = spot + 40.0 * heading
            points = np.array(path)
            room = np.column_stack([points, np.full(len(points), radius)])
            to_cell, _ = shapes.body_distances(self.cell, self.nucleus, points)
            if to_cell.min() > radius + kinds.RUFFLES + GAP and self.taken.free(room, 2 * GAP):
                self.taken.add(room)
                radii = radius * self.rng.uniform(0.85, 1.0, len(points))
                self._new(kinds.PROCESS, shapes.segments(points, radii, heading))

    # -- helpers -----------------------------------------------------------------------------------------------------
    def _number(self, density: float, least: int) -> int:
        """How many objects of a density (per cubic micrometer of cytoplasm at full size)."""
        return max(least, int(density * self.cytoplasm / self.scale**3))

    def _attempts(self, kind: int, density: float, least: int, patience: int = 1) -> Iterator[int]:
        """Count the attempts to place objects of a kind, until there are as many as wanted or it took too many."""
        wanted = self._number(density, least)
        for attempt in range(patience * (80 + 40 * wanted)):
            if self.numbers[kind] >= wanted:
                return
            yield attempt

    def _anywhere(self, n: int) -> Floats:
        return self.rng.uniform(self.begin - 40.0, self.end + 40.0, (n, 3))

    def _direction(self) -> Floats:
        return unit(self.rng.normal(size=3))

    def _nucleus_normal(self, spot: Floats) -> Floats:
        steps = np.concatenate([spot + np.eye(3), spot - np.eye(3)])
        _, d = shapes.body_distances(self.cell, self.nucleus, steps)
        return unit(d[:3] - d[3:])

    def _on_nucleus(self, direction: Floats, height: float) -> Floats:
        """The point in ``direction`` from the nucleus' center that lies ``height`` nm above its surface."""
        center, t = self.nucleus[0:3], float(self.nucleus[7])
        for _ in range(12):
            _, d = shapes.body_distances(self.cell, self.nucleus, (center + t * direction)[None])
            t -= float(d[0]) - height
        return np.asarray(center + t * direction)

    def _fits(self, balls: Floats, ignored: int = -1) -> bool:
        """Whether spheres lie in the cytoplasm, clear of everything, with at least one of them in the world."""
        within = _in_cytoplasm(self.cell, self.nucleus, self.begin, self.end, balls)
        return within and self.taken.free(balls, GAP, ignored)

    def _new(self, kind: int, primitives: list[tuple[int, Floats]]) -> None:
        self.numbers[kind] += 1
        self.rows.extend((shape, kind, self.numbers[kind], row) for shape, row in primitives)

    def _ball(self, kind: int, spot: Floats, along: float, across: float) -> None:
        ball = np.array([[*spot, max(along, across)]])
        if self._fits(ball):
            self._new(kind, [(BALL, shapes.parameters(spot, self._direction(), along, across))])
            self.taken.add(ball)

    def _tube(self, kind: int, path: Floats, radii: Floats) -> None:
        balls = np.column_stack([path, radii])
        dense = np.concatenate([balls[:-1] + (balls[1:] - balls[:-1]) * t for t in (0.0, 1 / 3, 2 / 3)] + [balls[-1:]])
        if self._fits(dense):
            self._new(kind, shapes.segments(path, radii, self._direction()))
            self.taken.add(dense)

    def _stack(self, kind: int, bowls: list[Floats], group: int = 0) -> bool:
        """Place bowls as one object, if they fit; objects of an ER group may touch each other."""
        balls = np.concatenate([shapes.bowl_balls(bowl) for bowl in bowls])
        fits = self._fits(balls, group or -1)
        if fits:
            self._new(kind, [(BOWL, bowl) for bowl in bowls])
            self.taken.add(balls, group)
        return fits

    def _walk(
        self,
        start: Floats,
        radius: float,
        step: float,
        steps: int,
        bend: float,
        heading: Floats | None = None,
        group: int = -1,
    ) -> Floats:
        """A path of free places from ``start``, turning by about ``bend`` a step and around what is in the way."""
        direction = self._direction() if heading is None else heading
        path = [start]
        for _ in range(steps):
            for trial in range(6 if heading is None else 1):
                turned = unit(direction + self.rng.normal(0, bend * (1 + trial), 3))
                spot = path[-1] + step * turned
                if self._fits(np.array([[*spot, radius]]), group):
                    direction = turned
                    path.append(spot)
                    break
            else:
                break
        return np.array(path)


#: Last sphere of each cell, all spheres (with group and the one before in their cell), origin and edge of the cells.
_Taken = tuple[NDArray[np.int64], Floats, Floats, float]


class _Occupancy:
    """A growing set of spheres (z, y, x, radius; nm), in lists by cell of ``edge`` nm; border cells reach beyond."""

    def __init__(self, box: Box, edge: float) -> None:
        last = np.full(np.maximum(1, np.ceil(np.asarray(box.extent) / edge)).astype(int), -1, np.int64)
        self._taken: _Taken = (last, np.empty((1024, 6)), np.asarray(box.begin, np.float64), edge)
        self._count, self._largest = 0, 0.0

    def free(self, spheres: Floats, gap: float, ignored: int = -1) -> bool:
        """Whether ``spheres`` keep ``gap`` nm from all that is there, spheres of the group ``ignored`` apart."""
        return not _hits(self._taken, self._largest + gap, spheres, gap, ignored)

    def add(self, spheres: Floats, group: int = 0) -> None:
        """Take the place of ``spheres``."""
        last, there, origin, edge = self._taken
        while self._count + len(spheres) > len(there):
            there = np.concatenate([there, np.empty_like(there)])
            self._taken = (last, there, origin, edge)
        there[self._count : self._count + len(spheres), :5] = np.insert(spheres, 4, group, axis=1)
        _insert(self._taken, spheres, self._count)
        self._count += len(spheres)
        self._largest = max(self._largest, float(spheres[:, 3].max(initial=0.0)))


@njit(cache=True, nogil=True)
def _in_cytoplasm(cell: Floats, nucleus: Floats, begin: Floats, end: Floats, balls: Floats) -> bool:
    """Whether spheres are within the cytoplasm, with the center of one of them between ``begin`` and ``end``."""
    inside = False
    for ball in balls:
        z, y, x, room = ball[0], ball[1], ball[2], ball[3] + GAP
        if cell_distance(cell, z, y, x) >= -room - kinds.RUFFLES or distance(BALL, nucleus, z, y, x) <= room + 6.0:
            return False
        inside |= begin[0] < z < end[0] and begin[1] < y < end[1] and begin[2] < x < end[2]
    return inside


@njit(cache=True, nogil=True)
def _cell(taken: _Taken, sphere: Floats, reach: float) -> NDArray[np.int64]:
    """The cell that is ``reach`` nm from the center of a sphere on every axis, or the last one before the border."""
    cell = np.empty(3, np.int64)
    for axis in range(3):
        place = np.int64(np.floor((sphere[axis] + reach - taken[2][axis]) / taken[3]))
        cell[axis] = min(max(place, 0), taken[0].shape[axis] - 1)
    return cell


@njit(cache=True, nogil=True)
def _insert(taken: _Taken, spheres: Floats, count: int) -> None:
    last, there = taken[0], taken[1]
    for i in range(len(spheres)):
        z, y, x = _cell(taken, spheres[i], 0.0)
        there[count + i, 5], last[z, y, x] = last[z, y, x], count + i


@njit(cache=True, nogil=True)
def _hits(taken: _Taken, reach: float, spheres: Floats, gap: float, ignored: int) -> bool:
    last, there, _, _ = taken
    for i in range(len(spheres)):
        low, high = _cell(taken, spheres[i], -reach - spheres[i, 3]), _cell(taken, spheres[i], reach + spheres[i, 3])
        for z in range(low[0], high[0] + 1):
            for y in range(low[1], high[1] + 1):
                for x in range(low[2], high[2] + 1):
                    j = last[z, y, x]
                    while j >= 0:
                        square = 0.0
                        for axis in range(3):
                            square += (spheres[i, axis] - there[j, axis]) ** 2
                        if there[j, 4] != ignored and square < (spheres[i, 3] + there[j, 3] + gap) ** 2:
                            return True
                        j = np.int64(there[j, 5])
    return False
