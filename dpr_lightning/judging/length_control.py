"""AlpacaEval's length-controlled win rate: a logistic model of the preference, asked for equal lengths.

As ``length_controlled_v1`` of alpaca-eval 0.6.6 (arXiv 2404.04475): the preference is explained by
tanh(length difference over its spread), the instruction's difficulty, and one constant, without intercept; L1 penalty
chosen by five-fold cross-validation over log-loss; the judgments of a baseline told to be verbose or concise are fitted
along with a weight of 0.2 shared by its two versions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from dpr_lightning.errors import UserError
from dpr_lightning.judging.preset import Figure
from dpr_lightning.judging.records import PairRecord

_COLUMNS = ("preference", "index", "std_delta_len", "instruction_difficulty", "not_gamed_baseline")
_WEIGHT_OF_GAMED = 0.2 / 2
_NUM_FOLDS = 5
_SMALLEST = 1e-15
_RANDOM_STATE = 123


class LengthControl:
    """Computes the figure from upstream's file of gamed baselines.

    Args:
        path: ``df_gamed.csv`` of the data set tatsu-lab/alpaca_eval.
        order: Instructions in the official order, whose place is the ``index`` of that file; None takes the order of
            the judgments, as upstream does.

    Raises:
        UserError: The file or scikit-learn is missing, or the file lacks a column.
    """

    def __init__(self, path: Path, order: Sequence[str] | None = None) -> None:
        try:
            import sklearn  # type: ignore[import-untyped]  # noqa: F401
        except ImportError as error:
            raise UserError(
                "--gamed_baseline: length control needs scikit-learn; pip install 'dpr-lightning[judge]'"
            ) from error
        try:
            gamed = pd.read_csv(path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"--gamed_baseline: '{path}' cannot be read ({error}); give upstream's df_gamed.csv"
            ) from None
        missing = [column for column in _COLUMNS if column not in gamed]
        if missing:
            raise UserError(
                f"--gamed_baseline: '{path}' has no column {', '.join(missing)}; give upstream's df_gamed.csv"
            )
        self.gamed = gamed[list(_COLUMNS)]
        self.place = None if order is None else {instruction: place for place, instruction in enumerate(order)}

    def figures(self, records: Sequence[PairRecord]) -> list[Figure]:
        """Return the length-controlled win rate and its standard error, in percent.

        Raises:
            UserError: A judged instruction is not in the file of gamed baselines.
        """
        if all(record.model == record.baseline for record in records):
            return [Figure(name="length_controlled_winrate", value=50.0), Figure(name="lc_standard_error", value=0.0)]
        predicted_P = self._predict(self._features(records))
        error = float(predicted_P.std(ddof=1)) / math.sqrt(len(predicted_P))
        return [
            Figure(name="length_controlled_winrate", value=100 * float(predicted_P.mean())),
            Figure(name="lc_standard_error", value=100 * error),
        ]

    def _features(self, records: Sequence[PairRecord]) -> pd.DataFrame:
        difficulty = self.gamed.drop_duplicates("index").set_index("index")["instruction_difficulty"]
        places = [
            number if self.place is None else self.place.get(record.prompt, -1) for number, record in enumerate(records)
        ]
        unknown = [
            record.prompt for place, record in zip(places, records, strict=True) if place not in difficulty.index
        ]
        if unknown:
            raise UserError(
                f"--gamed_baseline: {len(unknown)} of {len(records)} judged instructions are not in it, such as "
                f"{unknown[0][:60]!r}; judge AlpacaEval's own, and give them with --prompts where their order differs"
            )
        lengths_P2 = np.array([(record.baseline_length, record.model_length) for record in records], dtype=np.float64)
        delta_P = lengths_P2[:, 0] - lengths_P2[:, 1]
        return pd.DataFrame(
            {
                "preference": [record.score if record.is_complete else math.nan for record in records],
                "std_delta_len": delta_P / delta_P.std(ddof=1),
                "instruction_difficulty": difficulty.loc[places].to_numpy(),
                "not_gamed_baseline": True,
            }
        )

    def _predict(self, judged: pd.DataFrame) -> npt.NDArray[np.float64]:
        both = pd.concat([self.gamed.drop(columns="index"), judged])
        both = both[both["preference"].notna()]
        weight_N = np.where(both["not_gamed_baseline"].astype(bool), 1.0, _WEIGHT_OF_GAMED)
        coefficients = _fit(_design(both), both["preference"].to_numpy(dtype=np.float64), weight_N)
        at_equal_length = _design(judged.assign(std_delta_len=0.0))
        predicted: npt.NDArray[np.float64] = 1 / (1 + np.exp(-(at_equal_length @ coefficients)))
        return predicted


def _design(frame: pd.DataFrame) -> npt.NDArray[np.float64]:
    columns = [
        np.tanh(frame["std_delta_len"].to_numpy(dtype=np.float64)),
        frame["instruction_difficulty"].to_numpy(dtype=np.float64),
        frame["not_gamed_baseline"].to_numpy(dtype=np.float64),
    ]
    return np.column_stack(columns)


def _fit(
    features: npt.NDArray[np.float64], preference: npt.NDArray[np.float64], weight: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the coefficients; a preference p counts as a win with weight p and a loss with weight 1 - p."""
    import sklearn
    from sklearn.linear_model import LogisticRegressionCV  # type: ignore[import-untyped]
    from sklearn.metrics import make_scorer  # type: ignore[import-untyped]
    from sklearn.model_selection import GroupKFold  # type: ignore[import-untyped]

    share = np.concatenate([preference, 1 - preference])
    twice = np.concatenate([weight, weight])
    outcome = np.repeat([1, 0], len(preference))
    group = np.tile(np.arange(len(preference)), 2)
    with sklearn.config_context(enable_metadata_routing=True):
        scorer = make_scorer(_log_loss, response_method="predict_proba", greater_is_better=False)
        scorer = scorer.set_score_request(share=True, weight=True)
        model = LogisticRegressionCV(
            cv=GroupKFold(n_splits=_NUM_FOLDS),
            scoring=scorer,
            random_state=_RANDOM_STATE,
            l1_ratios=(1.0,),
            solver="liblinear",
            fit_intercept=False,
            use_legacy_attributes=False,
        )
        model.set_fit_request(sample_weight=True)
        model.fit(
            np.concatenate([features, features]),
            outcome,
            sample_weight=share * twice,
            groups=group,
            share=share,
            weight=twice,
        )
    coefficients: npt.NDArray[np.float64] = model.coef_[0]
    return coefficients


def _log_loss(
    outcome: npt.NDArray[np.int64],
    predicted: npt.NDArray[np.float64],
    share: npt.NDArray[np.float64],
    weight: npt.NDArray[np.float64],
) -> float:
    win = np.where(outcome == 1, share, 1 - share)
    predicted = np.clip(predicted, _SMALLEST, 1 - _SMALLEST)
    return -float(np.mean(weight * (win * np.log(predicted) + (1 - win) * np.log(1 - predicted))))
