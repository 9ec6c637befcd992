"""How good a policy is: verifiers, and figures with their uncertainty."""

from dpr_lightning.evaluation.ifeval import IFEval
from dpr_lightning.evaluation.metrics import ResponseMetric, VerifierAccuracy, grade_rows
from dpr_lightning.evaluation.numbers import final_number
from dpr_lightning.evaluation.ranking import Pairs, RankingAccuracy, best_by_score, pair_up, ranking_accuracy
from dpr_lightning.evaluation.statistics import (
    Estimate,
    Interval,
    bootstrap_interval,
    mean_estimate,
    paired_difference,
    ratio_interval,
    share_estimate,
    wilson_interval,
    win_rate,
)
from dpr_lightning.evaluation.verifiers import ExactMatch, FinalNumber, Verifier

__all__ = [
    "Estimate",
    "ExactMatch",
    "FinalNumber",
    "IFEval",
    "Interval",
    "Pairs",
    "RankingAccuracy",
    "ResponseMetric",
    "Verifier",
    "VerifierAccuracy",
    "best_by_score",
    "bootstrap_interval",
    "final_number",
    "grade_rows",
    "mean_estimate",
    "pair_up",
    "paired_difference",
    "ranking_accuracy",
    "ratio_interval",
    "share_estimate",
    "wilson_interval",
    "win_rate",
]
