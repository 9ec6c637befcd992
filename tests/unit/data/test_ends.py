from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import GenerationConfig, PreTrainedTokenizerFast

from dpr_lightning.data.demonstrations import DemonstrationConfig, load_demonstrations
from dpr_lightning.data.encoding import Reason, encode_table
from dpr_lightning.data.ends import decode_response, response_end, response_ends
from dpr_lightning.data.templates import ChatTemplate, TextTemplate

TURN = "{% for m in messages %}{% if m['role'] == 'assistant' %}"
REST = "{% else %}[{{ m['content'] }}]{% endif %}{% endfor %}"
TEMPLATES = {
    # What each family's template writes around an assistant's message, and the token that ends it.
    "chatml": (TURN + "{{ m['content'] }}<|im_end|>\n" + REST, "<|im_end|>"),
    "llama 2": (TURN + " {{ m['content'] }} {{ eos_token }}" + REST, "<|endoftext|>"),
    "phi 3": (TURN + "{{ m['content'] }}<|end|>\n" + REST + "{{ eos_token }}", "<|end|>"),
    "gemma": (TURN + "{{ m['content'] | trim }}<end_of_turn>\n" + REST, "<end_of_turn>"),
    "longest token": (TURN + "{{ m['content'] }}<|end|>x\n" + REST, "<|end|>x"),
    "nothing": (TURN + "{{ m['content'] }}" + REST, "<|endoftext|>"),
    "words": (TURN + "{{ m['content'] }}\n\n[END]" + REST, "<|endoftext|>"),
    "refuses": ("{% if messages | length > 1 %}{{ raise_exception('one at a time') }}{% endif %}x", "<|endoftext|>"),
}


@pytest.fixture
def chat(byte_bpe: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Ends of several families, one of them no special token."""
    byte_bpe.add_tokens([AddedToken("<|end|>", special=True), AddedToken("<end_of_turn>", special=False)])
    byte_bpe.add_tokens([AddedToken("<|end|>x", special=True)])
    return byte_bpe


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_the_end_is_what_the_template_writes_after_an_answer(name: str, chat: PreTrainedTokenizerFast) -> None:
    source, token = TEMPLATES[name]
    expected = chat.convert_tokens_to_ids(token)
    assert response_end(chat, ChatTemplate(chat_template=source)) == expected
    chat.chat_template = source
    assert response_end(chat, ChatTemplate()) == expected


def test_plain_text_ends_with_the_tokenizers_eos(chat: PreTrainedTokenizerFast) -> None:
    assert response_end(chat, TextTemplate()) == response_end(chat, None) == chat.eos_token_id


def test_sampling_stops_at_every_declared_end(chat: PreTrainedTokenizerFast) -> None:
    eos, turn = chat.eos_token_id, chat.convert_tokens_to_ids("<|im_end|>")
    assert response_ends(chat, TextTemplate()) == eos
    assert response_ends(chat, TextTemplate(), GenerationConfig(eos_token_id=eos)) == eos
    assert response_ends(chat, TextTemplate(), GenerationConfig(eos_token_id=[0, 2])) == [eos, 0, 2]
    # The taught one first, none twice.
    declared = GenerationConfig(eos_token_id=[eos, turn, 7])
    assert response_ends(chat, ChatTemplate(), declared) == [turn, eos, 7]


@pytest.mark.parametrize("name", ["chatml", "gemma"])
def test_demonstrations_teach_the_templates_end(name: str, chat: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source, token = TEMPLATES[name]
    path = tmp_path / "rows.jsonl"
    answers = ["hell", "hell" * 20, f"he{token}he"]
    path.write_text("".join(json.dumps({"prompt": "a", "response": text}) + "\n" for text in answers))
    config = DemonstrationConfig(source=str(path), preset="prompt_response", max_response_tokens=8)
    (table,) = load_demonstrations(config).values()
    template = ChatTemplate(chat_template=source)
    encoded, report = encode_table(
        table, tokenizer=chat, template=template, config=config, split="train", refuse_rejected=False
    )
    end = chat.convert_tokens_to_ids(token)
    hell = chat.convert_tokens_to_ids("hell")
    assert encoded.response_ids(0) == [hell, end]
    assert encoded.response_ids(1) == [hell] * 8
    # An answer that spells the end keeps it as text, or, where the tokenizer cannot, is left out.
    if name == "chatml":
        assert encoded.response_ids(2).count(end) <= 1
    else:
        assert report.counts[Reason.SPECIAL_IDS] == 1
        assert len(encoded) == 2


def test_text_is_decoded_without_its_end(chat: PreTrainedTokenizerFast) -> None:
    end, hell = (chat.convert_tokens_to_ids(token) for token in ("<end_of_turn>", "hell"))
    assert decode_response(chat, [hell, end], [end, 0]) == "hell"
    assert decode_response(chat, [hell, end, hell], end) == "hell<end_of_turn>hell"
    assert decode_response(chat, [], end) == ""
