from __future__ import annotations

from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from dpr_lightning.application import without_replaced
from dpr_lightning.callbacks.checkpoint import RunCheckpoint
from dpr_lightning.callbacks.policy_health import PolicyHealth
from dpr_lightning.callbacks.throughput import Throughput


def test_an_overlays_callback_replaces_the_recipes_of_its_class() -> None:
    recipe, throughput, overlay = PolicyHealth(), Throughput(), PolicyHealth(teacher_kl_budget=2.0)
    assert without_replaced([recipe, throughput, overlay]) == [throughput, overlay]


def test_several_checkpoints_and_lightnings_own_callbacks_stay() -> None:
    callbacks = [
        RunCheckpoint(save_last=True),
        RunCheckpoint(monitor="val/accuracy"),
        ModelCheckpoint(),
        EarlyStopping("a"),
        EarlyStopping("b"),
    ]
    assert without_replaced(callbacks) == callbacks


def test_a_single_callback_or_none_is_left_to_lightning() -> None:
    single = Throughput()
    assert without_replaced(single) is single
    assert without_replaced(None) is None
