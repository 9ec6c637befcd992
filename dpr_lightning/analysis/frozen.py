"""The teacher and its references, found before anything loads, and what they say of responses, one in memory at a time.

Shapes: B responses, T positions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dpr_lightning.data.ends import response_end, response_ends
from dpr_lightning.data.templates import ChatTemplate, PromptTemplate, TextTemplate, template_from_manifest
from dpr_lightning.errors import UserError
from dpr_lightning.manifest import is_complete
from dpr_lightning.models.backbone import BackboneConfig, load_tokenizer
from dpr_lightning.models.policies import CausalPolicy, check_same_vocabulary, find_frozen_pair, load_policy
from dpr_lightning.rollout.sampler import Samples
from dpr_lightning.rollout.scoring import policy_logprobs, score_tokens
from dpr_lightning.rollout.transformers_sampler import TransformersSampler
from dpr_lightning.types import SamplingConfig, TokenBatch

_CHUNK_SIZE = 256
"""Tokens whose logits over the vocabulary exist at one time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenPolicies:
    """Where a teacher and its references lie, and how responses to it are written; no weights."""

    teacher: str
    """Transformers directory or hub name of pi_SFT."""
    references: dict[str, str]
    """The same of each pi_ref, by alpha as text, or by the name that the user gave."""
    manifest: dict[str, Any] | None
    """Manifest of a teacher of ours; None for another trainer's."""
    tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate
    backbone: BackboneConfig
    """How weights are loaded."""
    device: str
    micro_batch_size: int
    """Responses of one forward."""

    def load(self, name_or_path: str) -> CausalPolicy:
        """Return one of the policies, frozen, on the device."""
        policy = load_policy(name_or_path, self.backbone, chunk_size=_CHUNK_SIZE).freeze()
        policy.to(self.device)
        return policy

    @property
    def eos_token_id(self) -> int:
        """The id that closes a demonstrated response."""
        return response_end(self.tokenizer, self.template)


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that :func:`policies_from_arguments` reads."""
    group = parser.add_argument_group("policies")
    group.add_argument("--teacher", required=True, help="SFT run, or a transformers directory or hub name with it")
    references = group.add_mutually_exclusive_group()
    references.add_argument("--reference", help="transformers directory or hub name; needed if --teacher is no run")
    references.add_argument("--alpha", type=float, nargs="+", help="snapshots of the run; all of them if left out")
    group.add_argument("--chat", action="store_true", help="use the tokenizer's chat template; a run brings its own")
    group.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="type of the weights")
    group.add_argument("--revision", help="branch, tag or commit of a model on the hub")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.add_argument("--micro_batch_size", type=int, default=32, help="responses of one scoring forward")


def policies_from_arguments(parsed: argparse.Namespace) -> FrozenPolicies:
    """Return the policies that the command line names; see :func:`find_policies`."""
    return find_policies(
        parsed.teacher,
        reference=parsed.reference,
        alphas=parsed.alpha,
        use_chat_template=parsed.chat,
        dtype=parsed.dtype,
        device=parsed.device,
        micro_batch_size=parsed.micro_batch_size,
        revision=parsed.revision,
    )


def find_policies(
    teacher: str,
    *,
    reference: str | None = None,
    alphas: Sequence[float] | None = None,
    use_chat_template: bool = False,
    dtype: str = "float32",
    device: str = "cpu",
    micro_batch_size: int = 32,
    revision: str | None = None,
) -> FrozenPolicies:
    """Find a teacher and its references, and check that they speak of the same tokens; no weights are loaded.

    Args:
        teacher: SFT run of ours, or a transformers directory or hub name.
        reference: The reference; None takes snapshots of the run.
        alphas: Which snapshots; None takes every one.
        use_chat_template: Render prompts with the tokenizer's chat template instead of plain text. A run's manifest
            names the template that it was trained with, which is then the only one allowed.
        dtype: Type of the weights.
        device: Where torch computes.
        micro_batch_size: Responses of one scoring forward.
        revision: Of models on the hub; None is the one that an adapter records, or the hub's default.

    Raises:
        UserError: Something is missing, unfinished or does not fit together.
    """
    if micro_batch_size < 1:
        raise UserError(f"--micro_batch_size: found {micro_batch_size}; give a whole number of at least 1")
    check_device(device)
    backbone = BackboneConfig(name_or_path=teacher, dtype=dtype, revision=revision)  # type: ignore[arg-type]
    try:
        references = _references(teacher, reference, alphas)
        pairs = {name: find_frozen_pair(teacher, path) for name, path in references.items()}
        for pair in pairs.values():
            check_same_vocabulary(pair, backbone)
    except UserError as error:
        # The same refusals as DPR's, whose keys are model.teacher and so on; here they are flags.
        raise UserError(str(error).replace("model.", "--")) from error
    pair = next(iter(pairs.values()))
    tokenizer = load_tokenizer(pair.teacher, backbone)
    template = taught_template(pair.manifest, use_chat_template=use_chat_template)
    template.check(tokenizer)
    return FrozenPolicies(
        teacher=pair.teacher,
        references={name: pair.reference for name, pair in pairs.items()},
        manifest=pair.manifest,
        tokenizer=tokenizer,
        template=template,
        backbone=backbone,
        device=device,
        micro_batch_size=micro_batch_size,
    )


def _references(teacher: str, reference: str | None, alphas: Sequence[float] | None) -> dict[str, str]:
    """Return the path of every reference that is asked for, by its name."""
    if reference is not None:
        return {Path(reference).name.removeprefix("alpha_"): reference}
    found = sorted(path for path in (Path(teacher) / "reference").glob("alpha_*") if is_complete(path))
    if alphas is None and found:
        return {path.name.removeprefix("alpha_"): str(path) for path in found}
    # What is not there is refused by the function that knows best how to word it.
    return {f"{alpha:g}": find_frozen_pair(teacher, None, alpha=alpha).reference for alpha in alphas or [0.5]}


def check_device(device: str) -> None:
    """Refuse a device that torch does not have.

    Raises:
        UserError: Naming ``--device``.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise UserError(f"--device: '{device}' cannot be used here; give cpu, or a device that torch has") from error


def taught_template(manifest: dict[str, Any] | None, *, use_chat_template: bool) -> PromptTemplate:
    """Return the template that a model of ours was trained with; for another's, plain text or the tokenizer's chat.

    Raises:
        UserError: ``--chat`` contradicts the training.
    """
    recorded = (manifest or {}).get("data")
    if not recorded:
        return ChatTemplate() if use_chat_template else TextTemplate()
    taught = template_from_manifest(recorded["template"])
    if use_chat_template and taught != ChatTemplate():
        raise UserError(f"--chat: the model was trained with {taught}; leave it out")
    return taught


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredResponses:
    """What teacher and references say of each response token; all 0 outside the responses."""

    response_mask_BT: Tensor
    """[B, T] bool, True on response tokens."""
    teacher_logp_BT: Tensor
    """[B, T] float32, log pi_SFT."""
    teacher_entropy_BT: Tensor
    """[B, T] float32, nats, entropy of pi_SFT where the token was chosen."""
    reference_logp_BT: dict[str, Tensor]
    """[B, T] float32, log pi_ref, by name of the reference."""
    expected_dense_BT: dict[str, Tensor]
    """[B, T] float32, exact expectation of r_hat over pi_SFT at that state, by name; empty unless asked for."""

    @property
    def lengths(self) -> Tensor:
        """[B] int64, tokens of each response, EOS included."""
        return self.response_mask_BT.sum(dim=1)

    def dense(self, name: str) -> Tensor:
        """Return [B, T] float32, r_hat against the reference called ``name``."""
        return self.teacher_logp_BT - self.reference_logp_BT[name]


def score_responses(
    policies: FrozenPolicies,
    tokens: TokenBatch,
    *,
    teacher: CausalPolicy | None = None,
    with_expectations: bool = False,
) -> ScoredResponses:
    """Ask the teacher and every reference about right-padded responses.

    One policy's weights are in memory at a time, two where expectations are asked for. The result takes four bytes for
    each position and policy.

    Args:
        policies: Whom to ask.
        tokens: Prompts and responses, on the CPU.
        teacher: The teacher, where it is loaded already.
        with_expectations: Also return the expectation of r_hat at every state.
    """
    teacher = teacher or policies.load(policies.teacher)
    size = policies.micro_batch_size
    teacher_logp_BT, entropy_BT = policy_logprobs(tokens, teacher, micro_batch_size=size, with_entropy=True)
    assert entropy_BT is not None
    reference_logp_BT, expected_BT = {}, {}
    if not with_expectations:
        del teacher
    # disable=None: a bar on a terminal only.
    for name, path in tqdm(policies.references.items(), desc="references", disable=None, leave=False):
        reference = policies.load(path)
        if not with_expectations:
            reference_logp_BT[name] = policy_logprobs(tokens, reference, micro_batch_size=size)[0]
            continue
        limits = (-float("inf"), float("inf"))
        scores = score_tokens(
            tokens,
            actor=teacher,
            teacher=teacher,
            reference=reference,
            micro_batch_size=size,
            expectation_limits=limits,
        )
        assert scores.expected_dense_BT is not None
        reference_logp_BT[name], expected_BT[name] = scores.reference_logp_BT, scores.expected_dense_BT
    return ScoredResponses(
        response_mask_BT=tokens.response_mask_BT,
        teacher_logp_BT=teacher_logp_BT,
        teacher_entropy_BT=entropy_BT,
        reference_logp_BT=reference_logp_BT,
        expected_dense_BT=expected_BT,
    )


def sample_teacher(
    policies: FrozenPolicies,
    teacher: CausalPolicy,
    prompt_ids: Sequence[Sequence[int]],
    *,
    sampling: SamplingConfig,
    num_samples: int,
    seed: int,
) -> Samples:
    """Draw ``num_samples`` adjacent responses of the teacher to each prompt.

    Args:
        policies: Whose the teacher is.
        teacher: Loaded.
        prompt_ids: Token ids of the prompts.
        sampling: Length limit, temperature and batch size.
        num_samples: Responses of each prompt.
        seed: The same seed gives the same responses.
    """
    repeated = [ids for ids in prompt_ids for _ in range(num_samples)]
    with tqdm(total=len(repeated), desc="samples of the teacher", disable=None, leave=False) as bar:
        return TransformersSampler().sample(
            teacher.model,
            repeated,
            config=sampling,
            eos_token_id=response_ends(policies.tokenizer, policies.template, teacher.model.generation_config),
            seed=seed,
            on_progress=bar.update,
        )
