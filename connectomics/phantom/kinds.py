"""The kinds of objects in a phantom's cell and the challenge classes that their points belong to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from connectomics.cellmap.classes import CLASSES

MITO, ER, GOLGI, ENDO, LYSO, LD, PEROX, VES, MT, PORE, PROCESS = range(11)


@dataclass(frozen=True)
class Kind:
    """One kind of object: the atomic class of its shell and of its inside, the shell's thickness (nm), and the
    instance class that its objects are instances of (None where the challenge counts none)."""

    name: str
    shell: str
    inside: str
    thickness: float
    instances: str | None


KINDS: tuple[Kind, ...] = (
    Kind("mitochondrion", "mito_mem", "mito_lum", 15.0, "mito"),
    Kind("endoplasmic reticulum", "er_mem", "er_lum", 8.0, None),
    Kind("golgi cisterna", "golgi_mem", "golgi_lum", 7.0, None),
    Kind("endosome", "endo_mem", "endo_lum", 8.0, "endo"),
    Kind("lysosome", "lyso_mem", "lyso_lum", 8.0, "lyso"),
    Kind("lipid droplet", "ld_mem", "ld_lum", 7.0, "ld"),
    Kind("peroxisome", "perox_mem", "perox_lum", 7.0, "perox"),
    Kind("vesicle", "ves_mem", "ves_lum", 7.5, "ves"),
    Kind("microtubule", "mt_out", "mt_in", 6.0, "mt"),
    Kind("nuclear pore", "np_out", "np_in", 0.0, "np"),
    Kind("process of another cell", "pm", "cyto", 8.0, "cell"),
)

#: Thickness (nm) of the plasma membrane, of either membrane of the nuclear envelope, and of the whole envelope.
PM_THICKNESS = 8.0
NE_MEMBRANE = 8.0
NE_THICKNESS = 38.0
#: Radius (nm) of the channel in a nuclear pore.
PORE_CHANNEL = 19.0
#: How far (nm) the ruffles of the plasma membrane reach from the cell's body at most.
RUFFLES = 36.0


def class_id(name: str) -> int:
    """The challenge's number of a class, which is what `Scene.atoms` holds."""
    return CLASSES[name].id


SHELL_ID = np.array([class_id(k.shell) for k in KINDS], np.uint8)
INSIDE_ID = np.array([class_id(k.inside) for k in KINDS], np.uint8)
THICKNESS = np.array([k.thickness for k in KINDS], np.float64)

#: Every atomic class that a phantom can hold.
PHANTOM_ATOMS: frozenset[str] = frozenset(
    {k.shell for k in KINDS}
    | {k.inside for k in KINDS}
    | {"ecs", "mito_ribo", "ne_mem", "ne_lum", "hchrom", "echrom", "nucpl"}
)
