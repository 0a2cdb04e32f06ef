"""Named sets of augmentations: ``data.augmentation``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from connectomics.config.schema import DataConfig
from connectomics.data.augmentation.tissue_transforms import section_axis

Arguments = dict[str, Any]


def augmentations_of(data: DataConfig, voxel_size: Sequence[float]) -> tuple[Arguments, Arguments]:
    """Return ``data.augmentations`` and ``data.intensity`` with those of the preset, which they override by name.

    ``voxel_size``: of the run, nm, z y x.
    """
    given, intensity = dict(data.augmentations), dict(data.intensity)
    if data.augmentation.preset == "none":
        return given, intensity
    strength = float(data.augmentation.strength)
    spatial = em_spatial(voxel_size, strength)
    # a field is looked up first if it comes last: it then covers the patch alone
    last = {name: spatial.pop(name) for name in ("elastic",) if name in spatial}
    return {**spatial, **last, **given}, {**em_intensity(voxel_size, data.patch_size, strength), **intensity}


def em_spatial(voxel_size: Sequence[float], strength: float) -> Arguments:
    """Return the spatial part of the preset ``em`` (see docs/training.md).

    Flips and right angles, which interpolate nothing; and for ``strength`` above 0
    uniform rotation (COSEM organelle-mapping), scale (0.75 to 1.5 there, 0.7 to 1.4 in nnU-Net v2), and deformation
    (COSEM: control points every 25 voxels of 8 nm, displacements of 24 nm). Sections thicker than 1.5 pixels stay as
    they are.
    """
    found: Arguments = {"symmetry": {}}
    if strength <= 0:
        return found
    side, most = min(voxel_size), 1 + 0.33 * strength
    return {
        **found,
        "rotation": {"prob": min(1.0, 0.5 * strength)},
        "scale": {"prob": min(1.0, 0.3 * strength), "factor": [1 / most, most]},
        "elastic": {
            "prob": min(1.0, 0.3 * strength),
            "displacement": [0.0, 3 * side * strength],
            "length": [12.5 * side, 25 * side],
        },
    }


def em_intensity(voxel_size: Sequence[float], patch_size: Sequence[int], strength: float) -> Arguments:
    """Return the intensity part of the preset ``em``: nothing for ``strength`` 0.

    Gamma is COSEM's (0.75 to 1.33); contrast, brightness, blur, lower resolution and noise are nnU-Net v2's with its
    standard deviations of images taken as 0.2 of the range. A network that never saw inverted patches is lost on data
    with bright membranes. Missing and shifted sections are for serial sections.
    """
    if strength <= 0:
        return {}
    section, most = section_axis(voxel_size), 1 + 0.33 * strength
    blur, coarser = [0.3, 0.3 + 0.7 * strength], [1.0, 1.0 + strength]
    found: Arguments = {
        "gamma": {"prob": 0.3, "exponent": [1 / most, most]},
        "contrast": {"prob": 0.15, "factor": [max(0.1, 1 - 0.25 * strength), 1 + 0.25 * strength]},
        "brightness": {"prob": 0.15, "shift": [-0.1 * strength, 0.1 * strength]},
        "invert": {"prob": 0.15},
        "noise": {"prob": 0.15, "std": [0.0, 0.05 * strength]},
        "blur": {"prob": 0.1, "sigma": [0.0 if axis == section else blur for axis in range(3)]},
        "resolution": {"prob": 0.1, "factor": [1.0 if axis == section else coarser for axis in range(3)]},
    }
    if section == 0 and patch_size[0] > 2:
        found["missing_sections"] = {"prob": 0.05, "sections": [1, 2]}
        found["shifted_sections"] = {"prob": 0.1, "sections": [1, 4], "displacement": [1.0, 1.0 + 3 * strength]}
    for arguments in found.values():
        arguments["prob"] = min(1.0, arguments["prob"] * strength)
    return found
