"""Sampling from the current policy: a protocol and its transformers implementation."""

from dpr_lightning.rollout.sampler import Sampler, Samples
from dpr_lightning.rollout.transformers_sampler import TransformersSampler

__all__ = ["Sampler", "Samples", "TransformersSampler"]
