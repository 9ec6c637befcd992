"""Thin LightningModules, one per training stage."""

from dpr_lightning.modules.base import CausalLMModule
from dpr_lightning.modules.dpr import DPRModule
from dpr_lightning.modules.sft import SFTModule

__all__ = ["CausalLMModule", "DPRModule", "SFTModule"]
