"""Rollouts as rectangles, and what three policies say of their tokens: one pass per policy, no autograd."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dpr_lightning.functional.collate import collate
from dpr_lightning.functional.kl import k3
from dpr_lightning.functional.logprobs import state_expectations, token_logprobs
from dpr_lightning.models.critic import ValueModel
from dpr_lightning.models.policies import CausalPolicy, scatter_tokens
from dpr_lightning.models.ragged import first_of_prompt
from dpr_lightning.rollout.sampler import Samples
from dpr_lightning.types import RolloutBatch, TokenBatch, TokenScores


def make_rollouts(
    prompts: Sequence[Sequence[int]], samples: Samples, prompt_index: Sequence[int], *, pad_id: int
) -> RolloutBatch:
    """Lay prompts and their samples out as one right-padded batch on the CPU.

    Args:
        prompts: Token ids that each sample continues.
        samples: One response for each prompt.
        prompt_index: Which training prompt each row answers.
        pad_id: Any valid id; masks come from lengths.
    """
    tokens = collate(prompts, samples.response_ids, pad_id=pad_id)
    logp_N = torch.tensor([value for row in samples.logp for value in row], dtype=torch.float32)
    return RolloutBatch(
        input_ids_BT=tokens.input_ids_BT,
        attention_mask_BT=tokens.attention_mask_BT,
        response_mask_BT=tokens.response_mask_BT,
        prompt_index_B=torch.tensor(list(prompt_index), dtype=torch.int64),
        is_truncated_B=torch.tensor(samples.is_truncated, dtype=torch.bool),
        sampler_logp_BT=scatter_tokens(logp_N, tokens.response_mask_BT),
    )


def trim(batch: TokenBatch, rows_B: Tensor) -> TokenBatch:
    """Return the named rows of a right-padded batch, without the columns that are padding in all of them."""
    width = int(batch.attention_mask_BT[rows_B].any(dim=0).nonzero().max()) + 1
    return TokenBatch(
        input_ids_BT=batch.input_ids_BT[rows_B, :width],
        attention_mask_BT=batch.attention_mask_BT[rows_B, :width],
        response_mask_BT=batch.response_mask_BT[rows_B, :width],
    )


def micro_batches(
    batch: TokenBatch, size: int, module: CausalPolicy | ValueModel
) -> Iterator[tuple[Tensor, TokenBatch]]:
    """Yield the rows of micro-batches of like length, and these, longest first; samples of a prompt stay together.

    Ranks of a sharded module forward together: one with fewer micro-batches than another repeats its last one.

    Args:
        batch: Right-padded, on any device.
        size: Rows of one forward.
        module: What the forwards are of.
    """
    length_B, first_B = batch.attention_mask_BT.sum(dim=1), first_of_prompt(batch)
    # Those of one prompt go where the longest of them goes, and share it where they meet in a forward.
    longest_B = length_B.new_zeros(len(length_B)).scatter_reduce_(0, first_B, length_B, "amax")[first_B]
    order_B = first_B.argsort(stable=True)
    order_B = order_B[longest_B[order_B].argsort(descending=True, stable=True)]
    chunks = order_B.split(size)
    for number in range(module.most(len(chunks))):
        rows_B = chunks[min(number, len(chunks) - 1)]
        yield rows_B, trim(batch, rows_B)


@torch.no_grad()
def score_tokens(
    batch: TokenBatch,
    *,
    actor: CausalPolicy,
    teacher: CausalPolicy,
    reference: CausalPolicy | Sequence[CausalPolicy],
    micro_batch_size: int,
    needs_values: bool = False,
    expectation_limits: tuple[float, float] | None = None,
    old_logp_BT: Tensor | None = None,
) -> TokenScores:
    """Score every response token of a right-padded batch under the three policies (ALGORITHM.md section 3, step 2).

    Rows are scored in micro-batches of like length on the policies' device; the result lies on the batch's own.

    Args:
        batch: Prompts and responses.
        actor: The policy that sampled, in any mode: its dropout is off by construction.
        teacher: pi_SFT, frozen.
        reference: pi_ref, frozen. Of several, log-probabilities (and values) are averaged, and with them the dense
            reward (ALGORITHM.md section 4).
        micro_batch_size: Rows of one forward.
        needs_values: Also return V = logsumexp of teacher and reference.
        expectation_limits: Also return the expectations that expected returns need, of the dense reward between these
            limits (minus and plus infinity for none).
        old_logp_BT: [B, T] float32 log pi_old where it is known already: the actor is not asked. The entropy at a
            state is then estimated by one sample, -log pi_old of the token chosen.

    Raises:
        ValueError: ``old_logp_BT`` comes with ``expectation_limits``, which need the actor's whole distribution.
    """
    if old_logp_BT is not None and expectation_limits is not None:
        raise ValueError("expectations over pi_old need the actor's own forward: leave old_logp_BT out")
    references = [reference] if isinstance(reference, CausalPolicy) else list(reference)
    for policy in (teacher, *references):
        policy.assert_frozen()
    device = actor.device
    fields = ["teacher_logp_BT", "reference_logp_BT"]
    fields += ["old_logp_BT", "old_entropy_BT"] if old_logp_BT is None else []
    fields += ["teacher_value_BT", "reference_value_BT"] if needs_values else []
    fields += ["teacher_kl_BT", "expected_dense_BT"] if expectation_limits is not None else []
    out = {name: torch.zeros(batch.input_ids_BT.shape, dtype=torch.float32) for name in fields}
    for rows_B, micro in micro_batches(batch, micro_batch_size, actor):
        asked = actor if old_logp_BT is None else None
        values = _score_micro_batch(micro.to(device), asked, teacher, references, needs_values, expectation_limits)
        for name, values_N in values.items():
            out[name][rows_B, : micro.input_ids_BT.shape[1]] = scatter_tokens(
                values_N.float().cpu(), micro.response_mask_BT
            )
    if old_logp_BT is not None:
        out |= {"old_logp_BT": old_logp_BT, "old_entropy_BT": -old_logp_BT}
    return TokenScores(response_mask_BT=batch.response_mask_BT, **out)


@torch.no_grad()
def policy_logprobs(
    batch: TokenBatch, policy: CausalPolicy, *, micro_batch_size: int, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return what one policy says of every response token of a right-padded batch.

    Rows are scored in micro-batches of like length on the policy's device; the result lies on the batch's own.

    Args:
        batch: Prompts and responses.
        policy: The policy to ask, in any mode: its dropout is off by construction.
        micro_batch_size: Rows of one forward.
        with_entropy: Also return the entropy of the policy at the state in which each token was chosen.

    Returns:
        [B, T] float32 log-probabilities, and [B, T] float32 entropies in nats or None; both 0 outside the response.
    """
    device = policy.device
    logp_BT = torch.zeros(batch.input_ids_BT.shape, dtype=torch.float32)
    entropy_BT = torch.zeros_like(logp_BT) if with_entropy else None
    for rows_B, micro in micro_batches(batch, micro_batch_size, policy):
        width = micro.input_ids_BT.shape[1]
        out = policy(micro.to(device), with_entropy=with_entropy)
        logp_BT[rows_B, :width] = scatter_tokens(out.logp_N.float().cpu(), micro.response_mask_BT)
        if entropy_BT is not None:
            entropy_BT[rows_B, :width] = scatter_tokens(out.entropy_N.float().cpu(), micro.response_mask_BT)
    return logp_BT, entropy_BT


@torch.no_grad()
def token_values(batch: TokenBatch, critic: ValueModel, *, micro_batch_size: int) -> Tensor:
    """Return [B, T] float32: a critic's value of the state in which each response token was chosen; 0 elsewhere.

    Rows are scored in micro-batches of like length on the critic's device; the result lies on the batch's own.

    Args:
        batch: Prompts and responses, right-padded.
        critic: The critic to ask.
        micro_batch_size: Rows of one forward.
    """
    value_BT = torch.zeros(batch.input_ids_BT.shape, dtype=torch.float32)
    for rows_B, micro in micro_batches(batch, micro_batch_size, critic):
        values_N = critic(micro.to(critic.device))
        value_BT[rows_B, : micro.input_ids_BT.shape[1]] = scatter_tokens(values_N.cpu(), micro.response_mask_BT)
    return value_BT


def _score_micro_batch(
    batch: TokenBatch,
    actor: CausalPolicy | None,
    teacher: CausalPolicy,
    references: Sequence[CausalPolicy],
    needs_values: bool,
    expectation_limits: tuple[float, float] | None,
) -> dict[str, Tensor]:
    """Return every wanted figure of the N response tokens of one micro-batch; None for the actor: it is not asked."""
    target_N = batch.input_ids_BT[batch.response_mask_BT]
    heads = []
    scores = []
    for policy in (*([] if actor is None else [actor]), teacher, *references):
        hidden_ND = policy.hidden_states(batch)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            head = policy.head(hidden_ND)
            scores.append(
                token_logprobs(hidden_ND, head, target_N, chunk_size=policy.chunk_size, with_entropy=policy is actor)
            )
        heads.append((hidden_ND, head))
    values: dict[str, Tensor] = {}
    if actor is not None:
        old = scores.pop(0)
        assert old.entropy_N is not None
        values |= {"old_logp_BT": old.logp_N, "old_entropy_BT": old.entropy_N}
    of_teacher, *of_references = scores
    values["teacher_logp_BT"] = of_teacher.logp_N
    values["reference_logp_BT"] = _mean([of_reference.logp_N for of_reference in of_references])
    if needs_values:
        values["teacher_value_BT"] = of_teacher.logsumexp_N
        values["reference_value_BT"] = _mean([of_reference.logsumexp_N for of_reference in of_references])
    if expectation_limits is not None:
        assert actor is not None, "refused by score_tokens"
        low, high = expectation_limits
        with torch.autocast(target_N.device.type, enabled=False):
            expected = state_expectations(*heads, low=low, high=high, chunk_size=actor.chunk_size)
        values |= {"teacher_kl_BT": expected.teacher_kl_N, "expected_dense_BT": expected.log_ratio_N}
    return values


def _mean(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(list(values)).mean(dim=0)


def describe_samples(
    rollouts: RolloutBatch, *, old_logp_BT: Tensor, teacher_logp_BT: Tensor, old_entropy_BT: Tensor
) -> Tensor:
    """Return [B, K] float64 sums of each response (and a maximum), in the order of ``SAMPLE_SUMS``: small to gather.

    Args:
        rollouts: The samples.
        old_logp_BT: [B, T] log-probabilities under the policy that sampled; 0 outside the response, like the others.
        teacher_logp_BT: [B, T] the same under the teacher.
        old_entropy_BT: [B, T] entropy of the policy that sampled, in nats.
    """
    mask_BT = rollouts.response_mask_BT
    gap_BT = torch.where(mask_BT, (old_logp_BT - rollouts.sampler_logp_BT).abs(), 0.0)
    tokens = {
        "length": mask_BT.double(),
        "truncated": (rollouts.is_truncated_B[:, None] & _is_first(mask_BT)).double(),
        "old_logp": old_logp_BT.double(),
        "teacher_logp": teacher_logp_BT.double(),
        "entropy": old_entropy_BT.double(),
        "sampler_gap": gap_BT.double(),
        "sampler_kl": torch.where(mask_BT, k3(rollouts.sampler_logp_BT.double(), old_logp_BT.double()), 0.0),
    }
    columns = {name: values_BT.sum(dim=1) for name, values_BT in tokens.items()}
    columns["sampler_gap_max"] = gap_BT.double().amax(dim=1)
    assert tuple(columns) == SAMPLE_SUMS
    return torch.stack(list(columns.values()), dim=1)


def describe_rollouts(rollouts: RolloutBatch, scores: TokenScores, reward_BT: Tensor, return_BT: Tensor) -> Tensor:
    """Return [B, K] float64 sums of each response, in the order of ``RESPONSE_SUMS``: small enough to gather."""
    samples_BK = describe_samples(
        rollouts,
        old_logp_BT=scores.old_logp_BT,
        teacher_logp_BT=scores.teacher_logp_BT,
        old_entropy_BT=scores.old_entropy_BT,
    )
    tokens = {
        "reward": reward_BT.double(),
        "reward_squared": reward_BT.double().square(),
        "return": return_BT.double(),
        "return_first": torch.where(_is_first(rollouts.response_mask_BT), return_BT, 0.0).double(),
        "reference_logp": scores.reference_logp_BT.double(),
    }
    assert SAMPLE_SUMS + tuple(tokens) == RESPONSE_SUMS
    rewards_BK = torch.stack([values_BT.sum(dim=1) for values_BT in tokens.values()], dim=1)
    return torch.cat([samples_BK, rewards_BK], dim=1)


def _is_first(mask_BT: Tensor) -> Tensor:
    return mask_BT & (mask_BT.cumsum(dim=1) == 1)


SAMPLE_SUMS = (
    *("length", "truncated", "old_logp", "teacher_logp", "entropy"),
    *("sampler_gap", "sampler_kl", "sampler_gap_max"),
)
RESPONSE_SUMS = (*SAMPLE_SUMS, "reward", "reward_squared", "return", "return_first", "reference_logp")


def sample_stats(sums_BK: Tensor) -> dict[str, float]:
    """Turn the gathered sums of all ranks' samples into figures by log key.

    ``policy/teacher_kl`` is nats per response, estimated by log pi_old - log pi_SFT on the samples; ``logp/*`` and the
    entropy are per token. ``rollout/sampler_*`` compare the sampler's log-probabilities of its tokens with the
    trainer's: the mean and the largest distance in nats, and the mean of k3 as an estimate of KL(sampler || trainer)
    per token.

    Args:
        sums_BK: Columns as in ``SAMPLE_SUMS``; further ones are left alone.
    """
    column = {name: sums_BK[:, index] for index, name in enumerate(SAMPLE_SUMS)}
    length_B, num_tokens = column["length"], column["length"].sum()
    token_mean = {name: float(values_B.sum() / num_tokens) for name, values_B in column.items()}
    return {
        "logp/old": token_mean["old_logp"],
        "logp/teacher": token_mean["teacher_logp"],
        "policy/entropy": token_mean["entropy"],
        "policy/teacher_kl": float((column["old_logp"] - column["teacher_logp"]).mean()),
        "response/length_mean": float(length_B.mean()),
        "response/length_max": float(length_B.max()),
        "response/truncated_share": float(column["truncated"].mean()),
        "rollout/num_responses": float(len(sums_BK)),
        "rollout/num_tokens": float(num_tokens),
        "rollout/sampler_gap": token_mean["sampler_gap"],
        "rollout/sampler_gap_max": float(column["sampler_gap_max"].max()),
        "rollout/sampler_kl": token_mean["sampler_kl"],
    }


def rollout_stats(sums_BK: Tensor) -> dict[str, float]:
    """Turn the gathered sums of all ranks' rewarded responses into figures by log key; see :func:`sample_stats`.

    ``reward/*`` is per token unless the key says ``sum``; ``reward/len_corr`` is Pearson's correlation between the
    summed reward of a response and its length, 0 where either is constant.
    """
    column = {name: sums_BK[:, index] for index, name in enumerate(RESPONSE_SUMS)}
    num_tokens = column["length"].sum()
    token_mean = {name: float(values_B.sum() / num_tokens) for name, values_B in column.items()}
    variance = max(token_mean["reward_squared"] - token_mean["reward"] ** 2, 0.0)
    return {
        "reward/mean": token_mean["reward"],
        "reward/std": variance**0.5,
        "reward/sum_mean": float(column["reward"].mean()),
        "reward/sum_std": float(column["reward"].std(correction=0)),
        "reward/len_corr": _correlation(column["reward"], column["length"]),
        "return/mean": token_mean["return"],
        "return/first_mean": float(column["return_first"].mean()),
        "logp/reference": token_mean["reference_logp"],
        **sample_stats(sums_BK),
    }


def _correlation(x_B: Tensor, y_B: Tensor) -> float:
    x_B, y_B = x_B - x_B.mean(), y_B - y_B.mean()
    scale = float(x_B.norm() * y_B.norm())
    return float(x_B @ y_B) / scale if scale > 0 else 0.0
