"""The colors of overlays, in figures, reports and viewers alike. Change them here.

They stay apart for color-blind eyes and in gray print (Okabe and Ito, "Color Universal Design", 2008; the schemes of
Paul Tol, 2021). The ground truth is blue and the prediction orange everywhere; an error takes the color of the side
that stands alone. The style sheet of the pages (``templates/page.html.j2``) takes its two overlay colors from here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Rgb = tuple[int, int, int]

TRUTH: Rgb = (86, 180, 233)  # sky blue
PREDICTION: Rgb = (230, 159, 0)  # orange
AGREEMENT: Rgb = (0, 158, 115)  # bluish green
WRONG_OBJECT: Rgb = (204, 121, 167)  # reddish purple
UNKNOWN: Rgb = (110, 110, 110)
NO_PARTNER: Rgb = (235, 235, 235)  # predicted objects that overlap no true one
OUTLINE: Rgb = (24, 24, 24)  # around white lettering and scale bars

FILL = 95  # alpha (0 to 255) inside a colored region; its edge is opaque

#: Values of an error map.
NEITHER, TP, FP, FN, WRONG, NOT_KNOWN = range(6)
#: RGBA by value of an error map; agreement is fainter than errors, so that errors stand out.
ERROR_COLORS: NDArray[np.uint8] = np.array(
    [(0, 0, 0, 0), (*AGREEMENT, 110), (*PREDICTION, 215), (*TRUTH, 215), (*WRONG_OBJECT, 215), (*UNKNOWN, 170)],
    np.uint8,
)

#: Colors of objects, repeated in order of their IDs; row 0 is background.
OBJECT_COLORS: NDArray[np.uint8] = np.array(
    [(0, 0, 0), (86, 180, 233), (230, 159, 0), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167),
     (0, 114, 178), (153, 221, 255), (221, 204, 119), (170, 68, 153), (68, 187, 153), (238, 136, 102)],
    np.uint8,
)  # fmt: skip

#: Colors of classes in the viewers: Okabe and Ito's without black.
CLASS_COLORS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
KNOWN_COLOR = "#888888"  # of the mask that says where a class is annotated

#: Voxels that are not annotated, in patches: a light veil with stripes (RGBA), unlike dark raw and unlabeled voxels.
UNKNOWN_VEIL = (*UNKNOWN, 70)
UNKNOWN_STRIPE = (230, 230, 230, 150)


def css(color: Rgb) -> str:
    """Return a color as CSS, ``rgb(86, 180, 233)``."""
    return f"rgb{color}"
