"""A whole on-policy iteration: sample, score with two frozen models, one optimizer step.

Ours is ``configs/recipe/algorithm1.yaml`` over ``dpr.yaml``. TRL's trainers get a reward function that returns
sum_t log pi_SFT - log pi_ref of the same two frozen models. "Plain" is Algorithm 1 written down in PyTorch. The same
prompts in the same order, samples of each, responses of a step and of a forward, length limit, AdamW and float32
weights. Nobody has a KL term or an old policy to compare with. Tokens are those trained on, of prompts and responses.
"""

from __future__ import annotations

from typing import Any

from benchmarks.gate import Gate
from benchmarks.generation import generate_responses
from benchmarks.inputs import load_model, read_shuffled

_LR = 5e-7


def ours(gate: Gate, settings: dict[str, Any]) -> None:
    """``dpr-lightning fit``."""
    from benchmarks.fit_gate import fit

    sequences = settings["prompts_per_step"] * settings["samples_per_prompt"]
    fit(
        "dpr",
        settings | {"overlays": ["configs/recipe/algorithm1.yaml"]},
        f"--model.backbone.name_or_path={settings['teacher']}",
        f"--model.teacher={settings['teacher']}",
        f"--model.reference={settings['reference']}",
        f"--data.demonstrations.source={settings['prompts']}",
        "--data.demonstrations.preset=prompt_response",
        f"--data.prompts_per_rollout={settings['prompts_per_step']}",
        f"--data.samples_per_prompt={settings['samples_per_prompt']}",
        f"--data.global_batch_size={sequences}",
        f"--data.micro_batch_size={settings['micro_batch_size']}",
        f"--data.sampling.max_new_tokens={settings['max_new_tokens']}",
        f"--data.sampling.batch_size={sequences}",
        f"--data.seed={settings['seed']}",
        "--trainer.max_epochs=10000",
        "--trainer.limit_val_batches=0",
    )


class FrozenPair:
    """log pi_SFT - log pi_ref of responses, summed, as a reward function of TRL's trainers has to compute it."""

    def __init__(self, gate: Gate, settings: dict[str, Any]) -> None:
        from transformers import AutoTokenizer

        self.gate = gate
        self.tokenizer: Any = AutoTokenizer.from_pretrained(settings["teacher"])
        self.models = [
            load_model(settings, settings[name], dtype=settings.get("frozen_dtype", "float32"))
            .requires_grad_(False)
            .eval()
            for name in ("teacher", "reference")
        ]
        self.size = 2 * settings["micro_batch_size"]
        """Rows of one forward: no gradients, so twice those of training, as ours."""

    def __call__(self, prompts: list[list[int]], responses: list[list[int]]) -> list[float]:
        """Return one figure a response, from token ids; rows are scored sorted by length."""
        import torch

        rewards = [0.0] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]) + len(responses[row]))
        for start in range(0, len(order), self.size):
            rows = order[start : start + self.size]
            batch = pad([prompts[row] for row in rows], [responses[row] for row in rows], self.tokenizer.eos_token_id)
            batch = tuple(tensor.to(self.models[0].device) for tensor in batch)
            with torch.no_grad():
                teacher_BT, reference_BT = (logprobs(model, batch) for model in self.models)
            for row, total in zip(rows, (teacher_BT - reference_BT).sum(dim=1).tolist(), strict=True):
                rewards[row] = total
        num_tokens = sum(map(len, responses))
        num_all = num_tokens + sum(map(len, prompts))
        self.gate.add(tokens=num_all, response_tokens=num_tokens, responses=len(responses))
        return rewards


def pad(prompts: list[list[int]], responses: list[list[int]], pad_id: int) -> tuple[Any, Any, Any]:
    """Return ids, attention mask and response mask [B, T], padded on the right."""
    import torch

    width = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
    ids_BT = torch.full((len(prompts), width), pad_id)
    mask_BT = torch.zeros_like(ids_BT)
    response_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        ids_BT[row, :end] = torch.tensor(prompt + response)
        mask_BT[row, :end] = 1
        response_BT[row, len(prompt) : end] = True
    return ids_BT, mask_BT, response_BT


def logprobs(model: Any, batch: tuple[Any, Any, Any]) -> Any:
    """Return [B, T - 1] log-probabilities of response tokens, 0 elsewhere; logits are made where one is needed."""
    ids_BT, mask_BT, response_BT = batch
    hidden_BTD = model.get_decoder()(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state
    wanted_BT = response_BT[:, 1:]
    logits_NV = model.lm_head(hidden_BTD[:, :-1][wanted_BT])
    logp_N = logits_NV.float().log_softmax(dim=-1).gather(1, ids_BT[:, 1:][wanted_BT][:, None]).squeeze(1)
    return logp_N.new_zeros(wanted_BT.shape).masked_scatter(wanted_BT, logp_N)


def _trl(gate: Gate, settings: dict[str, Any], name: str) -> None:
    import trl
    from datasets import Dataset

    from benchmarks.trl_gate import StepGate, common

    frozen = FrozenPair(gate, settings)

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        return frozen(frozen.tokenizer(prompts)["input_ids"], [list(ids) for ids in completion_ids])

    rows = read_shuffled(settings["prompts"], settings["seed"], 0, 0)
    sequences = settings["prompts_per_step"] * settings["samples_per_prompt"]
    arguments = {
        **common(settings),
        "per_device_train_batch_size": settings["micro_batch_size"],
        "gradient_accumulation_steps": sequences // settings["micro_batch_size"],
        "num_generations": settings["samples_per_prompt"],
        "max_completion_length": settings["max_new_tokens"],
        "learning_rate": _LR,
        "temperature": 1.0,
        "beta": 0.0,
        "shuffle_dataset": False,
    } | settings.get("more", {})
    trainer = getattr(trl, f"{name}Trainer")(
        model=load_model(settings, settings["teacher"]),
        reward_funcs=reward,
        args=getattr(trl, f"{name}Config")(**arguments),
        train_dataset=Dataset.from_list([{"prompt": f"{row['prompt']}\n"} for row in rows]),
        processing_class=frozen.tokenizer,
        callbacks=[StepGate(gate)],
    )
    trainer.train()


def grpo(gate: Gate, settings: dict[str, Any]) -> None:
    """TRL's GRPOTrainer."""
    _trl(gate, settings, "GRPO")


def rloo(gate: Gate, settings: dict[str, Any]) -> None:
    """TRL's RLOOTrainer."""
    _trl(gate, settings, "RLOO")


def plain(gate: Gate, settings: dict[str, Any]) -> None:
    """Algorithm 1: loss = -(1/B) sum_i sum_t log pi * G_t, G_t the sum of the dense reward from t on."""
    import torch

    frozen = FrozenPair(gate, settings)
    tokenizer, eos = frozen.tokenizer, frozen.tokenizer.eos_token_id
    policy = load_model(settings, settings["teacher"])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    rows = read_shuffled(settings["prompts"], settings["seed"], 0, 0)
    all_prompts: list[list[int]] = tokenizer([f"{row['prompt']}\n" for row in rows])["input_ids"]
    num_prompts = settings["prompts_per_step"]
    size = settings["micro_batch_size"]

    def work(number: int) -> None:
        torch.manual_seed(number)
        first = number * num_prompts % len(all_prompts)
        chosen = all_prompts[first : first + num_prompts]
        prompts = [prompt for prompt in chosen for _ in range(settings["samples_per_prompt"])]
        responses = generate_responses(policy, prompts, eos, settings["max_new_tokens"])
        num_tokens = sum(map(len, responses))
        gate.add(tokens=num_tokens + sum(map(len, prompts)), response_tokens=num_tokens)
        for start in range(0, len(prompts), size):
            batch = pad(prompts[start : start + size], responses[start : start + size], eos)
            with torch.no_grad():
                teacher_BT, reference_BT = (logprobs(model, batch) for model in frozen.models)
            reward_BT = teacher_BT - reference_BT
            return_BT = reward_BT.flip(1).cumsum(dim=1).flip(1)
            loss = -(logprobs(policy, batch) * return_BT).sum() / len(prompts)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    gate.serve(work)


CONTENDERS = {"ours": ours, "grpo": grpo, "rloo": rloo, "plain": plain}
