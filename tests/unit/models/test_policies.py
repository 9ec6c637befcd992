from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dpr_lightning.demo.tokenizer import build_tokenizer
from dpr_lightning.errors import UserError
from dpr_lightning.functional.collate import collate
from dpr_lightning.manifest import write_directory
from dpr_lightning.models.backbone import BackboneConfig, check_lm_head
from dpr_lightning.models.policies import (
    CausalPolicy,
    FrozenPair,
    FrozenTeacher,
    check_same_vocabulary,
    find_frozen_pair,
    find_teacher,
    load_policy,
    scatter_tokens,
)

# Lengths 3+5, 9+1, 1+12, 6+4; the longest is 13, so windows of 4 end inside every row.
GENERATOR = torch.Generator().manual_seed(7)
PROMPTS = [torch.randint(3, 48, (length,), generator=GENERATOR).tolist() for length in (3, 9, 1, 6)]
RESPONSES = [torch.randint(3, 48, (length,), generator=GENERATOR).tolist() for length in (5, 1, 12, 4)]


def logp_one_by_one(model: PreTrainedModel) -> list[float]:
    """Independent of the policy: whole logits, whole log-softmax, one unpadded row at a time."""
    found: list[float] = []
    with torch.no_grad():
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
            ids = [*prompt, *response]
            logp_TV = model(torch.tensor([ids])).logits[0].float().log_softmax(dim=-1)
            found += [float(logp_TV[t - 1, ids[t]]) for t in range(len(prompt), len(ids))]
    return found


def small(**changes: object) -> dict[str, object]:
    return {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        **changes,
    }


@pytest.mark.parametrize("side", ["left", "right"])
def test_logp_is_the_models_own_on_either_padding_side(
    family: str, side: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_model(family)
    batch = collate(PROMPTS, RESPONSES, pad_id=0, side=side)  # type: ignore[arg-type]
    logp_N = CausalPolicy(model, chunk_size=5)(batch).logp_N
    # float32 attention over a padded rectangle sums in another order: rounding of logits of size ten.
    torch.testing.assert_close(logp_N.detach(), torch.tensor(logp_one_by_one(model)), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_are_counted_from_the_first_token(side: str) -> None:
    # Rotary positions hide a shift of the whole row; GPT-2's are absolute.
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)).eval()
    batch = collate(PROMPTS, RESPONSES, pad_id=0, side=side)  # type: ignore[arg-type]
    logp_N = CausalPolicy(model)(batch).logp_N
    torch.testing.assert_close(logp_N.detach(), torch.tensor(logp_one_by_one(model)), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_ids_are_inert(family: str, side: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    policy = CausalPolicy(tiny_model(family))
    first, second = (
        policy(collate(PROMPTS, RESPONSES, pad_id=pad_id, side=side)).logp_N  # type: ignore[arg-type]
        for pad_id in (0, 41)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (Gemma2ForCausalLM, Gemma2Config(**small(head_dim=8, final_logit_softcapping=2.0, sliding_window=4))),
        (CohereForCausalLM, CohereConfig(**small(logit_scale=0.25))),
        (GraniteForCausalLM, GraniteConfig(**small(logits_scaling=4.0))),
    ],
    ids=["gemma2", "cohere", "granite"],
)
def test_logp_includes_what_a_family_does_to_its_logits(model_class: type[PreTrainedModel], config: object) -> None:
    torch.manual_seed(0)
    model = model_class(config).eval()  # type: ignore[arg-type]
    check_lm_head(model)
    logp_N = CausalPolicy(model, chunk_size=5)(collate(PROMPTS, RESPONSES, pad_id=0)).logp_N
    torch.testing.assert_close(logp_N.detach(), torch.tensor(logp_one_by_one(model)), rtol=1e-5, atol=2e-5)


def test_entropy_and_logsumexp_are_those_of_the_whole_distribution(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model("qwen2")
    out = CausalPolicy(model, chunk_size=3)(collate(PROMPTS, RESPONSES, pad_id=0), with_entropy=True)
    assert out.entropy_N is not None
    start = 0
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits_TV = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].detach()
        part = slice(start, start + len(response))
        expected_N = torch.distributions.Categorical(logits=logits_TV).entropy()
        torch.testing.assert_close(out.entropy_N[part], expected_N, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.logsumexp_N[part], logits_TV.logsumexp(dim=-1), rtol=1e-5, atol=2e-5)
        start += len(response)


def test_gradient_is_that_of_whole_logits(tiny_model: Callable[..., PreTrainedModel]) -> None:
    models = [tiny_model("gemma3"), tiny_model("gemma3")]
    CausalPolicy(models[0], chunk_size=4)(collate(PROMPTS, RESPONSES, pad_id=0)).logp_N.sum().backward()
    total = torch.zeros(())
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        ids_BT = torch.tensor([[*prompt, *response]])
        logp_TV = models[1](ids_BT).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
        total = total + logp_TV.gather(1, torch.tensor(response)[:, None]).sum()
    total.backward()
    expected = dict(models[1].named_parameters())
    for name, parameter in models[0].named_parameters():
        # Sums of 22 tokens' gradients in another order, relative to the largest entry of each weight.
        scale = float(expected[name].grad.abs().max())  # type: ignore[union-attr]
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-5 * scale)


def test_a_row_without_response_adds_nothing(tiny_model: Callable[..., PreTrainedModel]) -> None:
    policy = CausalPolicy(tiny_model("mistral"))
    padded = policy(collate([*PROMPTS, []], [*RESPONSES, []], pad_id=0)).logp_N
    assert torch.equal(padded, policy(collate(PROMPTS, RESPONSES, pad_id=0)).logp_N)
    assert bool(torch.isfinite(padded).all())


def test_scatter_tokens_fills_row_by_row() -> None:
    mask_BT = torch.tensor([[False, True, True], [False, False, True]])
    values_N = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    out_BT = scatter_tokens(values_N, mask_BT)
    assert out_BT.tolist() == [[0.0, 1.0, 2.0], [0.0, 0.0, 3.0]]
    (out_BT * torch.tensor([[9.0, 4.0, 5.0], [9.0, 9.0, 6.0]])).sum().backward()
    assert values_N.grad is not None
    assert values_N.grad.tolist() == [4.0, 5.0, 6.0]


def test_a_frozen_policy_says_when_it_was_thawed(tiny_model: Callable[..., PreTrainedModel]) -> None:
    policy = CausalPolicy(tiny_model()).train()
    with pytest.raises(AssertionError, match="training mode"):
        policy.assert_frozen()
    assert policy.freeze() is policy
    policy.assert_frozen()
    policy.model.lm_head.train()
    with pytest.raises(AssertionError, match="training mode"):
        policy.assert_frozen()
    policy.freeze().model.lm_head.weight.requires_grad_(True)
    with pytest.raises(AssertionError, match="gradients on"):
        policy.assert_frozen()


def test_load_policy_checks_and_keeps_the_chunk_size(tiny_model_dir: Path) -> None:
    policy = load_policy(str(tiny_model_dir), BackboneConfig(name_or_path=str(tiny_model_dir)), chunk_size=17)
    assert policy.chunk_size == 17


def finish(path: Path, **manifest: object) -> Path:
    write_directory(path, lambda directory: None, manifest)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished SFT run with snapshots at 0.25 and 0.5."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("")
    finish(run / "final", step=8, data={"template": "t"})
    for alpha in ("0.25", "0.5"):
        finish(run / "reference" / f"alpha_{alpha}")
    return run


def test_find_frozen_pair_takes_the_runs_own_snapshot(run: Path) -> None:
    pair = find_frozen_pair(str(run), None)
    assert (pair.teacher, pair.reference) == (str(run / "final"), str(run / "reference" / "alpha_0.5"))
    assert pair.manifest is not None
    assert pair.manifest["data"] == {"template": "t"}
    assert find_frozen_pair(str(run), None, alpha=0.25).reference == str(run / "reference" / "alpha_0.25")
    assert find_frozen_pair(str(run), "org/other").reference == "org/other"


def test_find_frozen_pair_takes_several_references(run: Path) -> None:
    pair = find_frozen_pair(str(run), None, alpha=[0.25, 0.5])
    assert pair.references == tuple(str(run / "reference" / f"alpha_{alpha}") for alpha in ("0.25", "0.5"))
    assert find_frozen_pair("org/model", ["org/a", "org/b"]).references == ("org/a", "org/b")
    with pytest.raises(UserError, match=r"model\.alpha is 0\.3"):
        find_frozen_pair(str(run), None, alpha=[0.25, 0.3])
    for repeated in (["org/a", "org/a"], []):
        with pytest.raises(UserError, match=r"model\.reference: found .* one or more different references"):
            find_frozen_pair("org/model", repeated)


def test_find_teacher_needs_no_snapshot(run: Path) -> None:
    shutil.rmtree(run / "reference")
    found = find_teacher(str(run))
    assert found.teacher == str(run / "final")
    assert found.manifest is not None
    assert found.manifest["data"] == {"template": "t"}
    # One of our directories by itself, and another trainer's or a hub name.
    assert find_teacher(str(run / "final")).manifest == found.manifest
    assert find_teacher("org/model") == FrozenTeacher(teacher="org/model", manifest=None)
    (run / "final" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"without a finished 'final/' directory.*the same command goes on"):
        find_teacher(str(run))


def test_find_frozen_pair_refuses_an_unfinished_run(run: Path) -> None:
    (run / "final" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"without a finished 'final/' directory.*the same command goes on"):
        find_frozen_pair(str(run), None)


def test_find_frozen_pair_names_the_snapshots_that_exist(run: Path) -> None:
    with pytest.raises(UserError, match=r"model\.alpha is 0\.3, but .* holds alpha_0\.25, alpha_0\.5"):
        find_frozen_pair(str(run), None, alpha=0.3)
    for snapshot in ("alpha_0.25", "alpha_0.5"):
        (run / "reference" / snapshot / "manifest.json").unlink()
    with pytest.raises(UserError, match="holds none"):
        find_frozen_pair(str(run), None)


def test_a_teacher_that_is_no_run_needs_a_reference(tmp_path: Path, run: Path) -> None:
    with pytest.raises(UserError, match=r"is no directory here.*set model\.reference"):
        find_frozen_pair("org/model", None)
    with pytest.raises(UserError, match=r"is not a run of dpr-lightning.*set model\.reference"):
        find_frozen_pair(str(tmp_path / "run" / "final"), None)
    pair = find_frozen_pair("org/model", "org/half")
    assert (pair.teacher, pair.reference, pair.manifest) == ("org/model", "org/half", None)
    # One of our directories by itself keeps what its run recorded.
    named = find_frozen_pair(str(run / "final"), "org/half")
    assert named.manifest is not None
    assert named.manifest["step"] == 8


def save(
    path: Path, tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase, *, vocab_size: int
) -> str:
    tiny_model("llama", vocab_size=vocab_size).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_check_same_vocabulary(
    tmp_path: Path, tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    other = build_tokenizer(seed=1, num_documents=60)
    assert other.get_vocab() != tiny_tokenizer.get_vocab()
    teacher = save(tmp_path / "teacher", tiny_model, tiny_tokenizer, vocab_size=512)
    same = save(tmp_path / "same", tiny_model, tiny_tokenizer, vocab_size=512)
    retokenized = save(tmp_path / "retokenized", tiny_model, other, vocab_size=512)
    resized = save(tmp_path / "resized", tiny_model, tiny_tokenizer, vocab_size=520)
    config = BackboneConfig(name_or_path="unused")

    def check(reference: str) -> None:
        check_same_vocabulary(FrozenPair(teacher=teacher, references=(reference,), manifest=None), config)

    check(same)
    with pytest.raises(UserError, match="have different tokenizers"):
        check(retokenized)
    with pytest.raises(UserError, match=r"has a vocabulary of 512 and .* one of 520"):
        check(resized)
