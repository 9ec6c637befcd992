from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from dpr_lightning.callbacks.policy_health import PolicyHealth
from dpr_lightning.callbacks.rollout_table import RolloutTable, escape, markdown_table, pick_rows
from dpr_lightning.callbacks.throughput import Throughput
from dpr_lightning.errors import UserError
from dpr_lightning.types import PairExperience

HOSTILE = [
    "a | b | c",
    "`code` **bold** _it_ ~~s~~ # h",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "[x](javascript:alert(1)) ![i](http://a/b.png) <http://a.b>",
    "&lt;b&gt; &amp; &#60;i&#62;",
    "line\n\n| --- |\n| x |\n```\nfence\n```",
    "back\\|slash \\` $x$ {a} ^1 - + * 1. x",
    "\x02klzzwxh:0000\x03 \x00 \x1b[31m",
    "déjà vu 数 🙂 \ud800",
]


def cells_as_shown(text: str) -> list[str]:
    """What TensorBoard itself makes of a two-column table with ``text`` on the left, as text."""
    table = markdown_table(["a", "b"], [[escape(text, max_characters=1000), "end"]])
    shown = markdown_to_safe_html(table.encode("utf-8"))
    body = shown.split("<tbody>")[1]
    cells = re.findall(r"<td>(.*?)</td>", body, flags=re.DOTALL)
    assert not re.search(r"<(?!/?(td|tr|tbody|table)>)", body), body
    return [html.unescape(cell) for cell in cells]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_cell_shows_what_the_model_wrote(text: str) -> None:
    expected = re.sub(r"[\x00-\x08\x0b-\x1f\ud800]", "\ufffd", text).replace("\n", "↵ ")
    assert cells_as_shown(text) == [expected, "end"]


def test_long_text_is_cut_and_says_so() -> None:
    assert escape("abcdef", max_characters=4) == "abcd &#8230; (2 characters more)"
    assert escape("abcd", max_characters=4) == "abcd"


def test_rows_are_the_best_the_worst_and_some_others() -> None:
    return_B = torch.tensor([0.0, 5.0, -3.0, 1.0, 4.0, -2.0, 2.0, 3.0, 0.5, 0.6])
    picked = pick_rows(return_B, num_rows=8, seed=(0, 3))
    assert picked[:4] == [(1, "best"), (4, "best"), (2, "worst"), (5, "worst")]
    assert [why for _, why in picked[4:]] == ["random"] * 4
    assert len({index for index, _ in picked}) == 8
    assert picked == pick_rows(return_B, num_rows=8, seed=(0, 3))
    assert any(pick_rows(return_B, num_rows=8, seed=(0, epoch)) != picked for epoch in range(4, 10))


@pytest.mark.parametrize(
    ("num_responses", "num_rows", "expected"), [(1, 8, 1), (2, 8, 2), (5, 8, 5), (5, 1, 1), (9, 3, 3)]
)
def test_rows_of_small_batches(num_responses: int, num_rows: int, expected: int) -> None:
    picked = pick_rows(torch.zeros(num_responses), num_rows=num_rows, seed=(0, 0))
    assert len({index for index, _ in picked}) == len(picked) == expected


def test_shows_rollouts_in_tensorboard(
    tmp_path: Path, toy: Any, toy_rollouts: Any, trainer_in: Any, experience_of: Any
) -> None:
    epochs = [
        experience_of(["ask", "a|b"], ["yes$", "no"], [1.5, -2.0]),
        experience_of(["ask"], ["unseen"], [0.0]),
        experience_of(["third"], ["<b>x$"], [0.25]),
    ]
    loggers = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path, name="", version="tensorboard")]
    trainer = trainer_in(tmp_path, RolloutTable(every_n_epochs=2), max_epochs=3, logger=loggers)
    trainer.fit(toy(), datamodule=toy_rollouts(epochs))
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0, "histograms": 0, "images": 0})
    events.Reload()
    texts = events.Tensors("rollout/samples/text_summary")
    # Two optimizer steps an epoch: epochs 0 and 2 begin after 0 and 4 steps.
    assert [text.step for text in texts] == [0, 4]
    rows = texts[0].tensor_proto.string_val[0].decode().splitlines()
    assert len(rows) == 4
    # Reward 1.5 on the last of 4 tokens: mean 0.375; it ends by "$", which stands for EOS here.
    assert rows[2] == "| best | ask | yes&#36; | 1.500 | 0.3750 | 4 | no |"
    assert rows[3] == "| worst | a&#124;b | no | -2.000 | -1.0000 | 2 | yes |"
    # The best response, drawn and as a table; "$" stands for EOS here.
    assert [image.step for image in events.Images("rollout/token_rewards")] == [0, 4]
    assert events.Images("rollout/token_rewards")[0].width == 900
    tokens = events.Tensors("rollout/token_rewards/text_summary")[0].tensor_proto.string_val[0].decode().splitlines()
    assert tokens[0] == "| position | token | reward | log pi_SFT | log pi_ref | log pi_old |"
    assert [line.split(" | ")[1:3] for line in tokens[2:]] == [
        ["y", "0.0000"],
        ["e", "0.0000"],
        ["s", "0.0000"],
        ["&#36;", "1.5000"],
    ]
    histograms = {tag: events.Histograms(tag)[0].histogram_value for tag in events.Tags()["histograms"]}
    assert set(histograms) == {
        "reward/token_hist",
        "advantage/token_hist",
        "response/length_hist",
        "return/first_hist",
    }
    # The toy's advantages are all 0.
    assert (histograms["advantage/token_hist"].num, histograms["advantage/token_hist"].sum) == (6, 0)
    # Six response tokens with rewards 0, 0, 0, 1.5, 0, -2; lengths 4 and 2; returns 1.5 and -2.
    assert (histograms["reward/token_hist"].num, histograms["reward/token_hist"].sum) == (6, -0.5)
    assert (histograms["response/length_hist"].num, histograms["response/length_hist"].sum) == (2, 6)
    assert (histograms["return/first_hist"].num, histograms["return/first_hist"].sum) == (2, -0.5)


def test_samples_of_pairs_are_ranked_by_their_lead(
    tmp_path: Path, toy: Any, toy_rollouts: Any, trainer_in: Any, experience_of: Any
) -> None:
    plain = experience_of(["ask", "a"], ["yes$", "no"], [0.0, 0.0])
    pairs = PairExperience(
        rollouts=plain.rollouts,
        previous=plain.rollouts,
        # The last two are of the iteration before, and not shown.
        demonstration_logp_P=torch.tensor([-1.0, -5.0, 0.0, 0.0]).double(),
        sample_logp_P=torch.tensor([-3.5, -4.0, 9.0, -9.0]).double(),
        # There is no reward, so no correlation of it either.
        stats={name: value for name, value in plain.stats.items() if not name.startswith("reward/")},
        seconds=plain.seconds,
    )
    logger = TensorBoardLogger(tmp_path, name="", version="tensorboard")
    trainer = trainer_in(tmp_path, RolloutTable(), PolicyHealth(), Throughput(), max_epochs=1, logger=logger)
    trainer.fit(toy(), datamodule=toy_rollouts([pairs]))
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0, "histograms": 0, "images": 0})
    events.Reload()
    rows = events.Tensors("rollout/samples/text_summary")[0].tensor_proto.string_val[0].decode().splitlines()
    assert rows[0] == "| chosen as | prompt | response | lead over demonstration | tokens | truncated |"
    assert rows[2:] == ["| best | a | no | 1.000 | 2 | yes |", "| worst | ask | yes&#36; | -2.500 | 4 | no |"]
    assert events.Tags()["histograms"] == ["response/length_hist"]
    assert events.Tags()["images"] == []
    scalars = events.Tags()["scalars"]
    assert {"response/length_ratio", "policy/entropy_ratio", "time/rollout", "time/score"} <= set(scalars)


def test_does_nothing_without_tensorboard_or_rollouts(
    tmp_path: Path, toy: Any, toy_data: Any, toy_rollouts: Any, trainer_in: Any, experience_of: Any
) -> None:
    trainer_in(tmp_path, RolloutTable(), max_epochs=1).fit(
        toy(), datamodule=toy_rollouts([experience_of(["a"], ["b"], [0.0])])
    )
    trainer_in(tmp_path, RolloutTable(), max_epochs=1, logger=TensorBoardLogger(tmp_path)).fit(
        toy(), datamodule=toy_data(2)
    )


@pytest.mark.parametrize("name", ["every_n_epochs", "num_rows", "max_characters"])
def test_settings_below_one_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"RolloutTable.{name}: found 0"):
        RolloutTable(**{name: 0})
