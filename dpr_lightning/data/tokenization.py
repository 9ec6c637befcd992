r"""From text to token ids, the same for SFT, rollouts and evaluation.

Rules:

- Prompt and response are encoded apart and joined as ids. A rollout continues the ids of the prompt, so SFT must too.
- A prompt begins with what the tokenizer itself puts before a text (BOS, or nothing), found by encoding a probe:
  having a ``bos_token`` is no sign of using one. A chat template that spells BOS out does not double it. What a
  tokenizer would put *after* a text (EOS) never ends a prompt.
- SentencePiece-like tokenizers put a dummy space before a text, which a continuation must not have. There "\n" is
  put before the response and its ids are taken off again; where they are no prefix of the whole (the newline merged
  with what follows), the text is encoded by itself.
- Text of users is text: "<|endoftext|>" in a demonstration becomes ordinary tokens and can neither end a response
  nor open a chat turn.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from dpr_lightning.data.chats import Message
from dpr_lightning.data.prompt_template import Tools
from dpr_lightning.data.templates import PromptTemplate, TemplateRefusalError, special_strings
from dpr_lightning.errors import UserError

_SENTINEL = "\n"
_PROBES = ("a", "0", "A")


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate,
    conversations: Sequence[Sequence[Message]],
    tools: Sequence[Tools] | None = None,
) -> list[list[int]]:
    """Return the ids of each prompt, from BOS (where the tokenizer uses one) to where the response begins.

    Args:
        tokenizer: Any tokenizer of transformers.
        template: Renders messages as text; :meth:`PromptTemplate.check` has passed.
        conversations: Messages of each prompt, none empty.
        tools: Functions of each, for the template.

    Raises:
        TemplateRefusalError: The template does not render one of them.
    """
    found = try_encode_prompts(tokenizer, template, conversations, tools)
    for ids in found:
        if isinstance(ids, TemplateRefusalError):
            raise ids
    return [ids for ids in found if not isinstance(ids, TemplateRefusalError)]


def try_encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate,
    conversations: Sequence[Sequence[Message]],
    tools: Sequence[Tools] | None = None,
) -> list[list[int] | TemplateRefusalError]:
    """Return the ids of each prompt, or why the template does not render it.

    Args:
        tokenizer: Any tokenizer of transformers.
        template: Renders messages as text.
        conversations: Messages of each prompt, none empty.
        tools: Functions of each, for the template.
    """
    prefix = default_prefix(tokenizer)
    if template.writes_control_tokens:
        chats = _encode_chats(tokenizer, template, conversations, tools or [None] * len(conversations))
        for i, ids in enumerate(chats):
            if not isinstance(ids, TemplateRefusalError) and ids[: len(prefix)] != prefix:
                chats[i] = prefix + ids
        return chats
    texts = [template.render(tokenizer, messages) for messages in conversations]
    return [prefix + ids for ids in encode_plain(tokenizer, texts)]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, template: PromptTemplate, messages: Sequence[Message]
) -> list[int]:
    """Return the ids of one prompt; see :func:`encode_prompts`."""
    return encode_prompts(tokenizer, template, [messages])[0]


def encode_responses(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each response as the continuation of a prompt, without EOS."""
    if not texts or not _has_dummy_prefix(tokenizer):
        return encode_plain(tokenizer, texts)
    sentinel = encode_plain(tokenizer, [_SENTINEL])[0]
    continued = encode_plain(tokenizer, [_SENTINEL + text for text in texts])
    merged = [i for i, ids in enumerate(continued) if ids[: len(sentinel)] != sentinel]
    responses = [ids[len(sentinel) :] for ids in continued]
    for i, ids in zip(merged, encode_plain(tokenizer, [texts[i] for i in merged]), strict=True):
        responses[i] = ids
    return responses


def encode_response(tokenizer: PreTrainedTokenizerBase, text: str, *, max_tokens: int) -> tuple[list[int], bool]:
    """Return the ids of one response with its EOS, and whether it is complete; see :func:`finish_response`."""
    return finish_response(encode_responses(tokenizer, [text])[0], eos_id=eos_id(tokenizer), max_tokens=max_tokens)


def finish_response(ids: list[int], *, eos_id: int, max_tokens: int) -> tuple[list[int], bool]:
    """Close a response with EOS, or cut it to ``max_tokens`` ids without one: a cut response does not end there.

    Returns:
        The ids, and True where the response is complete.
    """
    if len(ids) < max_tokens:
        return [*ids, eos_id], True
    return ids[:max_tokens], False


def encode_plain(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text alone: nothing added, special tokens not recognised."""
    return _encode(tokenizer, texts, split_special_tokens=True)


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the tokenizer's EOS.

    Raises:
        UserError: The tokenizer has none.
    """
    token_id = tokenizer.eos_token_id
    if not isinstance(token_id, int):
        raise UserError(
            f"tokenizer of {tokenizer.name_or_path or 'this model'}: it has no EOS token, so no response could end; "
            "set eos_token in its tokenizer_config.json"
        )
    return token_id


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return an id to fill padding with: the tokenizer's own, else EOS. Masks never depend on it."""
    token_id = tokenizer.pad_token_id
    return token_id if isinstance(token_id, int) else eos_id(tokenizer)


def default_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that the tokenizer puts before a text when it encodes one by default."""
    for probe in _PROBES:
        plain = encode_plain(tokenizer, [probe])[0]
        full = _encode(tokenizer, [probe], split_special_tokens=True, add_special_tokens=True)[0]
        for start in range(len(full) - len(plain) + 1):
            if plain and full[start : start + len(plain)] == plain:
                return full[:start]
    raise UserError(
        f"tokenizer of {tokenizer.name_or_path or 'this model'}: it gives no ids for {', '.join(_PROBES)}; "
        "its vocabulary or normalizer is broken"
    )


def with_template(tokenizer: PreTrainedTokenizerBase, template: PromptTemplate) -> PreTrainedTokenizerBase:
    """Return a copy of a tokenizer whose chat template gives the prompts of ``template``, for others to use.

    ``apply_chat_template`` of one prompt then gives the ids of :func:`encode_prompt`, but for text of users that spells
    out special tokens, which stays text only here.
    """
    prefix = default_prefix(tokenizer)
    text = "".join(str(token) for token in tokenizer.convert_ids_to_tokens(prefix))
    own = template.to_jinja(tokenizer, prefix=text)
    copied = copy.deepcopy(tokenizer)
    if own is not None:
        copied.chat_template = own
    return copied


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that plain text must never become; the unknown token is not one of them unless it is EOS too."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    unknown = {tokenizer.unk_token_id} - named
    return frozenset(i for i in (added | named | set(tokenizer.all_special_ids)) - unknown if isinstance(i, int))


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return a pattern that finds the text of special tokens; it captures what it finds."""
    # Longest first, so that "<s>x" is found before "<s>".
    strings = sorted(special_strings(tokenizer), key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, strings)) + ")") if strings else re.compile("(?!)()")


def _has_dummy_prefix(tokenizer: PreTrainedTokenizerBase) -> bool:
    sentinel = encode_plain(tokenizer, [_SENTINEL])[0]
    alone = encode_plain(tokenizer, _PROBES)
    continued = encode_plain(tokenizer, [_SENTINEL + probe for probe in _PROBES])
    return any(ids != [*sentinel, *probe] for ids, probe in zip(continued, alone, strict=True))


def _encode_chats(
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate,
    conversations: Sequence[Sequence[Message]],
    tools: Sequence[Tools],
) -> list[list[int] | TemplateRefusalError]:
    """Encode rendered chats, control tokens of the template recognised, those in users' text not."""
    pattern = special_pattern(tokenizer)
    encoded: list[list[int] | TemplateRefusalError] = [[] for _ in conversations]
    clean: dict[int, str] = {}
    for i, (messages, functions) in enumerate(zip(conversations, tools, strict=True)):
        try:
            if any(pattern.search(message["content"]) for message in messages):
                encoded[i] = _encode_hostile_chat(tokenizer, template, messages, functions, pattern)
            else:
                clean[i] = template.render(tokenizer, messages, functions)
        except TemplateRefusalError as refusal:
            encoded[i] = refusal
    for i, ids in zip(clean, _encode(tokenizer, list(clean.values()), split_special_tokens=False), strict=True):
        encoded[i] = ids
    return encoded


def _encode_hostile_chat(
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate,
    messages: Sequence[Message],
    tools: Tools,
    pattern: re.Pattern[str],
) -> list[int]:
    """Encode one chat whose messages spell special tokens out.

    Each is replaced by a private-use mark before the template is rendered; the text around the marks is encoded with
    control tokens recognised, and what a mark stands for is encoded without.
    """
    # Arranged first: system text that moves into a later message would change the order of the marks.
    messages = template.arrange(tokenizer, messages)
    mark = "\ue000"
    while any(mark in message["content"] for message in messages):
        mark += "\ue001"
    found: list[str] = []

    def hide(match: re.Match[str]) -> str:
        found.append(match.group(0))
        return mark

    hidden = [{**message, "content": pattern.sub(hide, message["content"])} for message in messages]
    # A template may write messages in another order or twice; then marks could not be told apart by their order.
    pieces = template.render(tokenizer, hidden, tools).split(mark)
    if len(pieces) != len(found) + 1:
        raise TemplateRefusalError(
            f"data.template: the chat template drops or repeats a message that spells {found[0]!r}; remove it there",
            reason="special token spelt out in a message that the chat template drops or repeats",
        )
    ids = _encode(tokenizer, [pieces[0]], split_special_tokens=False)[0]
    for literal, piece in zip(found, pieces[1:], strict=True):
        ids = ids + encode_plain(tokenizer, [literal])[0]
        ids = ids + _encode(tokenizer, [piece], split_special_tokens=False)[0]
    return ids


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    split_special_tokens: bool,
    add_special_tokens: bool = False,
) -> list[list[int]]:
    if not texts:
        return []
    encoded: list[list[int]] = tokenizer(
        list(texts),
        add_special_tokens=add_special_tokens,
        split_special_tokens=split_special_tokens,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    return encoded
