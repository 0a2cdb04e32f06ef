"""``model.heads``: what is filled in, what channels are called, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from connectomics.config import config_from_dict, config_to_dict, load_config, save_config
from connectomics.config.heads import (
    channel_attributes,
    channel_names,
    default_offsets,
    head_classes,
    heads_of,
)
from connectomics.errors import ConfigError

BASE = ["dataset.classes=[er,mito,nuc]", "dataset.voxel_size=[8,8,8]"]
JOINT = (
    "model.heads=[{kind: affinities, offsets_nm: [[-8,0,0],[0,16,-24]]}, {kind: lsd}, "
    "{kind: distance, class_name: nuc}]"
)


def test_channels_are_the_classes_and_then_what_is_written_of_heads() -> None:
    config = load_config(None, [*BASE, JOINT])
    assert channel_names(config) == ("er", "mito", "nuc", "mito/affinities/0", "mito/affinities/1", "nuc/distance")
    assert [head.channels for head in heads_of(config)] == [2, 10, 1]
    assert head_classes(config) == ("mito", "nuc")
    about = channel_attributes(config)
    assert about["mito/affinities/1"] == {
        "class_name": "mito", "artefact": "affinity", "offset": [0, 2, -3], "offset_nm": [0.0, 16.0, -24.0],
    }  # fmt: skip
    assert about["nuc/distance"] == {"class_name": "nuc", "artefact": "distance", "scale_nm": 64.0}
    assert config.channels == 3


def test_without_heads_channels_are_the_classes() -> None:
    config = load_config(None, BASE)
    assert channel_names(config) == ("er", "mito", "nuc")
    assert (heads_of(config), channel_attributes(config)) == ((), {})


def test_long_offsets_of_flat_voxels_are_about_as_long_in_nm_and_none_is_there_twice() -> None:
    assert default_offsets((8.0, 8.0, 8.0))[3:6] == ((-3, 0, 0), (0, -3, 0), (0, 0, -3))
    assert default_offsets((40.0, 4.0, 4.0)) == (
        (-1, 0, 0), (0, -1, 0), (0, 0, -1), (0, -3, 0), (0, 0, -3), (0, -9, 0), (0, 0, -9)
    )  # fmt: skip


def test_heads_survive_files_and_checkpoints(tmp_path: Path) -> None:
    config = load_config(None, [*BASE, JOINT])
    save_config(config, tmp_path / "run.yaml")
    assert heads_of(load_config(tmp_path / "run.yaml")) == heads_of(config)
    assert heads_of(config_from_dict(config_to_dict(config))) == heads_of(config)


@pytest.mark.parametrize(
    ("heads", "said"),
    [
        ("[{kind: affinites}]", "did you mean 'affinities'"),
        ("[{class_name: mitos}]", "did you mean 'mito'"),
        ("[{offsets_nm: [[-8,0,12]]}]", "nearest valid offset is [-8.0, 0.0, 16.0]"),
        ("[{offsets_nm: [[-8,0]]}]", "three numbers"),
        ("[{offsets_nm: [-8,0,0]}]", "three numbers"),
        ("[{offsets_nm: [[-8,0,0],[8,0,0]]}]", "one pair"),
        ("[{offsets_nm: [[0,0,0]]}]", "zero"),
        ("[{scale_nm: 8}]", "does not apply to affinities"),
        ("[{kind: distance, offsets_nm: [[-8,0,0]]}]", "for kind affinities only"),
        ("[{kind: distance, scale_nm: 1}]", "at least half a voxel"),
        ("[{kind: lsd, weight: 0}]", "weight must be above 0"),
        ("[{kind: lsd}, {kind: lsd}]", "mito/lsd twice"),
        ("[{kind: lsd, scale: 3}]", "unknown key 'model.heads[0].scale'"),
        ("[{kind: lsd, scale_nm: wide}]", "model.heads[0].scale_nm must be a valid number"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(heads: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [*BASE, f"model.heads={heads}"])
    assert said in str(error.value)
    assert "\n" not in str(error.value)
