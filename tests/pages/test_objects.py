"""Objects that were missed, split, merged or invented: counted block by block, told by id and place."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from connectomics.geometry import VoxelGrid
from connectomics.pages.report.objects import Mistake, Objects, listed, tables
from connectomics.pages.report.volumes import Findings, Item, examine

from .test_volumes import Fixed

GRID = VoxelGrid((10.0, 4.0, 2.0), (100.0, 50.0, 7.0), (2, 3, 40))


def volumes() -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    """One row in x: a good pair, a split, a merge of two, a miss, an invention, a poor pair."""
    truth, found = np.zeros(GRID.shape, np.uint64), np.zeros(GRID.shape, np.uint32)
    big = 2**40  # ids need not be small
    for begin, end, number in ((0, 4, 1), (5, 11, 2), (12, 15, 3), (15, 18, 4), (19, 22, big), (27, 31, 6)):
        truth[1, 1, begin:end] = number
    for begin, end, number in ((0, 4, 11), (5, 8, 12), (8, 11, 13), (12, 18, 14), (23, 26, 15), (29, 36, 16)):
        found[1, 1, begin:end] = number
    return truth, found


def test_each_kind_of_mistake_is_told_with_ids_size_and_place() -> None:
    truth, found = volumes()
    objects = Objects()
    objects.add((0, 0, 0), truth, found, np.ones(GRID.shape, bool))
    made = {m.kind: m for m in objects.mistakes(GRID)}
    assert list(made) == ["missed", "invented", "merged", "split", "poor"]
    assert made["missed"] == Mistake("missed", (2**40,), (), 3, 0.0, (110.0, 54.0, 7 + 2 * 20.0))
    assert made["invented"] == Mistake("invented", (), (15,), 3, 0.0, (110.0, 54.0, 7 + 2 * 24.0))
    assert (set(made["merged"].truth), made["merged"].found, made["merged"].iou) == ({3, 4}, (14,), 0.5)
    assert (made["split"].truth, set(made["split"].found), made["split"].voxels) == ((2,), {12, 13}, 6)
    assert made["poor"].iou == pytest.approx(2 / 9)
    assert objects.match()[1] == {1: 11, 2: 12, 3: 14, 6: 16}  # of equal overlaps the smaller id


def test_blocks_in_any_order_give_what_the_whole_gives() -> None:
    truth, found = volumes()
    known = np.random.default_rng(0).random(GRID.shape) > 0.1
    whole, parts = Objects(), Objects()
    whole.add((0, 0, 0), truth, found, known)
    for begin in (30, 0, 10, 20):
        part = (slice(None), slice(None), slice(begin, begin + 10))
        parts.add((0, 0, begin), truth[part], found[part], known[part])
    assert parts.pairs == whole.pairs
    assert parts.mistakes(GRID) == whole.mistakes(GRID)


def test_what_is_not_known_is_no_mistake() -> None:
    truth, found = volumes()
    known = np.zeros(GRID.shape, bool)
    known[..., :4] = True
    objects = Objects()
    objects.add((0, 0, 0), truth, found, known)
    assert objects.mistakes(GRID) == []
    assert list(objects.truth) == [1]


def looked_at(name: str) -> tuple[Item, Findings]:
    truth, found = volumes()
    known = np.ones(GRID.shape, bool)
    item = Item("d", "c", name, GRID, truth=Fixed(GRID, True, truth, known), prediction=Fixed(GRID, True, found, known))
    return item, examine(item)


def test_the_list_takes_turns_between_classes_and_is_bounded() -> None:
    drawn = [looked_at("mito"), looked_at("ves")]
    assert [one.class_name for one in listed(drawn, 3)] == ["mito", "ves", "mito"]
    assert len(listed(drawn, 99)) == 10


def test_objects_of_the_viewer_are_buttons_and_others_are_links() -> None:
    drawn = [looked_at("mito"), looked_at("ves")]
    html = tables(drawn, listed(drawn, 99), 1, ["a-mito", "a-ves"])
    assert html.count('<button type="button" class="go" data-class="0" data-at="') == 5
    assert html.count('href="#a-ves"') == 5
    assert "a-mito" not in html
    assert 'data-at="110,54,47"' in html


def test_classes_without_objects_have_no_table() -> None:
    nothing = np.zeros(GRID.shape, np.uint8)
    part = Fixed(GRID, False, nothing, nothing == 0)
    item = Item("d", "c", "er", GRID, truth=part, prediction=part)
    assert tables([(item, examine(item))], [], 1, ["x"]) == ""
