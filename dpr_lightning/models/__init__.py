"""Backbones and policies: torch and transformers, no Trainer."""

from dpr_lightning.models.backbone import BackboneConfig, load_model, load_tokenizer
from dpr_lightning.models.critic import ValueModel, load_critic
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

__all__ = [
    "BackboneConfig",
    "CausalPolicy",
    "FrozenPair",
    "FrozenTeacher",
    "ValueModel",
    "check_same_vocabulary",
    "find_frozen_pair",
    "find_teacher",
    "load_critic",
    "load_model",
    "load_policy",
    "load_tokenizer",
    "scatter_tokens",
]
