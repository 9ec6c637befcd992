"""Silence for what libraries say to everyone."""

from __future__ import annotations

import logging
import warnings

from huggingface_hub.utils.tqdm import enable_progress_bars
from transformers.utils.logging import disable_progress_bar

_CHATTER = (
    "\U0001f4a1 Tip:",  # advertises other products
    "TPU available:",
    "Loading `train_dataloader` to estimate",
    "`weights_only` was not set",
)
"""Beginnings of Lightning's log lines that say nothing of this run."""
_NEEDLESS_WARNINGS = (
    # Lightning's own use of torch, which it has to change.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # No validation data is a choice, and a loader that serves what lies in memory wants no worker processes.
    r"Total length of `list` across ranks is zero",
    r"The '\w+_dataloader' does not have many workers",
    # Predictions carry the number of their row.
    r"Couldn't infer the batch indices",
    # The new name is not in all versions that this package runs with.
    r"`gradient_checkpointing_enable` is deprecated",
)


def quieten() -> None:
    """Leave out what libraries say to everyone and what helps no one here; all other messages stay."""
    for message in _NEEDLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{message}")
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if _is_news not in logger.filters:
        logger.addFilter(_is_news)
    # It says at every import, also of those who use no weights in 4 bits, what faster kernels it would like.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # Bars over the files of one model flash by; those over downloads stay.
    disable_progress_bar()
    enable_progress_bars()


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_CHATTER)
