"""Demonstrations and prompts: reading, templates, token ids, micro-batches and the SFT DataModule."""

from dpr_lightning.data.batching import PADDING_ROW, MicroBatchPlan, accumulation, plan_micro_batches
from dpr_lightning.data.demonstrations import DemonstrationConfig
from dpr_lightning.data.encoding import DropReport, EncodedDemonstrations, encode_table
from dpr_lightning.data.loader import MicroBatchLoader, data_parallel_rank, running_epoch
from dpr_lightning.data.prompts import PromptBatch, Prompts, load_prompts
from dpr_lightning.data.sft_datamodule import SFTDataModule
from dpr_lightning.data.templates import ChatTemplate, PromptTemplate, TextTemplate, template_from_manifest
from dpr_lightning.data.tokenization import encode_prompt, encode_prompts, encode_responses, eos_id, pad_id

__all__ = [
    "PADDING_ROW",
    "ChatTemplate",
    "DemonstrationConfig",
    "DropReport",
    "EncodedDemonstrations",
    "MicroBatchLoader",
    "MicroBatchPlan",
    "PromptBatch",
    "PromptTemplate",
    "Prompts",
    "SFTDataModule",
    "TextTemplate",
    "accumulation",
    "data_parallel_rank",
    "encode_prompt",
    "encode_prompts",
    "encode_responses",
    "encode_table",
    "eos_id",
    "load_prompts",
    "pad_id",
    "plan_micro_batches",
    "running_epoch",
    "template_from_manifest",
]
