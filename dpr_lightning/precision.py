"""``trainer.precision: bf16-true`` and its kin: weights of one type, and figures in float32 as ever."""

from __future__ import annotations

from typing import Any

from lightning import Trainer
from lightning.pytorch.plugins.precision import Precision

_WEIGHTS = {"bf16-true": "bfloat16", "16-true": "float16", "64-true": "float64"}


class WeightPrecision(Precision):
    """Leaves batches, metrics and torch's default type alone; the module loads its weights in the type itself.

    Lightning's own plugins also turn log-probabilities and advantages in the batch, and every tensor that is made in a
    step, to the weights' type. In bfloat16 the ratio pi / pi_old of most tokens would then be rounded to 1.
    """

    def __init__(self, precision: Any) -> None:
        super().__init__()
        self.precision = precision


def weights_dtype(precision: Any) -> str | None:
    """Return torch's name of the type that weights are kept in; None leaves it to ``model.backbone.dtype``."""
    return _WEIGHTS.get(str(precision))


def replace_precision_plugin(trainer: Trainer) -> None:
    """Give a Trainer whose weights are of one type the plugin above; before anything is loaded."""
    if weights_dtype(trainer.precision) is not None and not isinstance(trainer.precision_plugin, WeightPrecision):
        trainer.strategy.precision_plugin = WeightPrecision(trainer.precision)
