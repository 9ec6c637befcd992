"""A policy's answers to held-out prompts, verified: accuracy, length and truncation at several temperatures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

from dpr_lightning.data.ends import response_ends
from dpr_lightning.evaluation.verifiers import Verifier
from dpr_lightning.models.backbone import BackboneConfig, load_model, load_tokenizer
from dpr_lightning.rollout.sampler import Samples
from dpr_lightning.rollout.transformers_sampler import TransformersSampler
from dpr_lightning.types import SamplingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Verified answers of one policy at one temperature: P prompts, S samples of each."""

    is_correct_PS: npt.NDArray[np.bool_]
    """[P, S]."""
    num_tokens_PS: npt.NDArray[np.int64]
    """[P, S] length of each response, EOS included."""
    is_truncated_PS: npt.NDArray[np.bool_]
    """[P, S] True where the length limit came before EOS."""


def verify(
    samples: Samples,
    rows: Sequence[Mapping[str, Any]],
    *,
    verifier: Verifier,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
) -> Answers:
    """Judge samples that lie prompt by prompt; a truncated response is wrong whatever it says.

    Args:
        samples: ``num_samples`` adjacent responses for each row.
        rows: The prompts' rows.
        verifier: Judges text.
        tokenizer: Decodes the ids.
        num_samples: Responses of each prompt.
    """
    # An end need not be a special token.
    ids = [ids if cut else ids[:-1] for ids, cut in zip(samples.response_ids, samples.is_truncated, strict=True)]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    verdicts = [
        not is_truncated and verifier(rows[index // num_samples], text)
        for index, (text, is_truncated) in enumerate(zip(texts, samples.is_truncated, strict=True))
    ]
    shape = (len(rows), num_samples)
    return Answers(
        is_correct_PS=np.array(verdicts, dtype=np.bool_).reshape(shape),
        num_tokens_PS=np.array([len(ids) for ids in samples.response_ids], dtype=np.int64).reshape(shape),
        is_truncated_PS=np.array(samples.is_truncated, dtype=np.bool_).reshape(shape),
    )


def answer(
    model_dir: Path,
    prompt_ids: Sequence[Sequence[int]],
    rows: Sequence[Mapping[str, Any]],
    *,
    verifier: Verifier,
    sampling: SamplingConfig,
    temperatures: Sequence[float],
    num_samples: int,
    seed: int,
    on_progress: Callable[[int], object] | None = None,
    device: str = "cpu",
) -> dict[float, Answers]:
    """Let the model in ``model_dir`` answer every prompt at every temperature; temperature 0 takes one sample.

    Args:
        model_dir: A transformers directory.
        prompt_ids: Token ids of P prompts, as SFT encoded them.
        rows: Their rows, for the verifier.
        verifier: Judges each answer.
        sampling: Length limit and batch size; the temperature is replaced.
        temperatures: Where to sample.
        num_samples: Responses of each prompt above temperature 0.
        seed: The same for every policy that is compared.
        on_progress: Called with the number of responses finished since the last call.
        device: Where the model runs.
    """
    backbone = BackboneConfig(name_or_path=str(model_dir))
    model = load_model(str(model_dir), backbone).eval()
    model.to(torch.device(device))
    tokenizer = load_tokenizer(str(model_dir), backbone)
    ends = response_ends(tokenizer, None, model.generation_config)
    answers = {}
    for temperature in temperatures:
        repeats = num_samples if temperature > 0 else 1
        samples = TransformersSampler().sample(
            model,
            [ids for ids in prompt_ids for _ in range(repeats)],
            config=dataclasses.replace(sampling, temperature=temperature),
            eos_token_id=ends,
            seed=seed,
            on_progress=on_progress,
        )
        answers[temperature] = verify(samples, rows, verifier=verifier, tokenizer=tokenizer, num_samples=repeats)
    return answers
