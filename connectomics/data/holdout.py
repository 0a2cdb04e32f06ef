"""Which groups of crops are held out: a seeded local search for a balanced validation side."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_LEAST_SHARE = 0.05  # that a group or crop may have of a whole, however many there are
_STEPS = 1000


def capped_shares(volumes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shares (n,) of a whole by volume (n,) >= 0, of which none exceeds twice an even share or 5 %, the larger of both.

    A few crops annotated at coarse voxel sizes hold nearly all of the annotated volume of a collection; without a cap
    they would be all that is drawn, or all that counts. What the largest lose is spread over the others by volume.
    Volumes that are all 0 give shares of 0.
    """
    values = np.asarray(volumes, np.float64)
    order = np.argsort(-values, kind="stable")
    there = int(np.count_nonzero(values))
    shares = np.zeros(len(values))
    most = max(_LEAST_SHARE, 2 / max(1, there))
    left = 1.0
    for number, at in enumerate(order[:there]):
        rest = order[number:there]
        parts = values[rest] / values[rest].sum() * left
        if parts[0] <= most:
            shares[rest] = parts
            break
        shares[at] = min(most, left)
        left -= shares[at]
    return shares


def held_out_groups(
    known: NDArray[np.float64], present: NDArray[np.float64], share: float, rng: np.random.Generator
) -> list[int]:
    """Numbers of the groups to hold out, ascending; empty if none can be spared.

    A group is never held out if it is the only one with some class. Among the others, the choice comes as close as
    possible to ``share`` of the annotated volume and of the present volume of each class, both capped
    (`capped_shares`), with every class on both sides where two groups have it, and with no more of the plain volume.

    Args:
        known: annotated volume of each group, (n,).
        present: present volume of each class in each group, (n, C).
        share: wanted share, above 0 and below 1.
        rng: for the place where the search begins.
    """
    having = (present > 0).sum(axis=0)
    spare = np.flatnonzero(~(present[:, having == 1] > 0).any(axis=1))
    if len(known) < 2 or len(spare) == 0:
        return []
    several = having >= 2
    volumes = np.column_stack([known, present[:, several]])
    shares = np.stack([capped_shares(column) for column in volumes.T], axis=1)
    there = present[:, several] > 0
    plain = known / (known.sum() or 1.0)

    def losses(sides: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Of choices (m, n): small where all shares are as wanted and no class is missing on a side."""
        chosen = sides.astype(np.float64)
        off = (chosen @ shares - share) ** 2
        too_much = np.maximum(0.0, chosen @ plain - share) ** 2
        unseen = (chosen @ there == 0).sum(axis=1)
        lost = ((1 - chosen) @ there == 0).sum(axis=1)
        empty = ~sides.any(axis=1) | sides.all(axis=1)
        return (
            4 * too_much
            + off[:, 0]
            + off[:, 1:].sum(axis=1) / max(1, off.shape[1] - 1)
            + unseen
            + 10 * lost
            + 1e6 * empty
        )

    best = np.zeros(len(known), bool)
    for number in rng.permutation(spare):
        if best.any() and shares[best, 0].sum() >= share:
            break
        best[number] = True
    least = float(losses(best[None])[0])
    for _ in range(_STEPS):
        moves = _moves(best, spare)
        found = losses(moves)
        number = int(np.argmin(found))
        if found[number] >= least - 1e-12:
            break
        best, least = moves[number], float(found[number])
    return [] if best.all() or not best.any() else np.flatnonzero(best).tolist()


def _moves(side: NDArray[np.bool_], spare: NDArray[np.intp]) -> NDArray[np.bool_]:
    """All choices (m, n) that differ by one group, or by one that comes for one that goes."""
    single = np.repeat(side[None], len(spare), axis=0)
    single[np.arange(len(spare)), spare] ^= True
    out, into = np.flatnonzero(side), spare[~side[spare]]
    pairs = np.repeat(side[None], len(out) * len(into), axis=0)
    rows = np.arange(len(pairs))
    pairs[rows, np.repeat(out, len(into))] = False
    pairs[rows, np.tile(into, len(out))] = True
    return np.concatenate([single, pairs])
