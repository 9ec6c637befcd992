"""How good a policy is: verifiers, and figures with their uncertainty."""

from dpr_lightning.evaluation.statistics import (
    Estimate,
    Interval,
    RankingAccuracy,
    bootstrap_interval,
    paired_difference,
    ranking_accuracy,
    wilson_interval,
    win_rate,
)
from dpr_lightning.evaluation.verifiers import ExactMatch, FinalNumber, Verifier, final_number

__all__ = [
    "Estimate",
    "ExactMatch",
    "FinalNumber",
    "Interval",
    "RankingAccuracy",
    "Verifier",
    "bootstrap_interval",
    "final_number",
    "paired_difference",
    "ranking_accuracy",
    "wilson_interval",
    "win_rate",
]
