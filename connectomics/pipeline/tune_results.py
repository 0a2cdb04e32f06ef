"""What tuning found, and the files that it leaves."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from connectomics.decoding.parameters import DecodeParameters
from connectomics.errors import WriteError
from connectomics.metrics.challenge.rules import DEFAULT_RULES, Rules
from connectomics.metrics.tables import write_json


@dataclass(frozen=True)
class TunedClass:
    """What tuning found for one class.

    Attributes:
        measure: ``combined`` (instances) or ``iou``, by rules of quality ``pq``, pooled over ``crops``
            (``dataset/crop``), known voxels only.
        made_from: crop -> identity of its prediction.
        base, best: parameters before and after; ``best`` is ``base`` where nothing scored higher.
        trials: of a search, in order: ``number``, ``state`` (``complete`` or ``pruned``), ``score``, ``parameters``.
        thresholds: (threshold, IoU) of every stored value, where no search was needed.
    """

    class_name: str
    measure: str
    crops: tuple[str, ...]
    made_from: dict[str, str]
    base: DecodeParameters
    base_score: float
    best: DecodeParameters
    best_score: float
    trials: list[dict[str, Any]] = field(default_factory=list)
    thresholds: list[tuple[float, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "measure": self.measure,
            "crops": list(self.crops),
            "made_from": self.made_from,
            "base": self.base.to_dict(),
            "base_score": self.base_score,
            "best": self.best.to_dict(),
            "best_score": self.best_score,
            "trials": self.trials,
            "thresholds": [list(pair) for pair in self.thresholds],
        }


def write_results(
    folder: Path,
    current: Mapping[str, Mapping[str, str]],
    base: Mapping[str, DecodeParameters],
    result: Mapping[str, TunedClass],
    rules: Rules,
) -> None:
    """Write what was tuned, with classes that an earlier run tuned on the same predictions (``current``: class -> crop
    -> identity of its prediction); those tuned on others, or by other ``rules``, are left out."""
    import json

    import yaml

    from connectomics.pipeline.tune_plot import plot_tuning

    summary = folder / "tuning.json"
    rows: dict[str, Any] = {}
    if summary.is_file():
        read = json.loads(summary.read_text(encoding="utf-8"))
        before = read["classes"] if read.get("rules", DEFAULT_RULES) == rules.version else {}
        rows = {
            n: row for n, row in before.items() if row.get("made_from", {"": ""}).items() <= current.get(n, {}).items()
        }
    rows |= {name: tuned.to_dict() for name, tuned in result.items()}
    best = {name: parameters.to_dict() for name, parameters in base.items()}
    best |= {name: row["best"] for name, row in rows.items()}
    write_json(summary, {"rules": rules.version, "verified": rules.verified, "classes": rows})
    plot_tuning(rows, folder / "tuning.png")
    text = "# What tuning chose (tuning.json has the trials); pytc decode --config reads it.\n"
    text += yaml.safe_dump({"decoding": {"classes": best}}, sort_keys=True)
    path = folder / "decoding.yaml"
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise WriteError(f"cannot write {path}: {error.strerror or error}") from error
