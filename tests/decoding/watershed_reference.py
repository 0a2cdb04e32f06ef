"""The seeded watershed as it is defined, voxel by voxel in plain Python: what the fast ones are held against."""

from __future__ import annotations

import itertools

import numpy as np


def steps(connectivity):
    rank = {6: 1, 18: 2, 26: 3}[connectivity]
    return [s for s in itertools.product((-1, 0, 1), repeat=3) if 0 < sum(map(abs, s)) <= rank]


def neighbours(voxel, shape, connectivity):
    for step in steps(connectivity):
        other = tuple(v + s for v, s in zip(voxel, step, strict=True))
        if all(0 <= i < n for i, n in zip(other, shape, strict=True)):
            yield other


def squared_depths(mask, weights, cap):
    """Whole-number squared distance to the nearest background voxel of the array, at most ``cap``."""
    background = np.argwhere(~mask)
    out = np.zeros(mask.shape, np.int64)
    for voxel in np.argwhere(mask):
        out[tuple(voxel)] = min([cap, *(((background - voxel) ** 2) @ np.asarray(weights)).tolist()])
    return out


def seeds(mask, height, radius, connectivity):
    """Voxels before all others that they hold together with inside the box of ``radius`` around them."""
    found = []
    for voxel in map(tuple, np.argwhere(mask)):
        reached, front = {voxel}, [voxel]
        while front:
            for other in neighbours(front.pop(), mask.shape, connectivity):
                near = all(abs(o - v) <= r for o, v, r in zip(other, voxel, radius, strict=True))
                if near and mask[other] and other not in reached:
                    reached.add(other)
                    front.append(other)
        if all((height[voxel], voxel) <= (height[other], other) for other in reached):
            found.append(voxel)
    return found


def watershed(mask, height, cores, connectivity, floor=None):
    """Voxels in order of height, then of place; each joins its neighbours that came before, the first of them first,
    unless both sides have a core. Returns ids 1..n by their first voxel, 0 where no core is reached."""
    parent, core = {}, {}

    def root(voxel):
        while parent[voxel] != voxel:
            voxel = parent[voxel]
        return voxel

    first = {}
    for voxel in map(tuple, np.argwhere(mask)):
        parent[voxel] = voxel
        if cores[voxel]:
            parent[voxel] = first.setdefault(int(cores[voxel]), voxel)
            core[parent[voxel]] = True
    order = sorted(parent, key=lambda v: (height[v], v))
    rank = {voxel: i for i, voxel in enumerate(order)}
    for voxel in order:
        earlier = [n for n in neighbours(voxel, mask.shape, connectivity) if n in rank and rank[n] < rank[voxel]]
        for other in sorted(earlier, key=rank.__getitem__):
            one, two = root(voxel), root(other)
            flat = floor is not None and height[voxel] <= floor
            if one != two and (flat or not (core.get(one) and core.get(two))):
                parent[one] = two
                core[two] = core.get(one, False) or core.get(two, False)
    ids, out = {}, np.zeros(mask.shape, np.int64)
    for voxel in map(tuple, np.argwhere(mask)):
        if core.get(root(voxel)):
            out[voxel] = ids.setdefault(root(voxel), len(ids) + 1)
    return out
