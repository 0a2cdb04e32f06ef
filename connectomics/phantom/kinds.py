"""The kinds of objects in a phantom's cell and the challenge classes that their points belong to."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from connectomics.cellmap.classes import CLASSES

MITO, ER, GOLGI, ENDO, LYSO, LD, PEROX, VES, MT, PORE, PROCESS = range(11)


class Kind(NamedTuple):
    """One kind of object.

    Attributes:
        shell, inside: atomic classes of the shell and of the inside. thickness: of the shell, nm.
        instances: the instance class of the objects, or None if the challenge has none.
        gray: gray value inside (0 to 255), and the amplitudes of the coarse and of the fine texture.
    """

    name: str
    shell: str
    inside: str
    thickness: float
    instances: str | None
    gray: tuple[float, float, float] = (0.0, 0.0, 0.0)


KINDS: tuple[Kind, ...] = (
    Kind("mitochondrion", "mito_mem", "mito_lum", 15.0, "mito", (126.0, 8.0, 9.0)),
    Kind("endoplasmic reticulum", "er_mem", "er_lum", 8.0, None, (172.0, 6.0, 6.0)),
    Kind("golgi cisterna", "golgi_mem", "golgi_lum", 7.0, None, (172.0, 6.0, 6.0)),
    Kind("endosome", "endo_mem", "endo_lum", 8.0, "endo", (168.0, 7.0, 9.0)),
    Kind("lysosome", "lyso_mem", "lyso_lum", 8.0, "lyso", (118.0, 22.0, 14.0)),
    Kind("lipid droplet", "ld_mem", "ld_lum", 7.0, "ld", (202.0, 1.5, 0.0)),
    Kind("peroxisome", "perox_mem", "perox_lum", 7.0, "perox", (116.0, 5.0, 5.0)),
    Kind("vesicle", "ves_mem", "ves_lum", 7.5, "ves", (168.0, 0.0, 8.0)),
    Kind("microtubule", "mt_out", "mt_in", 6.0, "mt", (150.0, 0.0, 0.0)),
    Kind("nuclear pore", "np_out", "np_in", 0.0, "np", (138.0, 0.0, 10.0)),
    Kind("process of another cell", "pm", "cyto", 8.0, "cell"),  # filled with cytosol
)

#: Thickness (nm) of the plasma membrane, of either membrane of the nuclear envelope, and of the whole envelope.
PM_THICKNESS, NE_MEMBRANE, NE_THICKNESS = 8.0, 8.0, 38.0
#: Radius (nm) of the channel in a nuclear pore.
PORE_CHANNEL = 19.0
#: How far (nm) the ruffles of the plasma membrane reach from the cell's body at most.
RUFFLES = 36.0

SHELL_ID = np.array([CLASSES[k.shell].id for k in KINDS], np.uint8)
INSIDE_ID = np.array([CLASSES[k.inside].id for k in KINDS], np.uint8)
THICKNESS = np.array([k.thickness for k in KINDS])
GRAY = np.array([k.gray for k in KINDS])
