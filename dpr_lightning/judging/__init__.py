"""Judges of responses: models behind an API, verifiers, and stored judgments, with the statistics of their verdicts."""

from dpr_lightning.judging.games import Failure, Game, Item, Judge, Outcome, Verdict
from dpr_lightning.judging.model_judge import ModelJudge
from dpr_lightning.judging.preset import Preset
from dpr_lightning.judging.presets import PRESETS, make_preset
from dpr_lightning.judging.verifier_judge import VerifierJudge

__all__ = [
    "PRESETS",
    "Failure",
    "Game",
    "Item",
    "Judge",
    "ModelJudge",
    "Outcome",
    "Preset",
    "Verdict",
    "VerifierJudge",
    "make_preset",
]
