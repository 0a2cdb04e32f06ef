"""Where the objects of a phantom's cell are: seeded placement by rejection, so that nothing overlaps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from connectomics.geometry import Box
from connectomics.phantom import kinds, shapes
from connectomics.phantom.occupancy import Occupancy

Vector = NDArray[np.float64]

#: Objects keep this distance (nm), which the bending of the world (see `render`) cannot close.
GAP = 11.0
_ER_GROUP = 1


@dataclass(frozen=True)
class Objects:
    """Everything in a scene. Arrays run over primitives; an object may consist of many.

    Attributes:
        cell: parameters of the cell's body (`shapes.cell_distance`).
        nucleus: parameters of the nucleus (a spheroid).
        parameters: (n, 12) float64, see `shapes`.
        shape: (n,) which shape a row is.
        kind: (n,) index into `kinds.KINDS`.
        number: (n,) the object's id among its kind, from 1; the same everywhere in the world.
    """

    cell: Vector
    nucleus: Vector
    parameters: Vector
    shape: NDArray[np.int64]
    kind: NDArray[np.int64]
    number: NDArray[np.int64]

    def count(self, kind: int) -> int:
        """Number of objects of a kind."""
        return int(self.number[self.kind == kind].max(initial=0))


def place(seed: int, box: Box) -> Objects:
    """Fill ``box`` (nm) with a cell and its organelles; the same seed and box give the same objects."""
    builder = _Builder(seed, box)
    builder.pores()
    builder.processes()
    builder.golgi()
    builder.mitochondria()
    builder.er_sheets()
    for kind, density, least, low, high in (
        (kinds.LD, 7.0, 5, 58.0, 108.0),
        (kinds.LYSO, 5.5, 3, 58.0, 105.0),
        (kinds.ENDO, 5.5, 3, 52.0, 100.0),
        (kinds.PEROX, 2.5, 2, 52.0, 78.0),
    ):
        builder.balls(kind, density, least, low, high)
    builder.er_tubules()
    builder.microtubules()
    builder.vesicles()
    return builder.finish()


class _Builder:
    """The state of a placement: what is there, what is taken, the random stream."""

    def __init__(self, seed: int, box: Box) -> None:
        self.rng = np.random.default_rng(np.random.SeedSequence([0xCE11, seed]))
        self.box = box
        self.extent = float(min(box.extent))
        # Organelles of a small world are smaller, so that it still holds some of every kind; membranes are not.
        self.scale = float(np.clip((self.extent / 1600.0) ** 0.6, 0.5, 1.3))
        self.cell, self.nucleus = self._bodies()
        self.taken = Occupancy(box.grow(100.0), 240.0 * self.scale)
        self.rows: list[tuple[int, int, int, Vector]] = []
        self.numbers = [0] * len(kinds.KINDS)
        self.er_nodes: list[Vector] = []
        self.golgi_places: list[Vector] = []
        probe = self._anywhere(4000)
        to_cell, to_nucleus = shapes.body_distances(self.cell, self.nucleus, probe)
        share = float(np.mean((to_cell < -kinds.RUFFLES) & (to_nucleus > 20)))
        self.cytoplasm = share * float(np.prod(box.extent)) * 1e-9  # cubic micrometres

    # -- the cell and its nucleus ------------------------------------------------------------------------------------
    def _bodies(self) -> tuple[Vector, Vector]:
        """The cell ends in the world on two sides; the nucleus is near the opposite edge, cut by the world's end."""
        begin, end = np.array(self.box.begin), np.array(self.box.end)
        size = end - begin
        sides = self.rng.integers(0, 2, 3)  # on which side of y and x the cell ends
        body_begin, body_end = begin - size, end + size
        for axis in (1, 2):
            inset = size[axis] * self.rng.uniform(0.13, 0.17)
            if sides[axis]:
                body_end[axis] = end[axis] - inset
            else:
                body_begin[axis] = begin[axis] + inset
        cell = np.zeros(shapes.PARAMETERS)
        cell[0:3], cell[3:6], cell[6] = body_begin, body_end, 0.3 * self.extent
        away = np.where(sides[1:3] == 1, 1.0, 0.0)  # the nucleus is on the other side
        center = begin + size * 0.5
        center[0] += size[0] * self.rng.uniform(-0.08, 0.08)
        for axis in (1, 2):
            inset = size[axis] * self.rng.uniform(0.10, 0.17)
            center[axis] = begin[axis] + inset if away[axis - 1] else end[axis] - inset
        semi = min(0.40 * self.extent, 3200.0)
        axis_vector = _unit(np.array([1.0, *self.rng.uniform(-0.3, 0.3, 2)]))
        nucleus = np.zeros(shapes.PARAMETERS)
        nucleus[0:3], nucleus[3:6] = center, axis_vector
        nucleus[6], nucleus[7] = semi * self.rng.uniform(1.0, 1.2), semi * self.rng.uniform(0.92, 1.0)
        return cell, nucleus

    def pores(self) -> None:
        """Nuclear pores, spread over the envelope by rejection."""
        along, across = self.nucleus[6], self.nucleus[7]
        area = 4 * np.pi * (along * across**2) ** (2 / 3) * 1e-6
        middle = -kinds.NE_THICKNESS / 2
        for _ in range(int(area * 26 / self.scale)):
            direction = self._direction()
            spot = self._on_nucleus(direction, middle)
            normal = self._nucleus_normal(spot)
            ball = np.array([[*spot, 44.0]])
            if self.box.grow(60.0).contains(Box(tuple(spot), tuple(spot))) and self.taken.free(ball, 26.0):
                self.taken.add(ball)
                row = np.zeros(shapes.PARAMETERS)
                row[0:3], row[3:6], row[6], row[7] = spot, normal, 40.0, kinds.NE_THICKNESS / 2 + 5.0
                self._new(kinds.PORE, [(shapes.DISC, row)])

    # -- organelles --------------------------------------------------------------------------------------------------
    def mitochondria(self) -> None:
        """Bent tubes with round ends, a third of them long."""
        wanted, attempts = self._number(11.0, 7)
        for _ in range(attempts):
            if self.numbers[kinds.MITO] >= wanted:
                return
            radius = self.rng.uniform(80, 114) * self.scale
            length = self.rng.uniform(180, 420) * self.scale * (1.7 if self.rng.random() < 0.3 else 1.0)
            step = 0.45 * radius
            bend = self.rng.uniform(0.0, 0.22)
            axis, heading, spot = self._direction(), self._direction(), self._anywhere(1)[0]
            path = [spot]
            for _ in range(max(2, int(length / step))):
                heading = _unit(heading + bend * np.cross(axis, heading) + self.rng.normal(0, 0.06, 3))
                path.append(path[-1] + step * heading)
            ends = radius * (1 - 0.16 * np.abs(np.linspace(-1, 1, len(path))) ** 3)
            self._tube(kinds.MITO, np.array(path), ends * self.rng.uniform(0.94, 1.06, len(path)))

    def er_sheets(self) -> None:
        """Cisternae around the nucleus, singly or two in parallel; tubules start at their rims."""
        wanted, attempts = self._number(7.0, 3)
        for _ in range(attempts):
            if self.numbers[kinds.ER] >= wanted:
                return
            layers = int(self.rng.integers(1, 3))
            height = self.rng.uniform(70, 420) * self.scale
            spot = self._on_nucleus(self._direction(), height)
            normal = _unit(self._nucleus_normal(spot) + self.rng.normal(0, 0.2, 3))
            radius = self.nucleus[7] * self.rng.uniform(0.8, 1.2) + height
            reach = self.rng.uniform(130, 250) * self.scale
            half = self.rng.uniform(17, 21)
            rows, balls = [], []
            for layer in range(layers):
                row = _bowl(spot - normal * radius, normal, radius + layer * 74.0, reach / radius, half, half + 4.0)
                rows.append((shapes.BOWL, row))
                balls.append(_bowl_balls(row))
            if self._fits(np.concatenate(balls), _ER_GROUP):
                self._new(kinds.ER, rows)
                for (_, sheet), ball in zip(rows, balls, strict=True):
                    self.taken.add(ball, _ER_GROUP)
                    self.er_nodes.extend(_rim(sheet, 10))

    def golgi(self) -> None:
        """Stacks of four to six thin bowls with swollen rims, and room around them for their vesicles."""
        wanted, attempts = self._number(1.6, 1)
        for _ in range(attempts):
            if self.numbers[kinds.GOLGI] >= wanted:
                return
            radius = self.rng.uniform(300, 520) * self.scale
            normal, spot = self._direction(), self._anywhere(1)[0]
            reach = self.rng.uniform(135, 190) * self.scale
            cisternae = int(self.rng.integers(4, 7))
            rows, balls = [], []
            for k in range(cisternae):
                wide = (reach / radius) * self.rng.uniform(0.8, 1.0)
                rows.append((shapes.BOWL, _bowl(spot - normal * radius, normal, radius + 35.0 * k, wide, 11.0, 14.5)))
                balls.append(_bowl_balls(rows[-1][1]))
            if self._fits(np.concatenate(balls)):
                self._new(kinds.GOLGI, rows)
                self.taken.add(np.concatenate(balls))
                self.golgi_places.append(spot + normal * 17.5 * cisternae)

    def balls(self, kind: int, density: float, least: int, low: float, high: float) -> None:
        """Round organelles of radius ``low`` to ``high`` (nm, before scaling), slightly flattened or drawn out."""
        wanted, attempts = self._number(density, least)
        for _ in range(attempts):
            if self.numbers[kind] >= wanted:
                return
            radius = self.rng.uniform(low, high) * self.scale
            flat = 0.96 if kind == kinds.LD else self.rng.uniform(0.78, 1.0)
            self._ball(kind, self._anywhere(1)[0], radius * flat, radius)

    def er_tubules(self) -> None:
        """Tubes that grow from sheets and from each other through what room is left."""
        wanted, _ = self._number(55.0, 10)
        if not self.er_nodes:
            self.er_nodes.append(self._anywhere(1)[0])
        for _ in range(4 * wanted):
            if wanted <= 0:
                return
            which = int(self.rng.integers(len(self.er_nodes)))
            start = self.er_nodes[which]
            radius = self.rng.uniform(23, 31)
            path = self._walk(start, radius, 26.0, int(self.rng.integers(8, 30)), 0.32, _ER_GROUP)
            if len(path) >= 5:
                wanted -= 1
                self._new(kinds.ER, _segments(path, radius * self.rng.uniform(0.9, 1.1, len(path)), self._direction()))
                self.taken.add(np.column_stack([path, np.full(len(path), radius)]), _ER_GROUP)
                self.er_nodes[which] = path[-1]  # no stars: another tubule starts elsewhere
                self.er_nodes.extend(path[3:-2:4])

    def microtubules(self) -> None:
        """Nearly straight thin tubes, in loose bundles: each starts near the last, in about its direction."""
        wanted, attempts = self._number(26.0, 8)
        start, heading = self._anywhere(1)[0], self._direction()
        for _ in range(4 * attempts):
            if self.numbers[kinds.MT] >= wanted:
                return
            if self.rng.random() < 0.4:
                start, heading = self._anywhere(1)[0], self._direction()
            else:
                start = start + self.rng.normal(0, 45, 3)
                heading = _unit(heading + self.rng.normal(0, 0.1, 3))
            steps = int(self.rng.integers(16, 60) * self.scale)
            path = self._walk(start, 12.5, 22.0, steps, 0.02, -1, heading)
            if len(path) >= 9:
                path = path[:: 1 + (len(path) > 20)]  # fewer, longer pieces where it is nearly straight
                self._tube(kinds.MT, path, np.full(len(path), 12.5))

    def vesicles(self) -> None:
        """Small vesicles: half around the Golgi stacks, half anywhere."""
        wanted, attempts = self._number(95.0, 14)
        for attempt in range(attempts):
            if self.numbers[kinds.VES] >= wanted:
                return
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
            heading = _unit(np.array([1.0, *self.rng.normal(0, 0.15, 2)]))
            spot = self._anywhere(1)[0]
            spot[0] = self.box.begin[0] - 80.0
            path = []
            while spot[0] < self.box.end[0] + 80.0:
                path.append(spot)
                heading = _unit(heading + self.rng.normal(0, 0.05, 3) * np.array([0.0, 1.0, 1.0]))
                spot = spot + 40.0 * heading
            points = np.array(path)
            room = np.column_stack([points, np.full(len(points), radius)])
            to_cell, _ = shapes.body_distances(self.cell, self.nucleus, points)
            if to_cell.min() > radius + kinds.RUFFLES + GAP and self.taken.free(room, 2 * GAP):
                self.taken.add(room)
                radii = radius * self.rng.uniform(0.85, 1.0, len(points))
                self._new(kinds.PROCESS, _segments(points, radii, heading))

    # -- helpers -----------------------------------------------------------------------------------------------------
    def finish(self) -> Objects:
        """All that was placed, as arrays."""
        return Objects(
            self.cell,
            self.nucleus,
            np.array([r[3] for r in self.rows]).reshape(-1, shapes.PARAMETERS),
            np.array([r[0] for r in self.rows], np.int64),
            np.array([r[1] for r in self.rows], np.int64),
            np.array([r[2] for r in self.rows], np.int64),
        )

    def _number(self, density: float, least: int) -> tuple[int, int]:
        """How many objects of a density (per cubic micrometre of cytoplasm at full size), and how many tries."""
        wanted = max(least, int(density * self.cytoplasm / self.scale**3))
        return wanted, 80 + 40 * wanted

    def _anywhere(self, n: int) -> Vector:
        return self.rng.uniform(np.array(self.box.begin) - 40.0, np.array(self.box.end) + 40.0, (n, 3))

    def _direction(self) -> Vector:
        return _unit(self.rng.normal(size=3))

    def _nucleus_normal(self, spot: Vector) -> Vector:
        steps = np.concatenate([spot + np.eye(3), spot - np.eye(3)])
        _, d = shapes.body_distances(self.cell, self.nucleus, steps)
        return _unit(d[:3] - d[3:])

    def _on_nucleus(self, direction: Vector, height: float) -> Vector:
        """The point in ``direction`` from the nucleus' center that lies ``height`` nm above its surface."""
        center, t = self.nucleus[0:3], float(self.nucleus[7])
        for _ in range(12):
            _, d = shapes.body_distances(self.cell, self.nucleus, (center + t * direction)[None])
            t -= float(d[0]) - height
        return np.asarray(center + t * direction)

    def _fits(self, balls: Vector, ignored: int = -1) -> bool:
        """Whether spheres lie in the cytoplasm, clear of everything, with at least one of them in the world."""
        inside = np.all((balls[:, :3] > self.box.begin) & (balls[:, :3] < self.box.end), axis=1)
        if not inside.any():
            return False
        to_cell, to_nucleus = shapes.body_distances(self.cell, self.nucleus, balls[:, :3])
        room = balls[:, 3] + GAP
        within = np.all(to_cell < -room - kinds.RUFFLES) and np.all(to_nucleus > room + 6.0)
        return bool(within) and self.taken.free(balls, GAP, ignored)

    def _new(self, kind: int, rows: list[tuple[int, Vector]]) -> None:
        self.numbers[kind] += 1
        self.rows.extend((shape, kind, self.numbers[kind], row) for shape, row in rows)

    def _ball(self, kind: int, spot: Vector, along: float, across: float) -> None:
        ball = np.array([[*spot, max(along, across)]])
        if self._fits(ball):
            row = np.zeros(shapes.PARAMETERS)
            row[0:3], row[3:6], row[6], row[7] = spot, self._direction(), along, across
            self._new(kind, [(shapes.BALL, row)])
            self.taken.add(ball)

    def _tube(self, kind: int, path: Vector, radii: Vector) -> None:
        balls = np.column_stack([path, radii])
        dense = np.concatenate([balls[:-1] + (balls[1:] - balls[:-1]) * t for t in (0.0, 1 / 3, 2 / 3)] + [balls[-1:]])
        if self._fits(dense):
            self._new(kind, _segments(path, radii, self._direction()))
            self.taken.add(dense)

    def _walk(
        self,
        start: Vector,
        radius: float,
        step: float,
        steps: int,
        bend: float,
        ignored: int,
        heading: Vector | None = None,
    ) -> Vector:
        """A path of free places from ``start``, turning by about ``bend`` a step and around what is in the way."""
        direction = self._direction() if heading is None else heading
        path = [start]
        tries = 6 if heading is None else 1
        for _ in range(steps):
            for trial in range(tries):
                turned = _unit(direction + self.rng.normal(0, bend * (1 + trial), 3))
                spot = path[-1] + step * turned
                if self._fits(np.array([[*spot, radius]]), ignored):
                    direction = turned
                    path.append(spot)
                    break
            else:
                break
        return np.array(path)


def _unit(vector: Vector) -> Vector:
    return np.asarray(vector / np.linalg.norm(vector))


def _across(vector: Vector, guess: Vector) -> Vector:
    """A unit vector at right angles to ``vector``, near ``guess``."""
    flat = guess - vector * float(vector @ guess) / float(vector @ vector)
    if np.linalg.norm(flat) < 1e-6:
        return _across(vector, np.roll(guess, 1) + 0.1)
    return _unit(flat)


def _segments(path: Vector, radii: Vector, guess: Vector) -> list[tuple[int, Vector]]:
    """A path as tube primitives, with arc length and a frame that follows the bends."""
    rows = []
    length = 0.0
    for a, b, ra, rb in zip(path[:-1], path[1:], radii[:-1], radii[1:], strict=True):
        row = np.zeros(shapes.PARAMETERS)
        guess = _across(b - a, guess)
        row[0:3], row[3:6], row[6], row[7], row[8], row[9:12] = a, b, ra, rb, length, guess
        length += float(np.linalg.norm(b - a))
        rows.append((shapes.TUBE, row))
    return rows


def _bowl(center: Vector, axis: Vector, radius: float, aperture: float, half: float, rim: float) -> Vector:
    row = np.zeros(shapes.PARAMETERS)
    row[0:3], row[3:6], row[6] = center, axis, radius
    row[7], row[8], row[9], row[10] = np.cos(aperture), np.sin(aperture), half, rim
    return row


def _bowl_frame(row: Vector) -> tuple[Vector, Vector, Vector]:
    axis = row[3:6]
    u = _across(axis, np.array([0.3, 0.5, 0.8]))
    return axis, u, np.cross(axis, u)


def _bowl_balls(row: Vector) -> Vector:
    """Spheres that cover a bowl: rings around its axis, as far apart as the bowl is thick."""
    axis, u, v = _bowl_frame(row)
    radius, half = float(row[6]), float(row[10])
    aperture = float(np.arctan2(row[8], row[7]))
    rings = []
    for angle in np.linspace(0.0, aperture, max(2, int(aperture * radius / half) + 2)):
        around = max(1, int(np.ceil(2 * np.pi * radius * np.sin(angle) / half)))
        turns = (np.arange(around) * (2 * np.pi / around))[:, None]
        side = np.sin(angle) * (np.cos(turns) * u + np.sin(turns) * v)
        rings.append(row[0:3] + radius * (np.cos(angle) * axis + side))
    centers = np.concatenate(rings)
    return np.column_stack([centers, np.full(len(centers), half)])


def _rim(row: Vector, n: int) -> list[Vector]:
    """``n`` points on the middle of a bowl's rim."""
    axis, u, v = _bowl_frame(row)
    turns = np.arange(n) * (2 * np.pi / n)
    return [row[0:3] + row[6] * (row[7] * axis + row[8] * (np.cos(t) * u + np.sin(t) * v)) for t in turns]
