"""Labels as codes: the same labels as two words a voxel, in a byte or two."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connectomics.cellmap.label_codes import LabelCodes, LabelStates, StateTable, code_dtype
from connectomics.cellmap.labels import LabelVolume, words_for
from connectomics.errors import InputError, UnknownNameError
from tests.cellmap.plain_labels import dense, volume_of
from tests.cellmap.roots import grid_of


def random_volume(rng: np.random.Generator, n_classes: int, n_states: int, shape: tuple[int, int, int]) -> LabelVolume:
    """Voxels that take one of ``n_states`` random combinations."""
    words = words_for(n_classes)
    bits = rng.integers(0, 2, (n_states, 2, words * 64)).astype(bool)
    bits[:, :, n_classes:] = False
    bits[:, 0] &= bits[:, 1]
    packed = np.packbits(bits, axis=-1, bitorder="little").view("<u8").astype(np.uint64)
    chosen = packed[rng.integers(0, n_states, shape)]
    present, known = np.moveaxis(chosen[..., 0, :], -1, 0), np.moveaxis(chosen[..., 1, :], -1, 0)
    names = tuple(f"c{n}" for n in range(n_classes))
    return LabelVolume(grid_of(shape), names, np.ascontiguousarray(present), np.ascontiguousarray(known))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**31), st.sampled_from([1, 3, 14, 48, 64, 65, 130]), st.sampled_from([1, 2, 40, 300]),
    st.tuples(*[st.integers(1, 12)] * 3),
)  # fmt: skip
def test_codes_say_what_the_words_say(seed: int, n_classes: int, n_states: int, shape: tuple[int, int, int]) -> None:
    volume = random_volume(np.random.default_rng(seed), n_classes, n_states, shape)
    codes = LabelCodes.of(volume)
    assert len(codes.states) <= n_states + 1
    back = volume_of(codes)
    np.testing.assert_array_equal(back.present, volume.present)
    np.testing.assert_array_equal(back.known, volume.known)
    names = volume.classes[::-2]
    for ours, plain in zip(codes.dense(names), dense(volume, names), strict=True):
        assert ours.dtype == plain.dtype
        np.testing.assert_array_equal(ours, plain)


@pytest.mark.parametrize(("n_states", "kind"), [(1, np.uint8), (256, np.uint8), (257, np.uint16), (65537, np.uint32)])
def test_codes_are_as_narrow_as_can_be(n_states: int, kind: type) -> None:
    assert code_dtype(n_states) == kind


def test_more_states_than_a_byte_and_than_the_first_table() -> None:
    volume = random_volume(np.random.default_rng(1), 48, 5000, (40, 40, 40))
    codes = LabelCodes.of(volume)
    assert codes.codes.dtype == np.uint16
    assert 4900 < len(codes.states) <= 5001
    np.testing.assert_array_equal(volume_of(codes).known, volume.known)


def test_blocks_share_one_table() -> None:
    """Encoded block by block, equal combinations have equal codes, and numbers once given stay."""
    volume = random_volume(np.random.default_rng(2), 14, 60, (16, 8, 8))
    table = StateTable(volume.classes)
    parts = []
    for begin in (0, 8):
        part = LabelVolume(
            volume.grid.crop((begin, 0, 0), (8, 8, 8)), volume.classes,
            volume.present[:, begin : begin + 8].copy(), volume.known[:, begin : begin + 8].copy(),
        )  # fmt: skip
        parts.append(table.encode(part))
        before = table.states
    whole = LabelCodes(volume.grid, np.concatenate(parts), table.states)
    np.testing.assert_array_equal(volume_of(whole).present, volume.present)
    np.testing.assert_array_equal(table.states.known[: len(before)], before.known)
    again = LabelStates.from_array(volume.classes, table.states.to_array())
    np.testing.assert_array_equal(again.present, table.states.present)


def test_where_there_is_nothing_to_see_nothing_is_known() -> None:
    volume = random_volume(np.random.default_rng(3), 5, 10, (6, 6, 6))
    where = np.random.default_rng(4).random((6, 6, 6)) < 0.5
    label, known = LabelCodes.of(volume).restricted(where).dense()
    assert not known[:, ~where].any()
    assert not label[:, ~where].any()
    np.testing.assert_array_equal(known[:, where], dense(volume)[1][:, where])


def test_wrong_tables_and_names_are_refused() -> None:
    one = np.ones((1, 1), np.uint64)
    with pytest.raises(InputError, match="state 0"):
        LabelStates(("a",), one, one)
    with pytest.raises(InputError, match=r"two arrays \(K, 2\)"):
        LabelStates(tuple(map(str, range(65))), one * 0, one * 0)
    states = LabelStates(("mito", "er"), one * 0, one * 0)
    with pytest.raises(UnknownNameError, match="did you mean 'mito'"):
        states.tables(["mitoo"])
    with pytest.raises(InputError, match="the table"):
        StateTable(("x",)).encode(random_volume(np.random.default_rng(0), 2, 2, (2, 2, 2)))
