"""Fields of messages are rendered or the row is counted, and a row that the template refuses is dropped."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dpr_lightning.data.demonstrations import DemonstrationConfig, load_demonstrations
from dpr_lightning.data.encoding import DropReport, EncodedDemonstrations, encode_table
from dpr_lightning.data.templates import ChatTemplate, PromptTemplate, TextTemplate
from dpr_lightning.errors import UserError

Write = Callable[..., str]
# Writes functions, calls and reasoning in its own way.
RICH = (
    "{% if tools %}T{{ tools | tojson }}\n{% endif %}{% for m in messages %}<{{ m['role'] }}>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}~"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
)
CALL = {"type": "function", "function": {"name": "get", "arguments": '{"city": "Paris"}'}}
TOOL = {"type": "function", "function": {"name": "get"}}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


@pytest.fixture
def encode(
    write_jsonl: Write, byte_bpe: PreTrainedTokenizerFast
) -> Callable[..., tuple[EncodedDemonstrations, DropReport]]:
    def run(
        rows: list[dict[str, Any]], template: PromptTemplate, *, needs_response: bool = True, **settings: Any
    ) -> tuple[EncodedDemonstrations, DropReport]:
        config = DemonstrationConfig(
            **{"source": write_jsonl(rows), "preset": "messages", "max_rejected_share": 1.0, **settings}
        )
        table = load_demonstrations(config)["train"]
        return encode_table(
            table,
            tokenizer=byte_bpe,
            template=template,
            config=config,
            split="train",
            needs_response=needs_response,
            refuse_rejected="max_rejected_share" in settings,
        )

    return run


def texts(encoded: EncodedDemonstrations, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    return [
        (tokenizer.decode(encoded.prompt_ids(i)), tokenizer.decode(encoded.response_ids(i), skip_special_tokens=True))
        for i in range(len(encoded))
    ]


FIELD_ROWS: list[dict[str, Any]] = [
    {"messages": [user("w"), assistant("Let me look .", tool_calls=[CALL])]},
    {"messages": [user("w"), assistant(None, tool_calls=[CALL])]},
    {"messages": [user("2+2"), assistant("4", reasoning_content="two and two")]},
    {"messages": [user("a"), assistant("", tool_calls=[CALL]), user("r"), assistant("b")]},
    {"messages": [user("a"), assistant("b")], "tools": [TOOL]},
    {"messages": [user("a"), assistant("b")], "tools": json.dumps([TOOL])},
    {"messages": [user("a"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "3"}, assistant("b")]},
]


def test_fields_are_rendered_where_the_template_writes_them(encode: Any, byte_bpe: PreTrainedTokenizerFast) -> None:
    encoded, report = encode(FIELD_ROWS, ChatTemplate(RICH))
    assert (report.num_dropped, dict(report.counts)) == (0, {})
    call = '[get {"city": "Paris"}]'
    tools = 'T[{"type": "function", "function": {"name": "get"}}]\n'
    assert texts(encoded, byte_bpe) == [
        ("<user>w~<assistant>", f"Let me look .{call}"),
        ("<user>w~<assistant>", call),
        ("<user>2+2~<assistant>", "<think>two and two</think>4"),
        (f"<user>a~<assistant>{call}~<user>r~<assistant>", "b"),
        (f"{tools}<user>a~<assistant>", "b"),
        (f"{tools}<user>a~<assistant>", "b"),
        (f"<user>a~<assistant>{call}~<tool>3~<assistant>", "b"),
    ]


@pytest.mark.parametrize("template", [TextTemplate(), ChatTemplate()])
def test_fields_that_the_template_leaves_out_drop_the_row_by_name(encode: Any, template: PromptTemplate) -> None:
    good = {"messages": [user("a"), assistant("b", reasoning_content=None, tool_calls=[])], "tools": []}
    encoded, report = encode([good, *FIELD_ROWS], template)
    # The fixture's own chat template writes the role of every message, and with it that of tools.
    roles = "" if isinstance(template, ChatTemplate) else "messages of role 'tool' and "
    expected = {
        "'tool_calls' that the prompt template does not write": 3,
        "'reasoning_content' that the prompt template does not write": 1,
        "'tools' that the prompt template does not write": 2,
    }
    key = f"{roles}'tool_calls' that the prompt template does not write"
    expected[key] = expected.get(key, 0) + 1
    assert dict(report.counts) == expected
    assert encoded.rows.tolist() == [0]
    # Prompts alone need no answer's fields.
    prompts, _ = encode([good, *FIELD_ROWS], template, needs_response=False)
    assert prompts.rows.tolist() == [0, 1, 2, 3]


def test_answers_of_weight_zero_are_not_trained_on(encode: Any, byte_bpe: PreTrainedTokenizerFast) -> None:
    chats = [
        [user("2+2"), assistant("5", weight=0)],
        [user("a"), assistant("b", weight=1), user("c"), assistant("d", weight=0)],
        [user("a"), assistant("b", weight=0), user("c"), assistant("d", weight=1.0)],
        [user("a"), assistant("b", weight=False)],
        [user("a"), assistant("b", weight=0.5)],
        [{**user("a"), "weight": 0}, assistant("b", weight=None)],
    ]
    encoded, report = encode([{"messages": chat} for chat in chats], TextTemplate())
    assert texts(encoded, byte_bpe) == [("a\n", "b"), ("a\nb\n\nc\n", "d"), ("a\n", "b")]
    assert dict(report.counts) == {
        "every answer has weight 0": 2,
        "answer of weight 0 not trained on": 1,
        "answer of weight 0.5, neither 0 nor 1": 1,
    }
    assert report.num_dropped == 3


def test_a_turn_after_the_last_answer_and_repeated_prompts_are_told(encode: Any) -> None:
    rows = [{"messages": [user("a"), assistant("b"), user("and ?")]}] * 2 + [{"messages": [user("c"), assistant("d")]}]
    encoded, report = encode(rows, TextTemplate())
    assert len(encoded) == 3
    assert dict(report.counts) == {"turn after the last answer left out": 2}
    assert report.num_repeated == report.to_manifest()["repeated_prompts"] == 1
    assert "turn after the last answer left out (" in report.table()
    assert "kept            1  33.33%  prompt repeats that of an earlier row (" in report.table()
    assert "line 2)" in report.table().splitlines()[-1]


def test_every_repeat_is_counted_over_chunks(encode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpr_lightning.data.demonstrations.CHUNK_ROWS", 7)
    rows = [{"prompt": f"q {i % 20}", "response": f"a {i}"} for i in range(61)]
    _, report = encode(rows, TextTemplate(), preset="prompt_response")
    # 61 rows of 20 prompts.
    assert report.num_repeated == 41


@pytest.mark.parametrize("chat", [["user", "user"], ["user", "assistant", "assistant", "user"], ["assistant", "user"]])
def test_a_chat_that_the_template_refuses_is_one_dropped_row(encode: Any, chat: list[str]) -> None:
    good = {"messages": [user("a"), assistant("b")]}
    bad = {"messages": [*({"role": role, "content": "x"} for role in chat), assistant("b")]}
    encoded, report = encode([good] * 5 + [bad] + [good] * 500, ChatTemplate(ALTERNATING), max_rejected_share=0.05)
    assert len(encoded) == 505
    ((reason, count),) = report.counts.items()
    assert reason == "refused by the chat template (Conversation roles must alternate user/assistant)"
    assert count == 1
    assert report.examples[reason][0].endswith("rows.jsonl line 6")


def test_sharegpt_has_a_preset(encode: Any, byte_bpe: PreTrainedTokenizerFast) -> None:
    chat = [("system", "S"), ("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")]
    rows = [{"conversations": [{"from": role, "value": text} for role, text in chat]}]
    encoded, _ = encode(rows, TextTemplate(), preset="sharegpt")
    assert texts(encoded, byte_bpe) == [("S\n\na\nb\n\nc\n", "d")]
    with pytest.raises(UserError, match="set preset: sharegpt"):
        encode(rows, TextTemplate(), preset="prompt_response")
    with pytest.raises(UserError, match="set preset: sharegpt"):
        encode(rows, TextTemplate(), preset="messages")


def test_prompts_may_be_messages_and_every_preset_has_a_system_column(
    encode: Any, byte_bpe: PreTrainedTokenizerFast
) -> None:
    rows = [
        {"prompt": [user("a"), assistant("b"), user("c")], "response": "d", "system": "S"},
        {"prompt": [{"role": "system", "content": "S"}, user("c")], "response": [assistant("d")], "system": "S"},
        {"prompt": [user("a"), assistant("b")], "response": "d"},
    ]
    encoded, report = encode(rows, TextTemplate(), preset="prompt_response")
    assert texts(encoded, byte_bpe) == [("S\n\na\nb\n\nc\n", "d"), ("S\n\nc\n", "d")]
    assert dict(report.counts) == {"'prompt' ends with the assistant's turn": 1}
    for preset, row in (
        ("messages", {"messages": [user("p"), assistant("r")]}),
        ("alpaca", {"instruction": "p", "output": "r"}),
        ("gsm8k", {"question": "p", "answer": "r"}),
    ):
        late, early = ([row] * 150 + [{**row, "system": "S"}], [{**row, "system": "S"}] + [row] * 150)
        assert texts(encode(late, TextTemplate(), preset=preset)[0], byte_bpe)[-1] == ("S\n\np\n", "r")
        assert texts(encode(early, TextTemplate(), preset=preset)[0], byte_bpe)[0] == ("S\n\np\n", "r")


def test_text_that_is_no_unicode_is_counted_by_row(encode: Any) -> None:
    good = {"prompt": "a", "response": "b"}
    for bad in ({"prompt": "a \ud83d b", "response": "c"}, {"prompt": "a", "response": "\udc00"}):
        encoded, report = encode([*[good] * 30, bad], TextTemplate(), preset="prompt_response", max_rejected_share=0.05)
        assert len(encoded) == 30
        assert dict(report.counts) == {"text with half a surrogate pair": 1}
        with pytest.raises(UserError, match=r"half a surrogate pair \(first: .*rows\.jsonl line 9\)"):
            encode([*[good] * 8, bad], TextTemplate(), preset="prompt_response", max_rejected_share=0.05)


def test_a_missing_field_is_told_by_name_and_row(encode: Any, tmp_path: Any) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"prompt": "a",\n "response": "b"},\n {"prompt": "c"}]')
    with pytest.raises(UserError, match=r"1 field 'response' is missing \(first: .*rows\.json row 2\)"):
        encode([], TextTemplate(), preset="prompt_response", source=str(path), max_rejected_share=0.05)


def test_advice_names_the_limit_that_rejected(encode: Any) -> None:
    # One newline is the template's: 41 bytes and a newline.
    rows = [{"prompt": "a" * 41, "response": "b"}] * 3 + [{"prompt": "a", "response": "b"}]
    with pytest.raises(UserError, match=r"raise max_prompt_tokens \(now 8, the longest prompt has 42\)$"):
        encode(rows, TextTemplate(), preset="prompt_response", max_prompt_tokens=8, max_rejected_share=0.05)
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": ""}]
    with pytest.raises(UserError, match=r"repair them or raise max_rejected_share \(now 0\.05\)$"):
        encode(rows, TextTemplate(), preset="prompt_response", max_rejected_share=0.05)
    with pytest.raises(UserError, match="repair them, or choose another preset"):
        encode(rows[1:], TextTemplate(), preset="prompt_response", max_rejected_share=1.0)


def test_tags_that_the_prompt_ends_with_are_taught_once(encode: Any, byte_bpe: PreTrainedTokenizerFast) -> None:
    base = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}"
    for opening, answer, taught in (
        ("<assistant><think>\n", "<think>\nx\n</think>\nb", "x\n</think>\nb"),
        ("<assistant><think>\n", "<think>x</think>b", "x</think>b"),
        ("<assistant><think>\n", "b <think>", "b <think>"),
        ("<assistant><think>\n\n</think>\n\n", "<think>\n\n</think>\n\nb", "b"),
        ("<assistant>[THINK]", "[THINK] b", " b"),
        ("<assistant>", "<think>\nx\n</think>\nb", "<think>\nx\n</think>\nb"),
    ):
        template = ChatTemplate(base + opening.replace("\n", "{{ '\\n' }}") + "{% endif %}")
        encoded, _ = encode([{"messages": [user("q"), assistant(answer)]}], template)
        assert texts(encoded, byte_bpe) == [(f"<user>q{opening}", taught)]
    # The user's own last words are no opening.
    encoded, _ = encode([{"messages": [user("write <p>"), assistant("<p>x")]}], TextTemplate("{prompt}"))
    assert texts(encoded, byte_bpe) == [("write <p>", "<p>x")]
