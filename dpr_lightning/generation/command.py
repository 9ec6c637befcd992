"""``dpr-lightning generate``: responses of a checkpoint to the prompts of a file."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpr_lightning.analysis.frozen import check_device, taught_template
from dpr_lightning.data.ends import decode_response, response_ends
from dpr_lightning.data.entries import Entry, read_entries, recorded_columns
from dpr_lightning.data.templates import PromptTemplate
from dpr_lightning.data.tokenization import encode_prompts
from dpr_lightning.errors import UserError
from dpr_lightning.generation.parts import Parts
from dpr_lightning.generation.plan import MT_BENCH_TEMPERATURES, Block, plan_blocks, temperatures_of
from dpr_lightning.generation.prompts import conversation, encode_first_turns
from dpr_lightning.manifest import environment, now, read_manifest, tokenizer_fingerprint, weights_fingerprint
from dpr_lightning.models.backbone import BackboneConfig, check_token_ids, load_config, load_model, load_tokenizer
from dpr_lightning.models.policies import FrozenTeacher, find_teacher
from dpr_lightning.models.positions import check_row_length
from dpr_lightning.rollout.transformers_sampler import TransformersSampler
from dpr_lightning.terminal import make_console
from dpr_lightning.types import SamplingConfig

_BATCHES_A_BLOCK = 4
"""Batches that are written to disk together: what a killed run loses at most, and what is sorted by length."""


def main(args: Sequence[str] | None = None) -> None:
    """Answer every prompt of a file; a killed run goes on where it stopped."""
    parser = argparse.ArgumentParser(prog="dpr-lightning generate", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="run, transformers or adapter directory, or hub name")
    parser.add_argument(
        "--prompts", required=True, help="file or hub data set with prompt, instruction, question or turns"
    )
    parser.add_argument("--out", type=Path, required=True, help="file of responses: .jsonl, or .json for one array")
    parser.add_argument("--limit", type=int, help="answer the first prompts only")
    parser.add_argument("--name", help="what the model is called in the rows; its run's name if left out")
    group = parser.add_argument_group("decoding")
    group.add_argument("--temperature", type=float, default=0.7, help="0 takes the most likely token")
    group.add_argument("--top_p", type=float, default=1.0)
    group.add_argument("--top_k", type=int, default=0)
    group.add_argument("--max_new_tokens", type=int, default=1024, help="longest response, of each turn")
    group.add_argument("--num_samples", type=int, default=1, help="responses to each prompt; one at temperature 0")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument(
        "--category_temperatures",
        help="'mt_bench' for FastChat's, or a JSON object such as '{\"math\": 0}': temperature by category",
    )
    group = parser.add_argument_group("model")
    group.add_argument("--chat", action="store_true", help="use the tokenizer's chat template; a run brings its own")
    group.add_argument("--template_of", help="directory whose recorded prompt template is used in place of the model's")
    group.add_argument("--revision", help="branch, tag or commit of a model on the hub")
    group.add_argument("--batch_size", type=int, default=64, help="prompts decoded together")
    group.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="type of the weights")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parsed = parser.parse_args(args)
    generate(parsed, make_console(160))


@dataclass(frozen=True, slots=True, kw_only=True)
class Generator:
    """A model that answers, and how."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate
    sampling: SamplingConfig
    seed: int

    def answer(self, number: int, block: Block, entries: Sequence[Entry], bar: Any) -> list[dict[str, Any]]:
        """Return what was answered to each task of a block, turn by turn, each turn seeing the answers before it.

        Args:
            number: The block's place in the plan; with the seed it decides what is drawn.
            block: What to answer.
            entries: All prompts.
            bar: Is moved on by every response.
        """
        tokenizer = self.tokenizer
        ends = response_ends(tokenizer, self.template, self.model.generation_config)
        found: list[dict[str, Any]] = [{"responses": [], "num_tokens": [], "is_truncated": []} for _ in block.tasks]
        turns = [entries[task.entry].turns for task in block.tasks]
        config = dataclasses.replace(self.sampling, temperature=block.temperature)
        for turn in range(max(map(len, turns))):
            rows = [row for row, said in enumerate(turns) if turn < len(said)]
            asked = [entries[block.tasks[row].entry] for row in rows]
            prompts = [conversation(entry, found[row]["responses"]) for entry, row in zip(asked, rows, strict=True)]
            samples = TransformersSampler().sample(
                self.model,
                encode_prompts(tokenizer, self.template, prompts, [entry.item.tools for entry in asked]),
                config=config,
                eos_token_id=ends,
                seed=int(np.random.SeedSequence([self.seed, number, turn]).generate_state(1)[0]),
                on_progress=bar.update,
            )
            texts = [decode_response(tokenizer, ids, ends) for ids in samples.response_ids]
            for row, text, ids, is_truncated in zip(
                rows, texts, samples.response_ids, samples.is_truncated, strict=True
            ):
                found[row]["responses"].append(text)
                found[row]["num_tokens"].append(len(ids))
                found[row]["is_truncated"].append(is_truncated)
        return found


def generate(parsed: argparse.Namespace, console: Console) -> None:
    """Answer the prompts of ``--prompts`` into ``--out``, unless that was done before.

    Raises:
        UserError: An argument, a row or the file that is there already does not fit.
    """
    sampling = _sampling(parsed)
    check_device(parsed.device)
    try:
        found = find_teacher(parsed.model)
    except UserError as error:
        raise UserError(str(error).replace("model.teacher", "--model")) from error
    backbone = BackboneConfig(name_or_path=found.teacher, dtype=parsed.dtype, revision=parsed.revision)
    manifest = found.manifest if parsed.template_of is None else read_manifest(Path(parsed.template_of))
    entries = read_entries(parsed.prompts, key="--prompts", with_answers=False, columns=recorded_columns(manifest))
    if parsed.limit is not None:
        entries = entries[: parsed.limit]
    temperatures = temperatures_of(entries, parsed.temperature, _by_category(parsed.category_temperatures))
    tokenizer = load_tokenizer(found.teacher, backbone)
    template = taught_template(manifest, use_chat_template=parsed.chat)
    template.check(tokenizer)
    first = encode_first_turns(entries, tokenizer, template)
    blocks = plan_blocks(
        [len(ids) for ids in first],
        temperatures,
        num_samples=parsed.num_samples,
        block_size=_BATCHES_A_BLOCK * sampling.batch_size,
    )
    settings = _settings(parsed, sampling, found, tokenizer, template, entries)
    for note, count in Counter(note for entry in entries for note in entry.item.notes).items():
        console.print(f"{count} of {len(entries)} rows: {note}", highlight=False, markup=False, soft_wrap=True)
    parts = Parts(parsed.out, settings)
    if parts.is_complete:
        console.print(f"'{parsed.out}' is complete", highlight=False, markup=False, soft_wrap=True)
        return
    check_token_ids(max(max(ids) for ids in first), load_config(found.teacher, backbone), "the tokenizer")
    num_beyond = _beyond_positions(found, backbone, [len(ids) for ids in first], sampling.max_new_tokens)
    if num_beyond:
        console.print(
            f"{num_beyond} of {len(first)} prompts and their longest answers are beyond the positions that the model "
            "was trained on: those answers may be worthless",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    start = time.perf_counter()
    num_drawn = _draw(parsed, parts, blocks, entries, found, backbone, tokenizer, template, sampling)
    seconds = time.perf_counter() - start
    rows = _ordered(parts.rows(len(blocks)))
    counts = {
        "rows": len(rows),
        "truncated": sum(row["is_truncated"] for row in rows),
        "empty": sum(not text.strip() for row in rows for text in _texts(row)),
        "tokens": sum(row["num_tokens"] for row in rows),
        "prompts_beyond_positions": num_beyond,
    }
    parts.finish(rows, {"kind": "responses", **counts, "created": now(), "environment": environment()})
    rate = f", {num_drawn / seconds:.0f} tokens/s" if num_drawn else ""
    console.print(
        f"{counts['rows']} responses, {counts['tokens'] / counts['rows']:.1f} tokens on average{rate}; "
        f"{counts['truncated']} cut off at {sampling.max_new_tokens} tokens, {counts['empty']} empty: {parsed.out}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _beyond_positions(
    found: FrozenTeacher, backbone: BackboneConfig, lengths: Sequence[int], max_new_tokens: int
) -> int:
    """Return how many prompts leave less room than an answer may take (of the first turn)."""
    config = load_config(found.teacher, backbone)
    check_row_length(max(lengths, default=0) + max_new_tokens, config, "--max_new_tokens")
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return 0 if limit is None else sum(length + max_new_tokens > limit for length in lengths)


def _draw(
    parsed: argparse.Namespace,
    parts: Parts,
    blocks: Sequence[Block],
    entries: Sequence[Entry],
    found: FrozenTeacher,
    backbone: BackboneConfig,
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate,
    sampling: SamplingConfig,
) -> int:
    """Write every block that is missing; return how many tokens were drawn."""
    missing = [number for number in range(len(blocks)) if not parts.has(number)]
    if not missing:
        return 0
    model = load_model(found.teacher, backbone).eval()
    model.to(torch.device(parsed.device))
    generator = Generator(model=model, tokenizer=tokenizer, template=template, sampling=sampling, seed=parsed.seed)
    num_turns = {number: sum(len(entries[task.entry].turns) for task in blocks[number].tasks) for number in missing}
    shared = {
        "generator": parsed.name or _name(parsed.model),
        "model_fingerprint": parts.settings["model"],
        "decoding": {name: getattr(sampling, name) for name in ("top_p", "top_k", "max_new_tokens", "batch_size")},
    }
    num_drawn = 0
    # disable=None: a bar on a terminal only.
    with tqdm(total=sum(num_turns.values()), desc="responses", disable=None, leave=False) as bar:
        for number in missing:
            block = blocks[number]
            answers = generator.answer(number, block, entries, bar)
            rows = [
                _row(entries[task.entry], task.entry, task.sample, answer, block.temperature, parsed.seed, shared)
                for task, answer in zip(block.tasks, answers, strict=True)
            ]
            num_drawn += sum(row["num_tokens"] for row in rows)
            parts.write(number, rows)
    return num_drawn


def _row(
    entry: Entry,
    place: int,
    sample: int,
    answer: Mapping[str, Any],
    temperature: float,
    seed: int,
    shared: Mapping[str, Any],
) -> dict[str, Any]:
    """Return one row of the output: readable by ``judge``, AlpacaEval's tools (output, generator) and verifiers."""
    is_single = len(entry.turns) == 1
    responses = answer["responses"]
    row: dict[str, Any] = {"row": place, "sample": sample}
    row |= {} if entry.id is None else {"id": entry.id}
    row |= {} if entry.category is None else {"category": entry.category}
    if is_single:
        row |= {"instruction": entry.prompt, "output": responses[0]}
    return row | {
        **_prompt_columns(entry),
        "response": responses[0] if is_single else responses,
        "num_tokens": sum(answer["num_tokens"]),
        "is_truncated": any(answer["is_truncated"]),
        **shared,
        "decoding": {**shared["decoding"], "temperature": temperature, "seed": seed},
        "source": dict(entry.row),
    }


def _prompt_columns(entry: Entry) -> dict[str, Any]:
    """Return the prompt in columns that are read as the same prompt again."""
    *before, last = entry.item.messages
    tools = {} if entry.item.tools is None else {"tools": list(entry.item.tools)}
    if len(entry.item.messages) > 2 or last["role"] != "user" or any(turn["role"] != "system" for turn in before):
        return {"prompt": list(entry.item.messages), **tools}
    system = {"system": before[0]["content"]} if before else {}
    return {"prompt": entry.turns[0] if len(entry.turns) == 1 else list(entry.turns), **system, **tools}


def _ordered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: (row["row"], row["sample"]))


def _texts(row: Mapping[str, Any]) -> list[str]:
    found = row["response"]
    return [found] if isinstance(found, str) else list(found)


def _settings(
    parsed: argparse.Namespace,
    sampling: SamplingConfig,
    found: FrozenTeacher,
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate,
    entries: Sequence[Entry],
) -> dict[str, Any]:
    """Return all that the rows depend on, as plain JSON values."""
    read = [[dict(entry.row), entry.item.messages, entry.turns, entry.item.tools] for entry in entries]
    text = json.dumps(read, sort_keys=True, default=str)
    values = {
        "prompts": hashlib.sha256(text.encode()).hexdigest()[:16],
        "num_prompts": len(entries),
        "model": weights_fingerprint(found.teacher),
        "name": parsed.name or _name(parsed.model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "template": template.to_manifest(),
        "category_temperatures": _by_category(parsed.category_temperatures),
        **dataclasses.asdict(sampling),
        **{name: getattr(parsed, name) for name in ("num_samples", "seed", "dtype", "device")},
    }
    if parsed.revision is not None:
        values["revision"] = parsed.revision
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def _sampling(parsed: argparse.Namespace) -> SamplingConfig:
    for name, smallest in (("limit", 1), ("num_samples", 1), ("seed", 0)):
        value = getattr(parsed, name)
        if value is not None and value < smallest:
            raise UserError(f"--{name}: found {value}; give a whole number of at least {smallest}")
    names = ("temperature", "top_p", "top_k", "max_new_tokens", "batch_size")
    try:
        return SamplingConfig(**{name: getattr(parsed, name) for name in names})
    except ValueError as error:
        raise UserError(f"--{error}; change it") from error


def _by_category(text: str | None) -> dict[str, float] | None:
    if text is None or text == "mt_bench":
        return None if text is None else dict(MT_BENCH_TEMPERATURES)
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    is_number = isinstance(found, dict) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 for value in found.values()
    )
    if not is_number:
        raise UserError(
            f"--category_temperatures: found {text!r}; give 'mt_bench', or a JSON object of temperatures by category"
        )
    return {str(name): float(value) for name, value in found.items()}


def _name(model: str) -> str:
    """Return what to call a model: the run's directory where it is one's final weights."""
    path = Path(model)
    return path.parent.name if path.name == "final" else path.name
