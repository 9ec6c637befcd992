"""How the peers sample with transformers: ``generate``, and its continuous batching. Imported where they run."""

from __future__ import annotations

from typing import Any


def generate_responses(model: Any, prompts: list[list[int]], eos: int, max_new_tokens: int) -> list[list[int]]:
    """Return responses of one padded batch by ``model.generate``, at temperature 1, EOS included."""
    import torch

    width = max(map(len, prompts))
    input_BT = torch.tensor([[eos] * (width - len(ids)) + ids for ids in prompts], device=model.device)
    mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    with torch.no_grad():
        output_BT = model.generate(
            input_ids=input_BT, attention_mask=mask_BT, generation_config=_settings(eos, max_new_tokens)
        )
    rows = output_BT[:, width:].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def generate_batch_responses(
    model: Any,
    prompts: list[list[int]],
    eos: int,
    max_new_tokens: int,
    *,
    num_rows: int,
    seed: int,
    cache: dict[str, int],
) -> list[list[int]]:
    """Return responses by transformers' continuous batching, at most ``num_rows`` at a time.

    Args:
        model: A causal language model.
        prompts: Token ids.
        eos: What ends a response.
        max_new_tokens: Length limit.
        num_rows: Requests that run together.
        seed: Of the draws.
        cache: Further settings of ``ContinuousBatchingConfig``.

    Raises:
        RuntimeError: A prompt was not answered.
    """
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    if "page_size" in cache and "page_size" not in ContinuousBatchingConfig.__dataclass_fields__:
        # Its name before transformers 5.18.
        cache = {"block_size" if name == "page_size" else name: value for name, value in cache.items()}
    outputs = model.generate_batch(
        prompts,
        generation_config=_settings(eos, max_new_tokens),
        continuous_batching_config=ContinuousBatchingConfig(max_requests_per_batch=num_rows, seed=seed, **cache),
        progress_bar=False,
    )
    if len(outputs) != len(prompts):
        raise RuntimeError(f"generate_batch answered {len(outputs)} of {len(prompts)} prompts")
    return [output.generated_tokens for output in outputs.values()]


def _settings(eos: int, max_new_tokens: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos,
        pad_token_id=eos,
    )
