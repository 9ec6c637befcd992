"""Backbones and policies: torch and transformers, no Trainer."""

from dpr_lightning.models.backbone import BackboneConfig, load_model, load_tokenizer
from dpr_lightning.models.policies import (
    CausalPolicy,
    FrozenPair,
    check_same_vocabulary,
    find_frozen_pair,
    load_policy,
    scatter_tokens,
)

__all__ = [
    "BackboneConfig",
    "CausalPolicy",
    "FrozenPair",
    "check_same_vocabulary",
    "find_frozen_pair",
    "load_model",
    "load_policy",
    "load_tokenizer",
    "scatter_tokens",
]
