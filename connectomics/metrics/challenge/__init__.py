"""The CellMap Segmentation Challenge's score: the same numbers as the official scorer, at a hundredth of the cost.

`score_instance` and `score_semantic` take arrays, `score_submission` a whole submission; rules have a version, `RULES`.
"""

from connectomics.metrics.challenge.results import (
    ClassScore,
    InstanceScore,
    InstanceTable,
    LabelResult,
    Panoptic,
    RulesRow,
    SemanticScore,
    SubmissionScore,
    Totals,
    pool,
)
from connectomics.metrics.challenge.rules import DEFAULT_RULES, RULES, Rules, get_rules
from connectomics.metrics.challenge.scoring import score_instance, score_semantic
from connectomics.metrics.challenge.submission import score_submission

__all__ = [
    "DEFAULT_RULES",
    "RULES",
    "ClassScore",
    "InstanceScore",
    "InstanceTable",
    "LabelResult",
    "Panoptic",
    "Rules",
    "RulesRow",
    "SemanticScore",
    "SubmissionScore",
    "Totals",
    "get_rules",
    "pool",
    "score_instance",
    "score_semantic",
    "score_submission",
]
