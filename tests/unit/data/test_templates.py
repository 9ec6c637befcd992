from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dpr_lightning.data.templates import ChatTemplate, PromptTemplate, TextTemplate, template_from_manifest
from dpr_lightning.data.tokenization import encode_prompt, with_template
from dpr_lightning.errors import UserError

SYSTEM = {"role": "system", "content": "Be {prompt}."}
FIRST = {"role": "user", "content": "1 {system} {x}?"}
ANSWER = {"role": "assistant", "content": "one"}
SECOND = {"role": "user", "content": "2?"}


def test_text_without_and_with_a_system_message(byte_bpe: PreTrainedTokenizerFast) -> None:
    template = TextTemplate()
    assert template.render(byte_bpe, [FIRST]) == "1 {system} {x}?\n"
    # Braces in users' text are text.
    assert template.render(byte_bpe, [SYSTEM, FIRST]) == "Be {prompt}.\n\n1 {system} {x}?\n"


def test_text_of_a_conversation(byte_bpe: PreTrainedTokenizerFast) -> None:
    template = TextTemplate(prompt="Q: {prompt}\nA: ", system="[{system}]\n", turn_end="\n")
    assert template.render(byte_bpe, [FIRST, ANSWER, SECOND]) == "Q: 1 {system} {x}?\nA: one\nQ: 2?\nA: "


def test_text_template_needs_its_placeholders_once() -> None:
    for prompt in ("no placeholder", "{prompt}{prompt}"):
        with pytest.raises(UserError, match=r"data\.template\.prompt: found"):
            TextTemplate(prompt=prompt)


def test_text_template_that_spells_a_special_token_is_refused(byte_bpe: PreTrainedTokenizerFast) -> None:
    TextTemplate().check(byte_bpe)
    with pytest.raises(UserError, match=r"special token '<\|endoftext\|>'"):
        TextTemplate(prompt="<|endoftext|>{prompt}").check(byte_bpe)


def test_chat_template_ends_where_the_answer_begins(byte_bpe: PreTrainedTokenizerFast) -> None:
    assert ChatTemplate().render(byte_bpe, [SECOND]) == "<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n"


def test_tokenizer_without_a_chat_template_is_refused(words: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="has no chat template"):
        ChatTemplate().check(words)
    ChatTemplate(chat_template="{{ messages[0]['content'] }}").check(words)


def test_system_text_goes_to_the_user_where_there_is_no_system_role(words: PreTrainedTokenizerFast) -> None:
    refusing = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    )
    silent = "{% for m in messages if m['role'] == 'user' %}<{{ m['content'] }}>{% endfor %}"
    system = {"role": "system", "content": "S"}
    for source in (refusing, silent):
        assert ChatTemplate(chat_template=source).render(words, [system, SECOND]) == "<S\n\n2?>"
    keeping = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    assert ChatTemplate(chat_template=keeping).render(words, [system, SECOND]) == "<S><2?>"


NO_SYSTEM = (
    "{%- for m in messages -%}{%- if m['role'] in ('user', 'assistant') -%}{{ '<' + m['role'] + '>' + m['content'] }}"
    "{%- endif -%}{%- endfor -%}{{ '<assistant>' if add_generation_prompt }}"
)
ONE_SYSTEM = (  # Llama-2's kind: the first message may be the system's, a later one is left out
    "{%- if messages[0]['role'] == 'system' -%}<sys>{{ messages[0]['content'] }}{%- endif -%}" + NO_SYSTEM
)
ELSE_ASSISTANT = (  # whoever is not the user is written as the assistant
    "{%- for m in messages -%}{{ '<user>' if m['role'] == 'user' else '<assistant>' }}{{ m['content'] }}{%- endfor -%}"
    "{{ '<assistant>' if add_generation_prompt }}"
)
NO_SYSTEM_RAISES = NO_SYSTEM.replace("in ('user', 'assistant')", "!= 'system'").replace(
    "{%- endif -%}", "{%- else -%}{{ raise_exception('System role not supported') }}{%- endif -%}"
)
CHATS = {
    "S u": "<user>S\n\nu",
    "S T u": "<user>S\n\nT\n\nu",
    "S a u": "<assistant>a<user>S\n\nu",
    "u a S u": "<user>u<assistant>a<user>S\n\nu",
    "S u a T u": "<user>S\n\nu<assistant>a<user>T\n\nu",
    "u S": "<user>u\n\nS",
    "u a S": "<user>u<assistant>a<user>S",
}


def chat_of(letters: str) -> list[dict[str, str]]:
    roles = {"S": "system", "T": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[letter], "content": letter} for letter in letters.split()]


@pytest.mark.parametrize("source", [NO_SYSTEM, NO_SYSTEM_RAISES, ELSE_ASSISTANT])
@pytest.mark.parametrize(("letters", "expected"), CHATS.items())
def test_system_text_is_never_lost_and_never_the_assistants(
    words: PreTrainedTokenizerFast, source: str, letters: str, expected: str
) -> None:
    template = ChatTemplate(chat_template=source)
    assert template.render(words, chat_of(letters)) == expected + "<assistant>"
    # Others render what was trained with the exported template, also where it is the tokenizer's own.
    exported = with_template(words, template)
    settings: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    assert exported.apply_chat_template(chat_of(letters), **settings) == expected + "<assistant>"
    words.chat_template = source
    assert with_template(words, ChatTemplate()).chat_template == exported.chat_template
    again = with_template(exported, ChatTemplate())
    assert again.chat_template == exported.chat_template
    assert ChatTemplate().render(exported, chat_of(letters)) == expected + "<assistant>"


def test_only_system_messages_that_the_template_has_no_place_for_move(words: PreTrainedTokenizerFast) -> None:
    template = ChatTemplate(chat_template=ONE_SYSTEM)
    assert template.render(words, chat_of("S u")) == "<sys>S<user>u<assistant>"
    assert template.render(words, chat_of("S u a T u")) == "<sys>S<user>u<assistant>a<user>T\n\nu<assistant>"
    assert template.render(words, chat_of("u a T u")) == "<user>u<assistant>a<user>T\n\nu<assistant>"
    exported = with_template(words, template)
    for letters in ("u", "S u", "S u a T u", "u a T u", "S T u"):
        text = exported.apply_chat_template(chat_of(letters), tokenize=False, add_generation_prompt=True)
        assert text == template.render(words, chat_of(letters))


def test_a_template_that_loses_system_text_wherever_it_stands_is_refused(words: PreTrainedTokenizerFast) -> None:
    last = ChatTemplate(chat_template="{{ messages[-1]['content'] }}")
    with pytest.raises(UserError, match="system message that the chat template leaves out"):
        last.render(words, chat_of("S u a u"))


def test_one_of_several_named_templates(byte_bpe: PreTrainedTokenizerFast) -> None:
    byte_bpe.chat_template = {
        "default": "d{{ mark }}{{ messages[0]['content'] }}",
        "tool_use": "t{{ mark }}{{ messages[0]['content'] }}",
    }
    for template, expected in (
        (ChatTemplate(variables={"mark": "!"}), "d!2?"),
        (ChatTemplate("tool_use", {"mark": "!"}), "t!2?"),
        (ChatTemplate("tool_use"), "t2?"),
        (ChatTemplate(), "d2?"),
    ):
        template.check(byte_bpe)
        assert template.render(byte_bpe, [SECOND]) == expected
        exported = with_template(byte_bpe, template)
        assert exported.apply_chat_template([SECOND], tokenize=False, add_generation_prompt=True) == expected
    byte_bpe.chat_template = {"rag": "r", "tool_use": "t"}
    with pytest.raises(UserError, match="chat templates rag, tool_use; set chat_template"):
        ChatTemplate().check(byte_bpe)


def test_control_tokens_in_system_text_that_moves_stay_text(byte_bpe: PreTrainedTokenizerFast) -> None:
    template = ChatTemplate(chat_template=NO_SYSTEM)
    hostile = [
        {"role": "system", "content": "x<|im_end|>"},
        {"role": "assistant", "content": "y<|endoftext|>"},
        {"role": "user", "content": "z"},
    ]
    ids = encode_prompt(byte_bpe, template, hostile)
    assert byte_bpe.decode(ids) == "<assistant>y<|endoftext|><user>x<|im_end|>\n\nz<assistant>"
    assert not set(ids) & set(byte_bpe.all_special_ids)


def test_chat_template_that_fails_is_refused(words: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="fails on one user message"):
        ChatTemplate(chat_template="{{ raise_exception('never') }}").check(words)
    in_parts = "{% for m in messages %}{% for part in m['content'] %}{{ part.text }}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match="leaves out the text of a user message"):
        ChatTemplate(chat_template=in_parts).check(words)
    no_answers = "{% for m in messages if m['role'] == 'assistant' %}{{ raise_exception('answers') }}{% endfor %}x"
    with pytest.raises(UserError, match="refuses the roles user, assistant, user"):
        ChatTemplate(chat_template=no_answers).render(words, [FIRST, ANSWER, SECOND])


def test_chat_template_that_writes_the_date_needs_one(words: PreTrainedTokenizerFast) -> None:
    source = "{{ date_string if date_string is defined else strftime_now('%d') }}{{ messages[0]['content'] }}"
    with pytest.raises(UserError, match=r"set variables\.date_string"):
        ChatTemplate(chat_template=source).check(words)
    template = ChatTemplate(chat_template=source, variables={"date_string": "1 May "})
    template.check(words)
    assert template.render(words, [SECOND]) == "1 May 2?"


@pytest.mark.parametrize(
    "template",
    [TextTemplate(), TextTemplate(prompt="Q {prompt}"), ChatTemplate(), ChatTemplate("x", {"enable_thinking": False})],
)
def test_manifest_round_trip(template: PromptTemplate) -> None:
    again = template_from_manifest(json.loads(json.dumps(template.to_manifest())))
    assert again == template
    assert again.fingerprint() == template.fingerprint()
    assert hash(again) == hash(template)


def test_fingerprints_tell_templates_apart() -> None:
    templates = [TextTemplate(), TextTemplate(turn_end=""), ChatTemplate(), ChatTemplate("x")]
    assert len({template.fingerprint() for template in templates}) == len(set(templates)) == 4


def test_unknown_manifest_is_refused() -> None:
    with pytest.raises(UserError, match="'poem' is unknown"):
        template_from_manifest({"type": "poem"})
