"""The critic: a language model's decoder with one number per state in place of its output layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import linear
from transformers import PreTrainedModel

from dpr_lightning.models import ragged
from dpr_lightning.models.backbone import BackboneConfig, lm_head, load_model
from dpr_lightning.models.parallel import most, shard
from dpr_lightning.models.policies import states_before_tokens
from dpr_lightning.types import TokenBatch


class ValueModel(nn.Module):
    """Values of the states in which response tokens were chosen.

    The head starts at 0 and so does every value: advantages of the first rollout batch are returns, as in REINFORCE,
    and no seed decides what the critic begins with. The head's gradient is not 0, so it leaves 0 with the first step
    and the decoder's gradient with it. (The stack that the paper used draws the head's weights with a standard
    deviation of 1 / (D + 1).) It has no bias, as there.

    Args:
        decoder: A transformers decoder, without its output layer; its dropout is expected to be off.
        hidden_size: D, the width of its last hidden states.
    """

    def __init__(self, decoder: PreTrainedModel, *, hidden_size: int) -> None:
        super().__init__()
        ragged.enable(decoder)
        self.decoder = decoder
        self.head = nn.Linear(hidden_size, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.head.weight.device

    def shard(self, mesh: DeviceMesh, *, compute_dtype: torch.dtype | None, offload: bool = False) -> None:
        """Shard the weights over ranks, in place; see :func:`dpr_lightning.models.parallel.shard`."""
        shard(self, self.decoder, mesh, compute_dtype=compute_dtype, offload=offload)

    def most(self, count: int) -> int:
        """Return how many forwards this rank must make where it needs ``count``: see ``parallel.most``."""
        return most(self, count, self.device)

    def forward(self, batch: TokenBatch) -> Tensor:
        """Return [N] float32 values, in row-major order of the response mask, as ``CausalPolicy`` returns tokens."""
        hidden_ND = states_before_tokens(self.decoder, batch)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            return linear(hidden_ND.float(), self.head.weight.float()).squeeze(-1)


def load_critic(name_or_path: str, backbone: BackboneConfig) -> ValueModel:
    """Load a causal language model's decoder as a critic with a new head; its output layer is dropped.

    All of it is trained, so it is never quantized.
    """
    model = load_model(name_or_path, backbone.unquantized())
    decoder = model.get_decoder()
    assert isinstance(decoder, PreTrainedModel)
    return ValueModel(decoder, hidden_size=lm_head(model).weight_VD.shape[1])
