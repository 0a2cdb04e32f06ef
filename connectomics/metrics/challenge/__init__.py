"""The CellMap Segmentation Challenge's score: the same numbers as the official scorer, at a hundredth of the cost.

`score_instance` and `score_semantic` take arrays, `score_submission` a whole submission; rules have a version, `RULES`.
"""

from connectomics.metrics.challenge.results import SubmissionScore
from connectomics.metrics.challenge.rules import RULES, Rules, get_rules
from connectomics.metrics.challenge.scoring import score_instance, score_semantic
from connectomics.metrics.challenge.submission import score_submission

__all__ = ["RULES", "Rules", "SubmissionScore", "get_rules", "score_instance", "score_semantic", "score_submission"]
