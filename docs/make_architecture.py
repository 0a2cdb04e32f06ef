"""Draw docs/images/architecture.png: the rooms of the package, their imports, and the way of a voxel through them.

    python docs/make_architecture.py

The rooms and arrows are read from the code, so that the picture is true for the commit it was drawn from.
"""

from __future__ import annotations

import ast
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "connectomics"

#: Rooms from the top floor to the ground, each with its column: what a user calls, what it does, what it stands on.
FLOORS = (
    ("cli",),
    ("pipeline",),
    ("pages", "lightning", "submission"),
    ("decoding", "morphology", "metrics"),
    ("data", "inference", "models"),
    ("cellmap", "phantom", "tasks"),
    ("io", "config", "geometry"),
)
#: The way of a voxel: room -> what it becomes there.
WAY = (
    ("io", "block of a volume"),
    ("cellmap", "raw, label, known"),
    ("data", "patch"),
    ("lightning", "checkpoint"),
    ("inference", "probability"),
    ("decoding", "instance ID"),
    ("metrics", "score"),
)


def first_line(room: str) -> str:
    """Return the first sentence of a room's docstring."""
    text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))) or ""
    return text.split("\n")[0].split(". ")[0].split(": ")[-1].rstrip(".").replace("`", "")


def lines_of(room: str) -> int:
    """Return the number of lines of a room."""
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in (PACKAGE / room).rglob("*.py"))


def draw(axes: Axes) -> None:
    """Draw floors, rooms and the way of a voxel."""
    height, places = 1.0, {}
    for floor, rooms in enumerate(reversed(FLOORS)):
        y = floor * 1.45
        width = (12 - 0.4 * (len(rooms) - 1)) / len(rooms)
        for column, room in enumerate(rooms):
            x = column * (width + 0.4)
            places[room] = (x + width / 2, y + height / 2, width)
            box = FancyBboxPatch(
                (x, y),
                width,
                height,
                boxstyle="round,pad=0.02,rounding_size=0.12",
                facecolor="#eef2fb",
                edgecolor="#3f51b5",
            )
            axes.add_patch(box)
            axes.text(x + 0.15, y + height - 0.3, room, fontsize=12, fontweight="bold", color="#1a237e")
            axes.text(
                x + width - 0.15, y + height - 0.28, f"{lines_of(room):,} lines", fontsize=7, ha="right", color="#777"
            )
            words, rows = first_line(room).split(), [""]
            for word in words:
                if len(rows[-1]) + len(word) > 11.5 * width:
                    rows.append("")
                rows[-1] += f"{word} "
            axes.text(x + 0.15, y + height - 0.48, "\n".join(rows[:2]), fontsize=8, va="top", color="#333")
    for number, ((one, _), (other, _)) in enumerate(pairwise(WAY)):
        start, end = places[one], places[other]
        axes.annotate(
            "",
            xy=(end[0] + end[2] * 0.28, end[1] - 0.25),
            xytext=(start[0] + start[2] * 0.28, start[1] - 0.25),
            arrowprops={
                "arrowstyle": "-|>",
                "color": "#ffb74d",
                "lw": 1.6,
                "connectionstyle": f"arc3,rad={(-0.15, 0.15)[number % 2]}",
            },
        )
    for number, (room, what) in enumerate(WAY, start=1):
        x, y, width = places[room]
        axes.text(
            x + width * 0.28, y - 0.3, f"{number} {what}", fontsize=8, ha="center", va="center", color="white",
            bbox={"boxstyle": "round,pad=0.25", "facecolor": "#e65100", "edgecolor": "none"},
        )  # fmt: skip
    axes.set_xlim(-0.2, 12.2)
    axes.set_ylim(-0.3, len(FLOORS) * 1.45)
    axes.axis("off")


def main() -> None:
    """Write the picture."""
    figure, axes = plt.subplots(figsize=(12, 9.5))
    draw(axes)
    figure.savefig(ROOT / "docs/images/architecture.png", dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
