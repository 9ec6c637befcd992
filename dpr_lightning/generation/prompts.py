"""From the rows of a file to the ids that a model continues: what training does, and nothing beside it."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from dpr_lightning.data.chats import Message
from dpr_lightning.data.encoding import prompt_objection
from dpr_lightning.data.entries import Entry
from dpr_lightning.data.templates import PromptTemplate, TemplateRefusalError
from dpr_lightning.data.tokenization import special_pattern, try_encode_prompts
from dpr_lightning.errors import UserError


def conversation(entry: Entry, answers: Sequence[str]) -> list[Message]:
    """Return the messages of an entry up to the turn after ``answers``, which is unanswered."""
    messages = list(entry.item.messages)
    for answer, turn in zip(answers, entry.turns[1 : len(answers) + 1], strict=True):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
    return messages


def encode_first_turns(
    entries: Sequence[Entry], tokenizer: PreTrainedTokenizerBase, template: PromptTemplate
) -> list[list[int]]:
    """Return the ids of the first prompt of every entry.

    Raises:
        UserError: A row cannot be given to the model as training would give it; names the row.
    """
    special = special_pattern(tokenizer)
    for entry in entries:
        if reason := prompt_objection(tokenizer, template, entry.item, special):
            raise UserError(f"{entry.where}: {reason}; repair or delete the row")
    tools = [entry.item.tools for entry in entries]
    # Later turns are tried with a stand-in for the answers, before weights load.
    whole = [conversation(entry, ["answer"] * (len(entry.turns) - 1)) for entry in entries]
    several = [number for number, entry in enumerate(entries) if len(entry.turns) > 1]
    first = try_encode_prompts(tokenizer, template, [conversation(entry, []) for entry in entries], tools)
    later = try_encode_prompts(
        tokenizer, template, [whole[number] for number in several], [tools[number] for number in several]
    )
    for number, ids in [*enumerate(first), *zip(several, later, strict=True)]:
        if isinstance(ids, TemplateRefusalError):
            raise UserError(f"{entries[number].where}: {ids}; repair or delete the row") from ids
    return [ids for ids in first if not isinstance(ids, TemplateRefusalError)]
