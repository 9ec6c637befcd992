"""Policies: a causal language model seen as log pi(a|s), and the frozen teacher and reference that runs start from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from dpr_lightning.errors import UserError
from dpr_lightning.functional.logprobs import LMHead, TokenLogprobs, token_logprobs
from dpr_lightning.manifest import is_complete, read_manifest, tokenizer_fingerprint
from dpr_lightning.models import ragged
from dpr_lightning.models.adapters import (
    ACTOR,
    adapter_parameters,
    adapter_updates,
    add_adapter,
    find_source,
    load_adapter,
    train_only,
    using,
)
from dpr_lightning.models.backbone import (
    BackboneConfig,
    check_lm_head,
    check_token_ids,
    lm_head,
    load_config,
    load_model,
    load_tokenizer,
    locate,
    of_base,
)
from dpr_lightning.models.location import suggestion
from dpr_lightning.models.parallel import most, shard
from dpr_lightning.paths import exists, is_directory, is_file
from dpr_lightning.types import TokenBatch


class CausalPolicy(nn.Module):
    """Log-probabilities of response tokens under one causal language model.

    Args:
        model: A transformers causal language model; its dropout is expected to be off.
        chunk_size: Response tokens in one tile of logits, which are 2**22 (16 MiB in float32) whatever V.
    """

    def __init__(self, model: PreTrainedModel, *, chunk_size: int = 1024) -> None:
        super().__init__()
        ragged.enable(model)
        self.model = model
        self.chunk_size = chunk_size
        self._device: torch.device | None = None

    @property
    def device(self) -> torch.device:
        """Where forwards run. Weights may lie elsewhere: sharded ones that the host keeps."""
        return self._device if self._device is not None else self.model.device

    def shard(self, mesh: DeviceMesh, *, compute_dtype: torch.dtype | None, offload: bool = False) -> None:
        """Shard the weights over ranks, in place; see :func:`dpr_lightning.models.parallel.shard`."""
        shard(self, self.model, mesh, compute_dtype=compute_dtype, offload=offload)
        is_cuda = mesh.device_type == "cuda"
        self._device = torch.device("cuda", torch.cuda.current_device()) if is_cuda else torch.device(mesh.device_type)

    def most(self, count: int) -> int:
        """Return how many forwards this rank must make where it needs ``count``: see ``parallel.most``."""
        return most(self, count, self.device)

    def hidden_states(self, batch: TokenBatch) -> Tensor:
        """Return [N, D]: the last hidden state before each response token, in row-major order of the response mask."""
        return self._hidden_states(batch)

    def _hidden_states(self, batch: TokenBatch) -> Tensor:
        # ``forward`` and ``hidden_states`` both gather a sharded policy's weights; nested, the inner one would reshard
        # them before the backward.
        return states_before_tokens(self.model.get_decoder(), batch)

    def head(self, hidden_ND: Tensor) -> LMHead:
        """Return the output layer in the type of ``hidden_ND``, which under autocast is not the weights' own."""
        return lm_head(self.model, dtype=hidden_ND.dtype)

    def forward(self, batch: TokenBatch, *, with_entropy: bool = False) -> TokenLogprobs:
        """Return log-probability, logsumexp and (on request) entropy of the N response tokens of ``batch``."""
        hidden_ND = self._hidden_states(batch)
        target_N = batch.input_ids_BT[batch.response_mask_BT]
        with torch.autocast(hidden_ND.device.type, enabled=False):
            return token_logprobs(
                hidden_ND, self.head(hidden_ND), target_N, chunk_size=self.chunk_size, with_entropy=with_entropy
            )

    def freeze(self) -> CausalPolicy:
        """Turn gradients off and eval mode on, for good; ``assert_frozen`` holds it to that."""
        self.requires_grad_(False)
        self.eval()
        return self

    def assert_frozen(self) -> None:
        """Fail if anything gave this policy gradients or training mode back."""
        assert not any(module.training for module in self.modules()), "a frozen policy is in training mode"
        assert not any(parameter.requires_grad for parameter in self.parameters()), "a frozen policy has gradients on"


class AdapterPolicy(CausalPolicy):
    """A frozen policy that is another policy's model with another adapter: it adds no weights but that adapter's.

    Args:
        owner: The policy whose model it is; the model's mode, its gradients and the adapter in use stay the owner's.
        adapter: Name of this policy's adapter; None is the bare base.
    """

    def __init__(self, owner: CausalPolicy, adapter: str | None) -> None:
        super().__init__(owner.model, chunk_size=owner.chunk_size)
        self.adapter = adapter
        # No child: where weights are sharded, the owner gathers them.
        self.__dict__["owner"] = owner

    @property
    @override
    def device(self) -> torch.device:
        owner: CausalPolicy = self.__dict__["owner"]
        return owner.device

    @override
    def most(self, count: int) -> int:
        owner: CausalPolicy = self.__dict__["owner"]
        return owner.most(count)

    @override
    @torch.no_grad()
    def _hidden_states(self, batch: TokenBatch) -> Tensor:
        owner: CausalPolicy = self.__dict__["owner"]
        with using(self.model, self.adapter):
            return owner.hidden_states(batch)

    @override
    def freeze(self) -> AdapterPolicy:
        """Return self: nothing of it was ever trained, and the rest of the model belongs to the actor."""
        return self

    @override
    def assert_frozen(self) -> None:
        """Fail if anything gave this policy's adapter gradients; the mode is the actor's, and dropout is 0 in both."""
        own = [] if self.adapter is None else adapter_parameters(self.model, self.adapter)
        assert not any(parameter.requires_grad for parameter in own), "a frozen adapter has gradients on"


def states_before_tokens(decoder: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """Return [N, D]: a decoder's last hidden state before each response token, in row-major order of the mask.

    Without padding where the decoder takes layouts (:mod:`dpr_lightning.models.ragged`), else as it is padded.
    Positions count attended tokens only, so padding on the left and on the right give the same states.
    """
    if ragged.is_enabled(decoder):
        return ragged.states_before_responses(decoder, batch)
    position_ids_BT = (batch.attention_mask_BT.long().cumsum(dim=1) - 1).clamp_(min=0)
    hidden_BTD: Tensor = decoder(
        input_ids=batch.input_ids_BT,
        attention_mask=batch.attention_mask_BT.long(),
        position_ids=position_ids_BT,
        use_cache=False,
    ).last_hidden_state
    # The token in column t is predicted from column t - 1, which is its predecessor: responses have no gaps.
    return hidden_BTD[:, :-1][batch.response_mask_BT[:, 1:]]


def scatter_tokens(values_N: Tensor, mask_BT: Tensor) -> Tensor:
    """Lay N response-token values out as [B, T], 0 elsewhere; differentiable."""
    return values_N.new_zeros(mask_BT.shape).masked_scatter(mask_BT, values_N)


def load_policy(name_or_path: str, backbone: BackboneConfig, *, chunk_size: int) -> CausalPolicy:
    """Load a model as a policy and check that its output layer is understood."""
    model = load_model(name_or_path, backbone)
    check_lm_head(model)
    policy = CausalPolicy(model, chunk_size=chunk_size)
    ragged.verify(model)
    return policy


def load_policies(
    trained: str, frozen: Mapping[str, str], backbone: BackboneConfig, *, chunk_size: int
) -> tuple[CausalPolicy, dict[str, CausalPolicy]]:
    """Load the policy that is trained and those that are not.

    Without ``backbone.lora`` each is a model of its own. With it one base carries them all: the trained policy is an
    adapter, started from that of ``trained`` or from an update of 0, and so is every frozen policy that stands on the
    same base. A frozen policy on another base is a model of its own.

    Args:
        trained: Directory or hub name that the trained policy starts from.
        frozen: The same of each frozen policy, by name.
        backbone: How weights are loaded.
        chunk_size: See ``CausalPolicy``.
    """
    if backbone.lora is None:
        actor = load_policy(trained, backbone, chunk_size=chunk_size)
        loaded = {name: load_policy(source, backbone, chunk_size=chunk_size) for name, source in frozen.items()}
        return actor, {name: policy.freeze() for name, policy in loaded.items()}
    source = find_source(trained)
    on_base = of_base(source, backbone)
    actor = load_policy(source.base, on_base, chunk_size=chunk_size)
    if source.adapter is None:
        add_adapter(actor.model, ACTOR, backbone.lora)
    else:
        load_adapter(actor.model, ACTOR, source.adapter)
    policies: dict[str, CausalPolicy] = {}
    for name, where in frozen.items():
        found = find_source(where)
        is_same_revision = of_base(found, backbone).revision == on_base.revision
        if locate(found.base) != locate(source.base) or not is_same_revision:
            if backbone.quantization is not None:
                raise UserError(
                    f"model.backbone.quantization: the {name} '{where}' stands on '{found.base}', the trained policy "
                    f"on '{source.base}'; rounded to 4 bits each by itself, they would differ by more than by "
                    "training. Leave it out, or give adapters on one base"
                )
            policies[name] = load_policy(where, backbone, chunk_size=chunk_size).freeze()
            continue
        if found.adapter is not None:
            load_adapter(actor.model, name, found.adapter)
        adapter = None if found.adapter is None else name
        policies[name] = AdapterPolicy(actor, adapter)
    train_only(actor.model, ACTOR)
    return actor, policies


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenTeacher:
    """Where the teacher pi_SFT lies, and what its run said of itself."""

    teacher: str
    """Transformers directory or hub name of pi_SFT."""
    manifest: dict[str, Any] | None
    """Manifest of a teacher of ours (template, data, versions); None for another trainer's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenPair(FrozenTeacher):
    """The same of the teacher and its reference pi_ref, or several that are averaged."""

    references: tuple[str, ...]
    """Transformers directory or hub name of each."""

    @property
    def reference(self) -> str:
        """The only reference."""
        (only,) = self.references
        return only


def _is_run(directory: Path) -> bool:
    return is_directory(directory / "final") or is_file(directory / "config.yaml")


def _meant_run(teacher: str) -> str:
    """Return the question whether the run around a directory, or one of a similar name, was meant; or nothing."""
    path = Path(teacher)
    around = [parent for parent in path.parents if parent != Path() and _is_run(parent)]
    if exists(path) and around:
        return f"did you mean '{around[0]}', the run that it lies in? Else "
    similar = None if exists(path) else suggestion(teacher)
    return f"did you mean '{similar}'? Else " if similar is not None else ""


def find_teacher(teacher: str) -> FrozenTeacher:
    """Resolve ``--model.teacher`` to a model directory or hub name.

    Args:
        teacher: A finished SFT run of ours, or any transformers directory or hub name.

    Raises:
        UserError: The run is unfinished.
    """
    root = Path(teacher)
    if not _is_run(root):
        manifest = read_manifest(root) if root.is_dir() and is_complete(root) else None
        return FrozenTeacher(teacher=teacher, manifest=manifest)
    final = root / "final"
    if not is_complete(final):
        raise UserError(
            f"model.teacher '{teacher}' holds a run without a finished '{final.name}/' directory: let its SFT fit "
            "reach the end (the same command goes on), or name a finished run"
        )
    return FrozenTeacher(teacher=str(final), manifest=read_manifest(final))


def find_frozen_pair(
    teacher: str, reference: str | Sequence[str] | None, *, alpha: float | Sequence[float] = 0.5
) -> FrozenPair:
    """Resolve ``--model.teacher`` and ``--model.reference`` to model directories or hub names.

    Args:
        teacher: A finished SFT run of ours, or any transformers directory or hub name.
        reference: The reference, or several; None takes the snapshots at ``alpha`` from the teacher's run.
        alpha: Which snapshot of the run to take, or which several, as shares of the SFT run's optimizer steps.

    Raises:
        UserError: The run is unfinished or has no such snapshot, or a teacher that is no run came without reference.
    """
    root = Path(teacher)
    if reference is None and not _is_run(root):
        what = "is not a run of dpr-lightning" if exists(root) else "is no directory here"
        raise UserError(
            f"model.teacher '{teacher}' {what}, so there is no snapshot to find: {_meant_run(teacher)}"
            "set model.reference to the half-training checkpoint"
        )
    found = find_teacher(teacher)
    if reference is not None:
        references = (reference,) if isinstance(reference, str) else tuple(reference)
    else:
        snapshots = sorted(path for path in (root / "reference").glob("alpha_*") if is_complete(path))
        alphas = [alpha] if isinstance(alpha, float | int) else list(alpha)
        wanted = [(share, root / "reference" / f"alpha_{share:g}") for share in alphas]
        for share, path in wanted:
            if path not in snapshots:
                names = ", ".join(path.name for path in snapshots) or "none"
                raise UserError(
                    f"model.alpha is {share:g}, but '{root / 'reference'}' holds {names}: set model.alpha to one of "
                    "them, or repeat SFT with this alpha in callbacks.ReferenceSnapshot"
                )
        references = tuple(str(path) for _, path in wanted)
    if not references or len(set(references)) != len(references):
        raise UserError(f"model.reference: found {list(references)}; give one or more different references")
    if all(_is_same_place(found.teacher, place) for place in references):
        raise UserError(
            f"model.reference: '{references[0]}' is the teacher itself, so the reward would be 0 for every token; give "
            "an earlier checkpoint of the same SFT run"
        )
    if any(_is_same_place(place, other) for place, other in combinations(references, 2)):
        raise UserError(f"model.reference: two of {list(references)} are one directory; give different references")
    return FrozenPair(teacher=found.teacher, references=references, manifest=found.manifest)


def _is_same_place(first: str, second: str) -> bool:
    """Return whether two directories or hub names are one."""
    if first == second:
        return True
    return exists(Path(first)) and exists(Path(second)) and Path(first).samefile(second)


def refuse_equal_weights(teacher: CausalPolicy, references: Mapping[str, CausalPolicy]) -> None:
    """Refuse a teacher that is its own reference, and references that are one: rewards would be 0, or counted twice.

    Reads weights until the first difference, which is at once unless there is none. Sharded policies and policies on
    different bases are not compared.

    Args:
        teacher: pi_SFT, loaded.
        references: By name, loaded.

    Raises:
        UserError: They have equal weights.
    """
    cause = "a learning rate of 0 in warm-up, or too few steps, leaves two checkpoints equal"
    if all(_have_equal_weights(teacher, reference) for reference in references.values()):
        raise UserError(
            "model.reference: teacher and reference have equal weights, so the reward would be 0 for every token; give "
            f"an earlier checkpoint of the same SFT run ({cause})"
        )
    for (name, reference), (other_name, other) in combinations(references.items(), 2):
        if _have_equal_weights(reference, other):
            raise UserError(f"model.reference: {name} and {other_name} have equal weights; leave one out ({cause})")


def _have_equal_weights(first: CausalPolicy, second: CausalPolicy) -> bool:
    if isinstance(first, AdapterPolicy) != isinstance(second, AdapterPolicy):
        return False
    if isinstance(first, AdapterPolicy) and isinstance(second, AdapterPolicy):
        if first.model is not second.model:
            return False
        updates = [adapter_updates(first.model, policy.adapter) for policy in (first, second)]
        return updates[0].keys() == updates[1].keys() and all(
            torch.equal(factor, updates[1][name][index])
            for name, factors in updates[0].items()
            for index, factor in enumerate(factors)
        )
    weights, others = dict(first.model.named_parameters()), dict(second.model.named_parameters())
    return weights.keys() == others.keys() and all(
        value.shape == others[name].shape and torch.equal(value, others[name]) for name, value in weights.items()
    )


def check_same_vocabulary(pair: FrozenPair, backbone: BackboneConfig) -> None:
    """Refuse a teacher and references whose log-probabilities do not speak of the same tokens.

    Reads tokenizers and configurations only, no weights.

    Raises:
        UserError: Their tokenizers or vocabulary sizes differ.
    """
    tokenizer, size = _tokenizer_and_size(pair.teacher, backbone)
    for reference in pair.references:
        other, other_size = _tokenizer_and_size(reference, backbone)
        if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(other):
            raise UserError(
                f"model.teacher '{pair.teacher}' ({len(tokenizer)} tokens) and model.reference '{reference}' "
                f"({len(other)} tokens) have different tokenizers; both must be checkpoints of one SFT run"
            )
        if size != other_size:
            raise UserError(
                f"model.teacher '{pair.teacher}' has a vocabulary of {size} and model.reference '{reference}' "
                f"one of {other_size}; both must be checkpoints of one SFT run"
            )


def _tokenizer_and_size(name: str, backbone: BackboneConfig) -> tuple[PreTrainedTokenizerBase, int]:
    tokenizer, config = load_tokenizer(name, backbone), load_config(name, backbone)
    # Tokens that were added and are never used may lie beyond the embedding, as Gemma 3's of images do.
    named = [tokenizer.vocab_size - 1, tokenizer.bos_token_id or 0, tokenizer.eos_token_id or 0]
    check_token_ids(max(named), config, f"the tokenizer of '{name}'")
    return tokenizer, config.get_text_config().vocab_size
