"""A program as the judge: of two answers the one that a verifier calls right is better."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dpr_lightning.evaluation.verifiers import Verifier
from dpr_lightning.judging.games import Game, Outcome, Verdict


class VerifierJudge:
    """Judges pairs by the rightness of each answer, equal rightness being a tie.

    Args:
        verifier: Says whether an answer to the prompt's row is right.
    """

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier

    @property
    def name(self) -> str:
        """The verifier's class."""
        return type(self.verifier).__name__

    def judge(self, games: Sequence[Game], *, on_progress: Callable[[int], object] | None = None) -> list[Outcome]:
        """Return the outcome of every game, in their order; see ``Judge``.

        Raises:
            UserError: A row lacks what the verifier compares with.
        """
        outcomes: list[Outcome] = []
        for game in games:
            first, second = (self.verifier(game.item.row, game.item.answers[side][game.turn]) for side in game.shown)
            words = ", ".join("right" if is_right else "wrong" for is_right in (first, second))
            label = "tie" if first == second else "1" if first else "2"
            outcomes.append(Verdict(value=(1 + first - second) / 2, label=label, text=words))
            if on_progress is not None:
                on_progress(1)
        return outcomes
