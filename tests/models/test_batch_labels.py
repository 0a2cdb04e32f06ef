"""Labels of a batch: packed and dense say the same, class by class, and are counted exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from connectomics.errors import InputError
from connectomics.models.batch_labels import DenseLabels, PackedLabels, labels_of


def some_codes(seed: int, states: int, batch: int = 3, channels: int = 4) -> PackedLabels:
    rng = np.random.default_rng(seed)
    dtype = np.uint8 if states <= 256 else np.int16 if states <= 2**15 else np.int32
    return PackedLabels(
        torch.from_numpy(rng.integers(states, size=(batch, 4, 5, 6)).astype(dtype)),
        torch.from_numpy(rng.random((batch, channels, states)) < 0.3),
        torch.from_numpy(rng.random((batch, channels, states)) < 0.6),
    )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), states=st.sampled_from([1, 2, 7, 255, 256, 257, 2**15, 2**15 + 1]))
def test_a_class_is_what_the_table_says_of_each_code(seed: int, states: int) -> None:
    packed = some_codes(seed, states)
    label, known = (np.zeros((3, 4, 4, 5, 6), dtype) for dtype in (np.float32, bool))
    for b, z, y, x in np.ndindex(3, 4, 5, 6):
        code = int(packed.codes[b, z, y, x])
        label[b, :, z, y, x] = packed.present[b, :, code]
        known[b, :, z, y, x] = packed.known[b, :, code]
    for channel in range(4):
        found, seen = packed.of(channel)
        assert (found.dtype, seen.dtype) == (torch.float32, torch.bool)
        np.testing.assert_array_equal(found, label[:, channel])
        np.testing.assert_array_equal(seen, known[:, channel])
    dense = packed.dense()
    np.testing.assert_array_equal(dense.label, label)
    np.testing.assert_array_equal(dense.known, known)
    assert dense.shape == packed.shape == (3, 4, 4, 5, 6)
    assert (packed.batch, packed.channels, packed.shape[2:]) == (3, 4, (4, 5, 6))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), states=st.sampled_from([1, 3, 300]))
def test_packed_and_dense_labels_are_counted_alike(seed: int, states: int) -> None:
    packed = some_codes(seed, states)
    dense = packed.dense()
    present = (dense.label > 0.5) & dense.known
    expected = [
        present.flatten(2).any(2).sum(0).tolist(),
        present.sum((0, 2, 3, 4)).tolist(),
        dense.known.sum((0, 2, 3, 4)).tolist(),
    ]
    for labels in (packed, dense):
        assert labels.tally().dtype == torch.int64
        assert labels.tally().tolist() == expected
    assert torch.equal(packed.often(states, True), packed.often(states, False)), "as a GPU counts, and as a CPU does"


def test_counts_in_closed_form() -> None:
    """Two samples of 2 x 2 x 2: class 0 fills one voxel of the first, class 1 half of the second, class 2 is unknown
    in the first and nowhere in the second."""
    codes = torch.zeros((2, 2, 2, 2), dtype=torch.uint8)
    codes[0, 0, 0, 0] = 1
    codes[1, 1] = 1
    present = torch.tensor([[[0, 1], [0, 0], [1, 1]], [[0, 0], [0, 1], [0, 0]]]).bool()
    known = torch.tensor([[[1, 1], [1, 1], [0, 0]], [[0, 1], [1, 1], [1, 1]]]).bool()
    labels = PackedLabels(codes, present, known)
    expected = [[1, 1, 0], [1, 4, 0], [8 + 4, 16, 8]]
    assert labels.tally().tolist() == expected
    assert labels.dense().tally().tolist() == expected


def test_what_stands_at_unknown_voxels_is_not_counted() -> None:
    label = torch.full((1, 2, 2, 2, 2), torch.nan)
    known = torch.zeros(label.shape, dtype=torch.bool)
    label[0, 0, 0] = 1.0
    known[0, 0, :, 0] = True
    assert DenseLabels(label, known).tally().tolist() == [[1, 0], [2, 0], [4, 0]]


@pytest.mark.parametrize("packed", [True, False])
def test_they_move_to_a_device_as_they_are(packed: bool) -> None:
    labels = some_codes(0, 5)
    moved = labels.to("cpu") if packed else labels.dense().to("cpu", non_blocking=True)
    assert type(moved) is (PackedLabels if packed else DenseLabels)
    assert moved.device == torch.device("cpu")
    assert torch.equal(moved.tally(), labels.tally())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_the_same() -> None:
    labels = some_codes(1, 40)
    moved = labels.to("cuda")
    assert moved.device.type == "cuda"
    assert torch.equal(moved.tally().cpu(), labels.tally())
    for channel in range(labels.channels):
        assert all(torch.equal(a, b.cpu()) for a, b in zip(labels.of(channel), moved.of(channel), strict=True))


class TestBatches:
    def test_packed_ones(self) -> None:
        labels = some_codes(2, 7)
        batch = {"codes": labels.codes, "present": labels.present, "known_states": labels.known, "image": labels.codes}
        found = labels_of(batch)
        assert isinstance(found, PackedLabels)
        assert torch.equal(found.tally(), labels.tally())

    def test_dense_ones(self) -> None:
        dense = some_codes(2, 7).dense()
        found = labels_of({"label": dense.label, "known": dense.known})
        assert isinstance(found, DenseLabels)
        assert torch.equal(found.tally(), dense.tally())

    @pytest.mark.parametrize("keys", [(), ("image",), ("image", "label"), ("codes", "present")])
    def test_those_without_labels_are_refused(self, keys: tuple[str, ...]) -> None:
        with pytest.raises(InputError, match=f"a batch must have labels, .* got {', '.join(keys) or 'nothing'}$"):
            labels_of(dict.fromkeys(keys, torch.zeros(1)))


class TestRefusals:
    def test_codes_beyond_the_tables(self) -> None:
        labels = some_codes(3, 9)
        with pytest.raises(InputError, match=r"codes must be from 0 to 7, .* got 0 to 8"):
            PackedLabels(labels.codes, labels.present[:, :, :8], labels.known[:, :, :8])
        with pytest.raises(InputError, match="got -1 to 7"):
            PackedLabels(labels.codes.short() - 1, labels.present, labels.known)

    def test_codes_of_another_type_or_shape(self) -> None:
        labels = some_codes(4, 9)
        with pytest.raises(InputError, match=r"uint8, int16 or int32 .* got torch\.int64"):
            PackedLabels(labels.codes.long(), labels.present, labels.known)
        with pytest.raises(InputError, match=r"got torch\.uint8 \(4, 5, 6\)"):
            PackedLabels(labels.codes[0], labels.present, labels.known)

    def test_tables_that_do_not_fit(self) -> None:
        labels = some_codes(5, 9)
        with pytest.raises(InputError, match=r"tables of 3 samples must be two bool \(B, C, K\), got present \(2, 4"):
            PackedLabels(labels.codes, labels.present[:2], labels.known[:2])
        with pytest.raises(InputError, match=r"known \(3, 4, 8\)"):
            PackedLabels(labels.codes, labels.present, labels.known[:, :, :8])
        with pytest.raises(InputError, match=r"of torch\.float32"):
            PackedLabels(labels.codes, labels.present.float(), labels.known)

    def test_dense_ones_that_do_not_fit(self) -> None:
        dense = some_codes(6, 9).dense()
        with pytest.raises(InputError, match="must have one shape"):
            DenseLabels(dense.label, dense.known[:, :2])
        with pytest.raises(InputError, match=r"of torch\.float32"):
            DenseLabels(dense.label, dense.known.float())
