"""Sampling from the current policy: a protocol, and its implementations with transformers and vLLM."""

from dpr_lightning.rollout.sampler import Sampler, Samples
from dpr_lightning.rollout.transformers_sampler import TransformersSampler
from dpr_lightning.rollout.vllm_sampler import VLLMSampler

__all__ = ["Sampler", "Samples", "TransformersSampler", "VLLMSampler"]
