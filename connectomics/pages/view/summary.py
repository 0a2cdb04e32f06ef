"""What a viewer shows, in a few lines."""

from __future__ import annotations

from collections.abc import Sequence

from connectomics.errors import number_of
from connectomics.pages.view.layers import Layer, Layers

_MOST = 6  # names in a line


def summary(found: Layers) -> list[str]:
    """Return a line for each kind of layer (raw, truth, labels, ...), and what was left out or joined."""
    kinds: dict[str, list[Layer]] = {}
    for layer in found.layers:
        kinds.setdefault(layer.what, []).append(layer)
    lines = [f"{found.dataset}: {number_of(len(found.layers), 'layer')}"]
    for what, layers in kinds.items():
        classes = _listed([layer.class_name for layer in layers])
        crops = _listed([layer.crop for layer in layers])
        where = "".join([f" of {classes}" if classes else "", f" in {crops}" if crops else ""])
        visible = sum(layer.visible for layer in layers)
        state = "" if visible == len(layers) else f" ({visible} of {len(layers)} on)" if visible else " (off)"
        lines.append(f"  {what}{where}{state}")
    return [*lines, *(f"  note: {note}" for note in found.notes)]


def _listed(names: Sequence[str]) -> str:
    """Return different names, the first few of many."""
    there = [name for name in dict.fromkeys(names) if name]
    more = len(there) - _MOST
    return ", ".join(there[:_MOST]) + (f" and {more} more" if more > 0 else "")
