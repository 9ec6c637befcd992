"""Sample rollouts and their distributions in TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from typing_extensions import override

from dpr_lightning.analysis.reward_image import draw_rewards
from dpr_lightning.analysis.reward_scale import robust_limit
from dpr_lightning.callbacks.experience import running_experience
from dpr_lightning.errors import UserError
from dpr_lightning.types import Experience, PairExperience, SampledExperience

if TYPE_CHECKING:
    from dpr_lightning.modules.base import CausalLMModule

_MAX_TOKENS = 200
"""Rows of the table of one response's tokens."""
_PLAIN = frozenset(" ,.;:?%/=")
"""Characters beside letters and digits that mean nothing to Markdown or HTML inside a table cell."""


class RolloutTable(Callback):
    """Shows rank zero's rollouts in TensorBoard: a table of samples, and histograms.

    The table is the text ``rollout/samples``: the responses of highest return, of lowest return, and some drawn at
    random. The histograms are ``reward/token_hist`` and ``advantage/token_hist`` (one value per response token),
    ``response/length_hist`` and ``return/first_hist`` (one per response: its return at the first token). Where samples
    are paired with demonstrations and have no return, they are ranked by their lead, log pi of the sample less log pi
    of the demonstration, and ``response/length_hist`` is the only histogram. The tokens of the best response are drawn
    as ``rollout/token_rewards``: an image, and a table with what the policies say of each; responses without token
    rewards have neither. Other loggers than TensorBoard's get nothing.

    Args:
        every_n_epochs: Show every n-th rollout batch, the first one included.
        num_rows: Rows of the table.
        max_characters: Longest prompt or response shown; of a longer one the beginning.
        seed: Decides the rows drawn at random.
    """

    def __init__(self, every_n_epochs: int = 1, num_rows: int = 8, max_characters: int = 2000, seed: int = 0) -> None:
        super().__init__()
        for name, value in (
            ("every_n_epochs", every_n_epochs),
            ("num_rows", num_rows),
            ("max_characters", max_characters),
        ):
            if value < 1:
                raise UserError(f"trainer.callbacks.RolloutTable.{name}: found {value}; give 1 or more")
        self.every_n_epochs = every_n_epochs
        self.num_rows = num_rows
        self.max_characters = max_characters
        self.seed = seed

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        experience = running_experience(trainer)
        if experience is None or trainer.current_epoch % self.every_n_epochs or not trainer.is_global_zero:
            return
        table: str | None = None
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                continue
            if table is None:
                table = self._table(experience, cast("CausalLMModule", pl_module), trainer.current_epoch)
            writer, step = logger.experiment, trainer.global_step
            mask_BT = experience.rollouts.response_mask_BT
            writer.add_text("rollout/samples", table, global_step=step)
            writer.add_histogram("response/length_hist", mask_BT.sum(dim=1).cpu(), global_step=step)
            if not isinstance(experience, Experience):
                continue
            writer.add_histogram("reward/token_hist", experience.reward_BT[mask_BT].float().cpu(), global_step=step)
            writer.add_histogram(
                "advantage/token_hist", experience.advantage_BT[mask_BT].float().cpu(), global_step=step
            )
            writer.add_histogram("return/first_hist", first_return(experience).cpu(), global_step=step)
            self._add_token_rewards(writer, experience, cast("CausalLMModule", pl_module), step)

    def _add_token_rewards(self, writer: Any, experience: Experience, module: CausalLMModule, step: int) -> None:
        """Show the tokens of the response of highest return."""
        index = int(first_return(experience).argmax())
        mask_T = experience.rollouts.response_mask_BT[index]
        ids = experience.rollouts.input_ids_BT[index][mask_T].tolist()
        if not ids:
            return
        # Each by itself: bytes that are no whole character become U+FFFD.
        tokens = [str(module.tokenizer.decode([token], skip_special_tokens=False)) for token in ids]
        rewards = experience.reward_BT[index][mask_T].tolist()
        title = f"best response, return {float(first_return(experience)[index]):.3f}, {len(ids)} tokens"
        image = draw_rewards(tokens, rewards, limit=robust_limit(rewards), title=title)
        writer.add_image("rollout/token_rewards", image, global_step=step, dataformats="HWC")
        writer.add_text("rollout/token_rewards", token_table(experience, index, tokens), global_step=step)

    def _table(self, experience: SampledExperience, module: CausalLMModule, epoch: int) -> str:
        rollouts = experience.rollouts
        worth, worth_B = _worth(experience)
        picked = pick_rows(worth_B, num_rows=self.num_rows, seed=(self.seed, epoch))
        rows = []
        for index, why in picked:
            response_T = rollouts.response_mask_BT[index]
            prompt_T = rollouts.attention_mask_BT[index] & ~response_T
            prompt, response = (
                # The very tokens, special ones included: a missing EOS is a thing to see.
                str(module.tokenizer.decode(rollouts.input_ids_BT[index][mask_T].tolist(), skip_special_tokens=False))
                for mask_T in (prompt_T, response_T)
            )
            row = {
                "chosen as": why,
                "prompt": escape(prompt, max_characters=self.max_characters),
                "response": escape(response, max_characters=self.max_characters),
                worth: f"{float(worth_B[index]):.3f}",
            }
            if isinstance(experience, Experience):
                row["mean token reward"] = f"{float(experience.reward_BT[index][response_T].mean()):.4f}"
            row["tokens"] = str(int(response_T.sum()))
            row["truncated"] = "yes" if bool(rollouts.is_truncated_B[index]) else "no"
            rows.append(row)
        return markdown_table(list(rows[0]), [list(row.values()) for row in rows])


def _worth(experience: SampledExperience) -> tuple[str, Tensor]:
    """Return what responses are ranked by, and [B] its values."""
    if isinstance(experience, Experience):
        return "return", first_return(experience)
    assert isinstance(experience, PairExperience)
    num_samples = len(experience.rollouts.prompt_index_B)
    lead_P = experience.sample_logp_P - experience.demonstration_logp_P
    return "lead over demonstration", lead_P[:num_samples].float()


def first_return(experience: Experience) -> Tensor:
    """Return [B]: each response's return at its first token."""
    mask_BT = experience.rollouts.response_mask_BT
    first_BT = mask_BT & (mask_BT.cumsum(dim=1) == 1)
    return torch.where(first_BT, experience.return_BT, 0.0).sum(dim=1).float()


def token_table(experience: Experience, index: int, tokens: Sequence[str]) -> str:
    """Return a Markdown table of the first ``_MAX_TOKENS`` tokens of response ``index``, and how many more there are.

    Args:
        experience: The rollouts.
        index: Which of them.
        tokens: Texts of its response tokens.
    """
    mask_T = experience.rollouts.response_mask_BT[index]
    scores = experience.scores
    names = ("reward", "log pi_SFT", "log pi_ref", "log pi_old")
    values = (experience.reward_BT, scores.teacher_logp_BT, scores.reference_logp_BT, scores.old_logp_BT)
    columns = [values_BT[index][mask_T].tolist() for values_BT in values]
    rows = [
        [str(place + 1), escape(token, max_characters=100), *(f"{column[place]:.4f}" for column in columns)]
        for place, token in enumerate(tokens[:_MAX_TOKENS])
    ]
    if len(tokens) > _MAX_TOKENS:
        rows.append(["", f"{len(tokens) - _MAX_TOKENS} tokens more", *("" for _ in names)])
    return markdown_table(["position", "token", *names], rows)


def pick_rows(return_B: Tensor, *, num_rows: int, seed: Sequence[int]) -> list[tuple[int, str]]:
    """Choose rows to show: a quarter each (at least one) of the best and worst, and the rest at random.

    Args:
        return_B: Return of each response; its order breaks ties.
        num_rows: How many to choose; all are where there are fewer.
        seed: Decides the random ones.

    Returns:
        Row numbers without repeats, each with ``best``, ``worst`` or ``random``, in this order.
    """
    by_return = torch.argsort(return_B, descending=True, stable=True).tolist()
    num_extreme = max(1, min(num_rows // 4, len(by_return) // 2))
    best = by_return[:num_extreme]
    worst = [index for index in reversed(by_return) if index not in best][:num_extreme]
    rest = sorted(set(by_return) - set(best) - set(worst))
    drawn = np.random.default_rng(list(seed)).permutation(len(rest))[: max(0, num_rows - len(best) - len(worst))]
    picked = [(index, "best") for index in best] + [(index, "worst") for index in worst]
    return (picked + [(rest[position], "random") for position in sorted(drawn)])[:num_rows]


def escape(text: str, *, max_characters: int) -> str:
    """Return ``text`` such that a Markdown table cell shows it as it is, whatever a model wrote.

    Everything but letters, digits and harmless punctuation becomes a numeric HTML entity, which neither Markdown nor
    HTML reads as markup. Line ends and tabs become arrows; other control characters, and what UTF-8 cannot hold,
    become U+FFFD.
    """
    shown = text[:max_characters]
    cells = "".join(_escape_character(character) for character in shown)
    return cells if len(shown) == len(text) else f"{cells} &#8230; ({len(text) - len(shown)} characters more)"


def _escape_character(character: str) -> str:
    if character == "\n":
        return "&#8629; "
    if character == "\t":
        return "&#8677; "
    if character in _PLAIN or (character.isascii() and character.isalnum()):
        return character
    code = ord(character)
    # Python-Markdown marks its own placeholders by control characters, so none may come through.
    if code < 0x20 or 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000 or code & 0xFFFE == 0xFFFE:
        return "&#65533;"
    return f"&#{code};"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of cells that are escaped already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
