"""One-to-one matching of predicted components to truth labels, as the official scorer solves it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from connectomics.metrics.challenge.rules import Rules
from connectomics.metrics.overlaps import Overlaps

# Truth labels that do not occur get a node too, since the solver breaks ties by node and arc numbers. Beyond this many
# the labels are renumbered (in order), which changes nothing but, perhaps, a tie.
_MAX_NODES = 2_000_000


class MatchingFailedError(Exception):
    """The solver found no optimum; the crop is then dropped from the class, as officially."""


def match(overlaps: Overlaps, max_truth: int, rules: Rules) -> NDArray[np.int64]:
    """The component matched to each truth label, 0 for none, (T,) beside ``overlaps.truth_ids``.

    Minimum-cost flow from a source through truth labels and components to a sink; a truth may go unmatched at a cost
    above that of any overlap, so as many as possible are matched, however little they overlap. The order of the arcs
    is part of the rule: ties are what OR-tools' solver makes of it. ``max_truth`` is the largest truth label.
    """
    matched = np.zeros(overlaps.truth_ids.size, np.int64)
    iou = overlaps.pair_iou().astype(np.float32)
    keep = iou > 0
    if not keep.any():
        return matched
    from ortools.graph.python import min_cost_flow

    compact = max_truth > _MAX_NODES
    pair_row = np.searchsorted(overlaps.truth_ids, overlaps.pair_truth[keep])
    n_truth = overlaps.truth_ids.size if compact else max_truth
    truth_node = (pair_row + 1) if compact else overlaps.pair_truth[keep]
    part = overlaps.pair_part[keep]
    n_parts = overlaps.n_parts
    sink = n_truth + n_parts + 1

    truths = np.arange(1, n_truth + 1)
    parts = np.arange(n_truth + 1, sink)
    ones, sinks = np.ones(n_truth, np.int64), np.full(max(n_truth, n_parts), sink)
    cost = ((1.0 - iou[keep].astype(np.float64)) * rules.cost_scale).astype(np.int64)
    solver = min_cost_flow.SimpleMinCostFlow()
    arcs = solver.add_arcs_with_capacity_and_unit_cost(
        np.concatenate([np.zeros(n_truth, np.int64), truths, truth_node, parts]).astype(np.int32),
        np.concatenate([truths, sinks[:n_truth], part + n_truth, sinks[:n_parts]]).astype(np.int32),
        np.ones(2 * n_truth + part.size + n_parts, np.int64),
        np.concatenate([0 * ones, (rules.cost_scale + 1) * ones, cost, np.zeros(n_parts, np.int64)]),
    )
    solver.set_node_supply(0, n_truth)
    solver.set_node_supply(sink, -n_truth)
    if solver.solve() != solver.OPTIMAL:
        raise MatchingFailedError
    flows = np.asarray(solver.flows(arcs[2 * n_truth : 2 * n_truth + part.size]))
    matched[pair_row[flows > 0]] = part[flows > 0]
    return matched
