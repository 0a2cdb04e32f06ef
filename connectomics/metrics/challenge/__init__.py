"""The CellMap Segmentation Challenge's score: the same numbers as the official scorer, at a hundredth of the cost.

`score_instance` and `score_semantic` take arrays, `score_submission` a whole submission; rules have a version, `RULES`.
Each name is imported when it is first used: verbs that only need the rules start without the kernels.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from connectomics.metrics.challenge.results import SubmissionScore
    from connectomics.metrics.challenge.rules import RULES, Rules, get_rules
    from connectomics.metrics.challenge.scoring import score_instance, score_semantic
    from connectomics.metrics.challenge.submission import score_submission

_MODULES = {"SubmissionScore": "results", "score_submission": "submission"} | {
    **dict.fromkeys(("RULES", "Rules", "get_rules"), "rules"),
    **dict.fromkeys(("score_instance", "score_semantic"), "scoring"),
}
__all__ = ["RULES", "Rules", "SubmissionScore", "get_rules", "score_instance", "score_semantic", "score_submission"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
