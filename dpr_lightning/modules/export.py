"""Trained weights as directories that transformers, peft, and what is built on them load by themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dpr_lightning.data.ends import response_ends
from dpr_lightning.data.templates import PromptTemplate
from dpr_lightning.data.tokenization import pad_id, with_template
from dpr_lightning.models.adapters import ACTOR, FOLDER, adapter_names, merged_state, save_adapter, save_plain
from dpr_lightning.models.parallel import full_state_dict


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What a directory is written of; all ranks of a sharded model write together, and one of them to the disk."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate | None
    """Of the prompts that the model was trained on, which becomes the tokenizer's chat template; None leaves that."""
    base: str | None
    """Directory or hub name of the base of an adapter; None where all weights were trained."""
    revision: str | None = None
    """Of the base."""

    def save_model(self, directory: Path, *, is_writer: bool) -> None:
        """Write a transformers directory (safetensors); an adapter is merged, and lies in ``adapter/`` too."""
        state = full_state_dict(self.model, is_writer=is_writer)
        if not is_writer:
            return
        if self.base is None:
            save_plain(self.model, state, directory, self.generation_config)
        else:
            save_plain(self.model, merged_state(self.model, ACTOR, state), directory, self.generation_config)
            save_adapter(self.model, ACTOR, state, directory / FOLDER, base=self.base, revision=self.revision)
        self._save_tokenizer(directory)

    def save_snapshot(self, directory: Path, *, is_writer: bool) -> None:
        """Write the same, but of an adapter only itself, in peft's format."""
        if self.base is None:
            self.save_model(directory, is_writer=is_writer)
            return
        state = full_state_dict(self.model, is_writer=is_writer, only=adapter_names(self.model, ACTOR))
        if is_writer:
            save_adapter(self.model, ACTOR, state, directory, base=self.base, revision=self.revision)
            self._save_tokenizer(directory)

    @property
    def generation_config(self) -> GenerationConfig:
        """How others are to generate: no settings but the ends, that of the demonstrations and those of the model."""
        return GenerationConfig(
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=response_ends(self.tokenizer, self.template, self.model.generation_config),
            pad_token_id=pad_id(self.tokenizer),
        )

    def _save_tokenizer(self, directory: Path) -> None:
        tokenizer = self.tokenizer if self.template is None else with_template(self.tokenizer, self.template)
        tokenizer.save_pretrained(directory)
