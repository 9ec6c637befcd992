"""Verdicts of judges that think aloud: only the final answer counts."""

from __future__ import annotations

import pytest

from dpr_lightning.evaluation import final_number
from dpr_lightning.evaluation.reasoning import final_answer
from dpr_lightning.judging.alpaca_eval import AlpacaEval1Preset
from dpr_lightning.judging.arena_hard import ArenaHard2Preset, ArenaHardPreset
from dpr_lightning.judging.chat import NoVerdictError, Reply
from dpr_lightning.judging.mt_bench import MTBenchPreset
from dpr_lightning.judging.mt_bench_pair import MTBenchPairPreset
from dpr_lightning.judging.paper import PaperPreset

BLOCKS = [
    "<think>{}</think>",
    "{}</think>",
    "<think>\n{}\n</think>\n\n",
    "<Thinking>{}</Thinking>",
    "<reasoning effort='high'>{}</reasoning>",
    "<think>one</think><think>{}</think>",
    "<think>outer <think>inner</think> {}</think>",
    "[THINK]{}[/THINK]",
    "\u25c1think\u25b7{}\u25c1/think\u25b7",
    "<|begin_of_thought|>{}<|end_of_thought|>",
    "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>",
]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_verdict_inside_reasoning_does_not_count(block: str) -> None:
    def reply(inside: str, after: str) -> Reply:
        return Reply(text=block.format(inside) + after)

    assert MTBenchPreset().parse(reply("perhaps [[5]] or [[6]].", " All in all: [[9]]")).value == 9
    assert MTBenchPairPreset().parse(reply("perhaps [[A]].", "Final verdict: [[B]]")).label == "[[B]]"
    assert ArenaHardPreset().parse(reply("[[A>>B]]", "My final verdict is: [[B>A]]")).label == "B>A"
    assert ArenaHard2Preset().parse(reply("[[A>>B]]", "it is [B>A]")).label == "B>A"
    assert PaperPreset().parse(reply("Verdict: 1", "\nIt is concise.\nVerdict: 2")).value == 0.0
    ranks = "[{'model': 'model_1', 'rank': 1}, {'model': 'model_2', 'rank': 2}]"
    assert AlpacaEval1Preset().parse(reply("model_2 first?", ranks)).value == 1.0
    assert final_number(block.format(r"\boxed{5}") + "The answer is 7.") == 7


@pytest.mark.parametrize("text", ["<think>[[5]]", "<think>[[5]]</think>", "[[5]]</think> done", "[THINK] so [[5]]"])
def test_reasoning_alone_is_no_verdict(text: str) -> None:
    with pytest.raises(NoVerdictError, match="after the reasoning"):
        MTBenchPreset().parse(Reply(text=text))
    with pytest.raises(NoVerdictError, match="after the reasoning"):
        MTBenchPairPreset().parse(Reply(text=text.replace("5", "A")))


def test_the_last_verdict_of_a_final_answer_counts_and_the_first_of_a_reply_without_reasoning() -> None:
    assert MTBenchPreset().parse(Reply(text="<think>x</think>First [[4]], rather [[7]]")).value == 7
    assert MTBenchPreset().parse(Reply(text="First [[4]], rather [[7]]")).value == 4
    assert MTBenchPairPreset().parse(Reply(text="<think>x</think>Not [[A]] but [[B]]")).label == "[[B]]"
    assert MTBenchPairPreset().parse(Reply(text="Not [[B]] but [[A]]")).label == "[[A]]"


@pytest.mark.parametrize(
    ("text", "answer", "has_reasoning"),
    [
        ("plain <b>text</b>", "plain <b>text</b>", False),
        ("it left a `</think>` behind: [[5]]", "it left a `</think>` behind: [[5]]", False),
        ("a<think>b</think>c", "ac", True),
        ("a<think>b", "a", True),
        ("a</think>b</think>c", "c", True),
    ],
)
def test_final_answer(text: str, answer: str, has_reasoning: bool) -> None:
    found = final_answer(text)
    assert (found.text, found.has_reasoning) == (answer, has_reasoning)
