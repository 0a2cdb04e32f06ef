"""``model.init_bias``: which biases of a network are its output's, and the shares they begin at."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

from connectomics.config import load_config
from connectomics.errors import ConfigError
from connectomics.lightning.checkpoints import read_checkpoint
from connectomics.lightning.module import ConnectomicsModule
from connectomics.lightning.output_bias import begin_at_prevalence, output_biases
from connectomics.models import has_deep_supervision, register_model, registry
from connectomics.models.heads import ids_of
from connectomics.pipeline.train import train
from tests.lightning.heads_run import HeadPatches, head_config
from tests.lightning.synthetic_run import MadeUpData, Patches, tiny_config
from tests.models.small_networks import EACH, TINY


@pytest.mark.parametrize("name", EACH)
def test_the_output_of_every_network_starts_at_the_number(name: str) -> None:
    """At every size of the output, whatever the weights before it are."""
    side, options = TINY[name]
    deep = has_deep_supervision(name)
    config = tiny_config(
        model__architecture=name, model__options=options, model__deep_supervision=deep, model__init_bias=-3.0,
        data__patch_size=[side] * 3,
    )  # fmt: skip
    torch.manual_seed(0)
    module = ConnectomicsModule(config)
    assert begin_at_prevalence(module, ()) == {"mito": -3.0, "er": -3.0}
    image = torch.zeros(2, 1, *[side] * 3)
    torch.manual_seed(1)
    outputs = module.train()(image)
    levels = outputs if isinstance(outputs, list) else [outputs]
    biases = output_biases(module)
    assert len(biases) == len(levels)
    for bias in biases:
        assert bias.tolist() == [-3.0, -3.0]
        with torch.no_grad():
            bias += 3.0
    torch.manual_seed(1)
    plain = module.train()(image)
    for level, reference in zip(levels, plain if isinstance(plain, list) else [plain], strict=True):
        torch.testing.assert_close(level, reference - 3.0, rtol=1e-4, atol=1e-4)


def batches(patches: Patches) -> list[dict[str, Tensor]]:
    return [default_collate([patches[number]]) for number in range(len(patches))]


def logit(share: float) -> float:
    return math.log(share / (1 - share))


def test_prevalence_is_that_of_known_voxels() -> None:
    patches = Patches(4)
    codes = torch.cat([patches[n]["codes"].flatten() for n in range(4)])
    mito = float((codes % 2 == 1).float().mean())
    er = float((codes[codes < 4] >= 2).float().mean())  # unknown in two of four patches
    values = begin_at_prevalence(ConnectomicsModule(tiny_config(model__init_bias="prevalence")), batches(patches))
    assert values == pytest.approx({"mito": logit(mito), "er": logit(er)}, rel=1e-5)
    nothing = begin_at_prevalence(
        ConnectomicsModule(tiny_config(model__init_bias="prevalence")), batches(Patches(2, unknown=(0, 1)))
    )
    assert nothing == {}


def test_a_class_that_is_nowhere_starts_at_a_hundredth() -> None:
    patches = batches(Patches(2))
    for batch in patches:
        batch["present"][:] = False
    values = begin_at_prevalence(ConnectomicsModule(tiny_config(model__init_bias="prevalence")), patches)
    assert values == pytest.approx({"mito": logit(0.01), "er": logit(0.01)})


def test_heads_have_their_own_shares_and_regressions_none() -> None:
    config = head_config("affinities", "distance", model__init_bias="prevalence")
    found = batches(HeadPatches(3))
    values = list(begin_at_prevalence(ConnectomicsModule(config), found).values())
    assert len(values) == 2 + 4
    ids = torch.cat([ids_of(batch)[:, 0] for batch in found])
    one, other = ids[:, 1:], ids[:, :-1]  # the first offset: one voxel back along z
    same = ((one == other) & (one > 0)).sum() / ((one >= 0) & (other >= 0)).sum()
    assert values[2] == pytest.approx(logit(float(same)), rel=1e-4)


class CountedData(MadeUpData):
    def first_batches(self) -> list[dict[str, Tensor]]:
        return batches(self.patches)


def test_a_run_begins_there_but_not_a_resumed_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config(model__init_bias="prevalence", optimizer__lr=0.0, training__max_epochs=1)
    with caplog.at_level(logging.INFO):
        run = train(config, tmp_path / "run", datamodule=CountedData())
        assert "output biases (model.init_bias=prevalence): mito " in caplog.text
        caplog.clear()
        config.training.max_epochs = 2
        train(config, tmp_path / "run", resume=True, datamodule=CountedData())
        assert "output biases" not in caplog.text
    values = begin_at_prevalence(ConnectomicsModule(config), batches(Patches(8)))
    stored = read_checkpoint(run.folder / "checkpoints" / "last.ckpt")["state_dict"]
    assert any(value.tolist() == pytest.approx(list(values.values())) for value in stored.values() if value.ndim == 1)


def test_fine_tuning_sets_new_classes_only(tmp_path: Path) -> None:
    first = train(tiny_config(training__max_epochs=1), tmp_path / "first", datamodule=MadeUpData(patches=2))
    config = tiny_config(model__init_bias=-4.0, model__weights=str(first.checkpoint), optimizer__lr=0.0)
    config.dataset.classes = ["er", "vim"]
    config.training.max_epochs = 1
    module = ConnectomicsModule(config)
    assert begin_at_prevalence(module, (), keep=["mito", "er"]) == {"vim": -4.0}
    assert [bias.tolist()[1] for bias in output_biases(module)] == [-4.0]


def test_what_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "ARCHITECTURES", dict(registry.ARCHITECTURES))

    def without(in_channels: int, out_channels: int) -> Any:
        return torch.nn.Conv3d(in_channels, out_channels, 1, bias=False)

    register_model("without_bias", without, "no bias")
    config = tiny_config(model__architecture="without_bias", model__options={}, model__init_bias=-3)
    with pytest.raises(ConfigError, match=r"needs a bias at the output.*set model.init_bias=null"):
        begin_at_prevalence(ConnectomicsModule(config), ())
    with pytest.raises(ConfigError, match=r"model.init_bias must be prevalence, a number, or null, got 'prevalent'"):
        load_config(None, "model.init_bias=prevalent")
    with pytest.raises(ConfigError, match=r"first_batches\(\); give a number instead"):
        train(tiny_config(model__init_bias="prevalence"), tmp_path / "run", datamodule=MadeUpData())
