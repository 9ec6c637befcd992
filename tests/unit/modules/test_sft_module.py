from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning import Trainer

from dpr_lightning.data.demonstrations import DemonstrationConfig
from dpr_lightning.models.backbone import load_model


@pytest.mark.parametrize("micro_batch_size", [1, 7, 24])
def test_validation_loss_is_the_token_mean_over_the_split(
    micro_batch_size: int, sft: Callable[..., Any], demonstrations_file: str, make_trainer: Callable[..., Trainer]
) -> None:
    module, data = sft(micro_batch_size=micro_batch_size)
    data.demonstrations = DemonstrationConfig(
        source=demonstrations_file, validation_source=demonstrations_file, test_source=demonstrations_file
    )
    trainer = make_trainer()
    found = trainer.validate(module, data, verbose=False)[0]["val/loss"]

    model = load_model(module.initial_weights, module.backbone)
    encoded = data.encoded["validation"]
    total, num_tokens = 0.0, 0
    for row in range(len(encoded)):
        prompt, response = encoded.prompt_ids(row), encoded.response_ids(row)
        with torch.no_grad():
            logits_TV = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits_TV, torch.tensor(response), reduction="sum"))
        num_tokens += len(response)
    # Rows of 2 to 8 tokens: a mean of batch means would be off in the third digit.
    assert found == pytest.approx(total / num_tokens, rel=1e-5)
    assert trainer.test(module, data, verbose=False)[0]["test/loss"] == pytest.approx(found, rel=1e-6)


def test_training_lowers_the_loss(
    sft: Callable[..., Any], demonstrations_file: str, make_trainer: Callable[..., Trainer]
) -> None:
    module, data = sft()
    data.demonstrations = DemonstrationConfig(source=demonstrations_file, validation_source=demonstrations_file)
    trainer = make_trainer(max_epochs=5)
    before = trainer.validate(module, data, verbose=False)[0]["val/loss"]
    trainer.fit(module, data)
    assert trainer.validate(module, data, verbose=False)[0]["val/loss"] < before - 1.0
