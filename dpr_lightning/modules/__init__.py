"""Thin LightningModules, one per training stage."""

from dpr_lightning.modules.base import CausalLMModule
from dpr_lightning.modules.dpr import DPRModule
from dpr_lightning.modules.on_policy import OnPolicyModule
from dpr_lightning.modules.pairs import PairModule
from dpr_lightning.modules.ppo import PPOModule
from dpr_lightning.modules.sft import SFTModule

__all__ = ["CausalLMModule", "DPRModule", "OnPolicyModule", "PPOModule", "PairModule", "SFTModule"]
