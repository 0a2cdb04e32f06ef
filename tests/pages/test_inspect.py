"""`pytc inspect`: what it shows is what the loader gives, and its numbers are those of the batches."""

from __future__ import annotations

import mmap
import multiprocessing
import os
from base64 import b64decode
from dataclasses import replace
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from connectomics.cellmap.catalog import Catalog
from connectomics.config import RunConfig, load_config
from connectomics.data.augmentation import BatchAugmentor
from connectomics.data.datamodule import CellMapDataModule
from connectomics.data.patches import centered
from connectomics.errors import InputError, WriteError
from connectomics.machine import usable_cores
from connectomics.pages.inspect.data import Inspection, as_text, equal, inspect_data
from connectomics.pages.inspect.numbers import (
    LabelNumbers,
    LoaderSpeed,
    RawShare,
    ValueRange,
    by_class,
    image_warnings,
    label_warnings,
    memory_of,
    take,
)
from connectomics.pages.inspect.page import write_page
from tests.cellmap.roots import grid_of, write_label, write_raw

from .test_report import CHROMIUM, Reader, browse, needs_browser

BOTH = ["image", "label"]
FLIPS = {"RandFlipd": {"keys": BOTH, "prob": 0.5, "spatial_axis": 0}}
DEFORMED = {"Rand3DElasticd": {"keys": BOTH, "prob": 1.0, "sigma_range": [3, 4], "magnitude_range": [30, 40]}}
NOISE = {"noise": {"prob": 1.0}}
VIEWS = "data.inputs=[{voxel_size: [16, 16, 16], patch_size: [16, 16, 16]}]"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 40^3 voxels with two crops: mito in both, er in the first alone, golgi known but nowhere."""
    place = tmp_path_factory.mktemp("inspect")
    rng = np.random.default_rng(3)
    write_raw(place, "set-a", rng.integers(1, 255, (40, 40, 40), dtype=np.uint8), grid_of((40, 40, 40)))
    for crop, start in (("crop1", 0.0), ("crop2", 160.0)):
        grid = grid_of((16, 16, 16), start=start)
        mito = np.zeros(grid.shape, np.uint8)
        mito[4:9, 3:12, 5:10] = 1
        write_label(place, "set-a", crop, "mito", mito, grid)
        write_label(place, "set-a", crop, "golgi", np.zeros_like(mito), grid)
        if crop == "crop1":
            er = np.zeros_like(mito)
            er[10:12] = 1
            er[14:] = 255
            write_label(place, "set-a", crop, "er", er, grid, unknown=255)
    return place


def configured(
    root: Path, *more: str, augmentations: dict[str, Any] = FLIPS, intensity: dict[str, Any] | None = None
) -> RunConfig:
    config = load_config(None, [
        f"dataset.data_root={root}", "dataset.classes=[mito,er,golgi]", "dataset.train_val_split=1.0",
        "data.num_workers=0", "data.patch_size=[24,20,16]", "data.batch_size=2", "data.patches_per_epoch=16", *more,
    ])  # fmt: skip
    config.data.augmentations = dict(augmentations)
    config.data.intensity = intensity or {}
    return config


@pytest.fixture(scope="module")
def found(root: Path) -> Inspection:
    return inspect_data(configured(root, intensity=NOISE), batches=2)


@pytest.fixture(scope="module")
def page(found: Inspection, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(write_page(tmp_path_factory.mktemp("page") / "inspect.html", found))


def first_batches(config: RunConfig, n: int) -> list[dict[str, torch.Tensor]]:
    module = CellMapDataModule(config)
    module.setup("fit")
    return list(islice(module.train_dataloader(), n))


# -- the same patches --------------------------------------------------------------------------------------------------
def test_what_is_shown_is_what_the_loader_gives_bit_for_bit(root: Path, found: Inspection) -> None:
    config = configured(root, intensity=NOISE)
    augmentor = BatchAugmentor.of(config)
    assert augmentor is not None
    for number, batch in enumerate(first_batches(config, 2)):
        augmented = augmentor(batch)
        for n, patch in enumerate(p for p in found.patches if p.batch == number):
            np.testing.assert_array_equal(patch.images[0], augmented["image"][n, 0])
            np.testing.assert_array_equal(patch.codes, augmented["codes"][n])
            assert patch.seed == int(batch["seed"][n])
    assert found.same


@pytest.mark.skipif(usable_cores() < 2, reason="the loader takes no more workers than there are cores")
def test_two_workers_give_the_same_patches_as_none(root: Path, found: Inspection) -> None:
    with_workers = inspect_data(configured(root, "data.num_workers=2", intensity=NOISE), batches=2)
    assert with_workers.same
    assert with_workers.speed.workers == 2
    for one, other in zip(found.patches, with_workers.patches, strict=True):
        np.testing.assert_array_equal(one.images[0], other.images[0])
        np.testing.assert_array_equal(one.codes, other.codes)
    if Path("/proc/self/smaps_rollup").exists():
        assert [m.name for m in with_workers.speed.memory] == ["main process", "worker 1", "worker 2"]
    assert with_workers.configuration["data.persistent_workers"]
    assert multiprocessing.active_children() == []  # nobody waits for an epoch that does not come


def test_the_device_does_what_the_training_step_does(root: Path) -> None:
    pl = pytest.importorskip("pytorch_lightning")
    from connectomics.lightning.module import ConnectomicsModule

    config = configured(root, "model.architecture=unet", "data.patch_size=[16,16,16]",
                        "+model.options={channels: [4, 8], strides: [2]}", VIEWS, intensity=NOISE)  # fmt: skip
    config.data.augmentations["RandScaleIntensityd"] = {"keys": ["image"], "prob": 1.0, "factors": 0.3}
    (batch,) = first_batches(config, 1)
    module = ConnectomicsModule(config)
    module.trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    module.trainer.training = True
    in_training = module.on_after_batch_transfer(batch, 0)
    augmentor = BatchAugmentor.of(config)
    assert augmentor is not None
    shown = centered(augmentor(batch))
    assert equal(in_training, shown)
    assert all(not torch.equal(shown[name], batch[name]) for name in ("image", "image_1"))


def test_batches_that_differ_are_said(found: Inspection) -> None:
    assert not any("other patches" in w for w in found.warnings())
    assert any("other patches" in w for w in replace(found, same=False).warnings())
    batch = {"image": torch.zeros(1, 2), "seed": torch.zeros(1)}
    assert equal(batch, {k: v.clone() for k, v in batch.items()})
    assert not equal(batch, {**batch, "image": torch.tensor([[0.0, 1e-7]])})
    assert not equal(batch, {"image": batch["image"]})


# -- numbers -----------------------------------------------------------------------------------------------------------
def test_numbers_are_those_of_the_batch(root: Path, found: Inspection) -> None:
    config = configured(root)
    for number, batch in enumerate(first_batches(config, 2)):
        for n, patch in enumerate(p for p in found.patches if p.batch == number):
            codes = batch["codes"][n].numpy().astype(int)
            known = np.stack([table[codes] for table in batch["known_states"][n].numpy()])
            present = np.stack([table[codes] for table in batch["present"][n].numpy()]) & known
            assert list(patch.labels.known.values()) == known.sum(axis=(1, 2, 3)).tolist()
            assert list(patch.labels.present.values()) == present.sum(axis=(1, 2, 3)).tolist()
            assert patch.labels.anything == known.any(axis=0).sum()
            assert patch.labels.states == len(np.unique(codes))
            assert patch.labels.known_share == pytest.approx(known.mean())
    pixels = np.concatenate([p.images[0].ravel() for p in found.patches])
    (values,) = found.values
    assert (values.low, values.high) == (pixels.min(), pixels.max())
    assert values.mean == pytest.approx(pixels.mean(dtype=np.float64))
    assert values.p50 == pytest.approx(np.median(pixels))
    assert values.zero == (pixels == 0).mean()


def test_classes_are_pooled_over_patches() -> None:
    states = (np.array([[0, 1, 0], [0, 0, 0]], bool), np.array([[0, 1, 1], [0, 0, 1]], bool))
    one = LabelNumbers.of(np.array([[[0, 1, 1, 2]]], np.uint8), *states, ("a", "b"))
    two = LabelNumbers.of(np.array([[[0, 0, 0, 0]]], np.uint8), *states, ("a", "b"))
    assert (one.known, one.present) == ({"a": 3, "b": 1}, {"a": 2, "b": 0})
    assert (one.anything, one.states, two.anything) == (3, 3, 0)
    a, b = by_class([one, two])
    assert (a.known, a.present, a.patches_known, a.patches_present) == (3 / 8, 2 / 3, 1, 1)
    assert (b.known, b.present, b.patches_present) == (1 / 8, 0.0, 0)
    assert by_class([two])[0].present is None


def test_what_has_no_raw_is_counted_without_augmentation_as_the_box_says(root: Path) -> None:
    """Raw ends at 320 nm and begins at 0; a patch larger than its crop at the border reaches beyond."""
    for patch in inspect_data(configured(root, augmentations={}), batches=2).patches:
        size = np.asarray(patch.grid.voxel_size)
        low = np.clip(-np.asarray(patch.grid.box.begin) / size, 0, None)
        high = np.clip((np.asarray(patch.grid.box.end) - 320.0) / size, 0, None)
        inside = np.prod(np.asarray(patch.grid.shape) - low - high)
        assert patch.raw is not None
        assert patch.raw[0].none == pytest.approx(1 - inside / patch.labels.voxels)


def test_what_has_no_raw_is_counted_after_a_deformation_and_never_black(root: Path) -> None:
    """Stored raw is at least 1 here, so a voxel would be 0 only where it has none."""
    deformed = inspect_data(configured(root, augmentations=DEFORMED), batches=2)
    for patch in deformed.patches:
        assert patch.raw is not None
        assert patch.values[0].zero == 0
        assert patch.raw[0].zero == 0.0
    assert max(p.raw[0].none for p in deformed.patches if p.raw) > 0


def test_a_further_view_is_shown_with_its_own_voxel_size(root: Path, tmp_path: Path) -> None:
    seen = inspect_data(configured(root, VIEWS), batches=1)
    assert [p.voxel_sizes for p in seen.patches] == [((8.0,) * 3, (16.0,) * 3)] * 2
    assert [p.images[1].shape for p in seen.patches] == [(16, 16, 16)] * 2
    assert all(p.raw is not None and len(p.raw) == 2 for p in seen.patches)
    reader = Reader(write_page(tmp_path / "views.html", seen))
    assert reader.source.count('<figure class="viewer"') == 4
    assert "16 × 16 × 16 nm" in reader.text


# -- warnings ----------------------------------------------------------------------------------------------------------
def test_a_class_that_never_comes_is_said(found: Inspection) -> None:
    warnings = label_warnings([p.labels for p in found.patches])
    assert any("never present" in w and "golgi" in w and "mito" not in w for w in warnings)
    nothing = LabelNumbers(1000, 5, 2, {"a": 5, "b": 0}, {"a": 5, "b": 0})
    said = label_warnings([nothing])
    assert any(w.startswith("Known in none of the 1 patches: b.") for w in said)
    assert any(w == "Known in less than 1 % of the voxels: a." for w in said)
    assert any("0.5 % of all voxels" in w for w in said)


@pytest.mark.parametrize(
    ("image", "there", "words"),
    [
        ([0.5, 0.5, 0.5, 0.5], [1, 1, 1, 1], "constant (0.5)"),
        ([0.0, 0.0, 0.0, 0.3], [0, 0, 0, 1], "75 % of the voxels have no raw"),
        ([1.0, 1.0, 0.2, 0.3], [1, 1, 1, 1], "50 % of the values are exactly 1"),
        ([0.0, 0.4, 0.2, 0.3], [1, 1, 1, 1], "25 % of the values are exactly 0"),
        ([0.0, 0.4, 0.2, 0.3], [0, 1, 1, 1], None),
    ],
)
def test_images_that_look_wrong_are_said(image: list[float], there: list[int], words: str | None) -> None:
    values = np.array(image, np.float32)
    said = image_warnings("patch", ValueRange.of(values), RawShare.of(values, np.array(there, bool)))
    assert [words in line for line in said if words] == [True] * (words is not None)
    assert bool(said) == (words is not None)


def test_raw_that_is_not_stored_is_counted_by_crop(tmp_path: Path) -> None:
    write_raw(tmp_path, "set-a", np.full((80, 80, 80), 9, np.uint8), grid_of((80, 80, 80)))
    grid = grid_of((70, 16, 16))
    values = np.ones(grid.shape, np.uint8)
    values[:, :8] = 0
    write_label(tmp_path, "set-a", "crop1", "mito", values, grid)
    raw = Path(Catalog.open(str(tmp_path)).crops()[0].raw)
    chunks = [f for f in raw.rglob("*") if f.is_file() and not f.name.startswith(".")]
    (lost,) = [f for f in chunks if str(f.relative_to(raw)) in ("s0/1/0/0", "s0/1.0.0")]
    lost.unlink()
    few = ["dataset.classes=[mito]", "data.allow_missing_raw=true", "dataset.train_val_split=1.0"]
    seen = inspect_data(configured(tmp_path, *few, augmentations={}), batches=1)
    ((missing,),) = [seen.missing]
    assert (missing.crop, missing.missing) == ("set-a/crop1", 1)
    assert missing.first is not None
    assert any("1 chunks of raw are missing" in w and missing.first in w for w in seen.warnings())


def test_an_epoch_with_fewer_batches_gives_them_all_and_says_so(root: Path) -> None:
    seen = inspect_data(configured(root, "data.patches_per_epoch=2"), batches=3)
    assert (seen.batches, len(seen.patches)) == (1, 2)
    assert any("Requested 3 batches, but an epoch has only 1 batches" in w for w in seen.warnings())
    assert seen.speed.patches_per_s is None


def test_batches_below_one_are_refused(root: Path) -> None:
    with pytest.raises(InputError, match="at least 1"):
        inspect_data(configured(root), batches=0)


def test_looking_writes_no_split_file(root: Path, tmp_path: Path) -> None:
    inspect_data(configured(root, f"dataset.split_file={tmp_path / 'split.yaml'}"), batches=1)
    assert list(tmp_path.iterdir()) == []


# -- the loader --------------------------------------------------------------------------------------------------------
def test_speed_is_batches_after_the_first_over_their_time() -> None:
    batches = [{"image": torch.zeros(2, 1, 4, 4, 4)} for _ in range(12)]
    taken, speed = take(iter(batches), 2, workers=0)
    assert len(taken) == 2
    assert taken[1] is batches[1]
    assert (speed.timed_batches, speed.batch_size, speed.batch_bytes) == (8, 2, 2 * 64 * 4)
    told = LoaderSpeed(1, 0.0, 10, 4.0, 2, 1000, ())
    assert (told.patches_per_s, told.bytes_per_s) == (5.0, 2500.0)
    assert LoaderSpeed(1, 0.0, 0, 0.0, 2, 1000, ()).patches_per_s is None


def test_memory_of_a_process() -> None:
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("needs /proc/PID/smaps_rollup")
    before = memory_of(os.getpid(), "this")
    assert before is not None
    with mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:  # new pages, not old heap
        block.write(b"1" * len(block))
        after = memory_of(os.getpid(), "this")
    assert after is not None
    assert after.private - before.private > 0.9 * (64 << 20)
    assert after.shared == after.resident - after.private >= 0
    assert memory_of(2**22 + 1, "nobody") is None


# -- the page ----------------------------------------------------------------------------------------------------------
def test_every_patch_has_its_slices_facts_and_classes(page: Reader, found: Inspection) -> None:
    articles = [a["id"] for tag, a in page.tags if tag == "article"]
    assert articles == ["b1p1", "b1p2", "b2p1", "b2p2"]
    assert page.source.count('<figure class="viewer"') == 4
    for patch in found.patches:
        assert patch.crop in page.text
        assert patch.drawn_by in page.text
        assert f"slices of {patch.name}, image" in page.source
        assert "noise" in [name for name, _ in patch.intensity]
    for words in ("What looks wrong", "data.patch_size", "[24, 20, 16]", "patches per second", "every chunk of raw"):
        assert words in page.text, words


def test_layers_are_switched_by_class_and_kind_and_refer_to_one_picture_each(page: Reader) -> None:
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    uses = [a for tag, a in page.tags if tag == "use"]
    assert {a["data-kind"] for a in uses} == {"label", "unknown"}
    assert {a["href"][1:] for a in uses} <= set(ids)
    pictures = [a for tag, a in page.tags if tag == "image" and "id" in a]
    assert len(pictures) < len(uses)  # mito and golgi are known in the same voxels


def test_pictures_are_bounded(page: Reader, found: Inspection) -> None:
    from PIL import Image

    for tag, attributes in page.tags:
        if tag == "image":
            picture = Image.open(BytesIO(b64decode(attributes["href"].split(",")[1])))
            assert picture.width <= 256
            assert picture.height <= 256 * 24
    assert len(page.source) < 2_000_000


def test_the_page_needs_nothing_beside_itself_and_every_tag_is_closed(page: Reader) -> None:
    for _, attributes in page.tags:
        for name in ("src", "href"):
            value = attributes.get(name, "")
            assert not value or value.startswith(("#", "data:image/png;base64,", "data:image/jpeg;base64,"))
    assert "default-src 'none'" in page.source
    for tag in ("div", "section", "figure", "svg", "table", "tr", "td", "details", "article", "g", "dl", "p", "defs"):
        assert page.source.count(f"<{tag}>") + page.source.count(f"<{tag} ") == page.source.count(f"</{tag}>"), tag


def test_what_others_wrote_is_shown_as_text(found: Inspection, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'&"
    spoilt: dict[str, Any] = {**found.configuration, f"data.{evil}": evil, "dataset.data_root": f"/x/{evil}"}
    patches = tuple(
        replace(p, crop=f"{evil}/crop1", drawn_by=evil, spatial=((evil, {evil: evil}),)) for p in found.patches
    )
    reader = Reader(write_page(tmp_path / "x.html", replace(found, name=evil, patches=patches, configuration=spoilt)))
    assert sum(tag == "script" for tag, _ in reader.tags) == 1
    assert evil in reader.text


def test_a_page_that_is_there_is_kept_unless_told(found: Inspection, tmp_path: Path) -> None:
    out = tmp_path / "inspect.html"
    out.write_text("mine")
    with pytest.raises(WriteError, match="--overwrite"):
        write_page(out, found)
    with pytest.raises(WriteError, match="not written by inspect"):
        write_page(out, found, overwrite=True)
    assert out.read_text() == "mine"
    out.unlink()
    for _ in range(2):
        write_page(out, found, overwrite=True)
    assert out.stat().st_size > 10_000
    assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(InputError, match=r"\.html"):
        write_page(tmp_path / "inspect.pdf", found)


def test_parameters_are_short_text() -> None:
    assert as_text({"angle": np.float64(0.123456), "axes": (0, 1), "big": np.zeros((4, 50))}) == (
        '{"angle": 0.1235, "axes": [0, 1], "big": "array of 4 x 50"}'
    )


@pytest.mark.slow
@needs_browser
def test_a_browser_draws_the_page_with_its_labels(found: Inspection, tmp_path: Path) -> None:
    from PIL import Image

    from connectomics.pages import colors

    assert CHROMIUM.exists()
    path = write_page(tmp_path / "inspect.html", found)
    shot = tmp_path / "shot.png"
    browse(path.as_uri(), tmp_path, f"--screenshot={shot}", "--window-size=1000,3000")
    picture = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    blue = np.abs(picture - colors.TRUTH).max(axis=2) < 60
    assert blue.sum() > 500
