from __future__ import annotations

from typing import Any

import pytest

from dpr_lightning.errors import UserError
from dpr_lightning.modules.resume import rescale_progress


def make_checkpoint(processed: int, *, earlier: int = 0, is_last_batch: bool = False) -> dict[str, Any]:
    """As ``ModelCheckpoint`` writes it after a batch: Lightning counts that one as completed only later."""
    current = {"ready": processed, "started": processed, "processed": processed, "completed": processed - 1}
    progress = {
        "current": current,
        "total": {name: count + earlier for name, count in current.items()},
        "is_last_batch": is_last_batch,
    }
    loaders = [{"epoch": 1, "position": processed}]
    return {"loops": {"fit_loop": {"epoch_loop.batch_progress": progress, "state_dict": {"combined_loader": loaders}}}}


def parts(checkpoint: dict[str, Any]) -> tuple[dict[str, int], dict[str, int], int]:
    loop = checkpoint["loops"]["fit_loop"]
    progress = loop["epoch_loop.batch_progress"]
    return progress["current"], progress["total"], loop["state_dict"]["combined_loader"][0]["position"]


@pytest.mark.parametrize(("before", "now", "processed", "expected"), [(4, 2, 8, 4), (2, 4, 6, 12), (3, 1, 9, 3)])
def test_steps_stay_and_micro_batches_change(before: int, now: int, processed: int, expected: int) -> None:
    checkpoint = make_checkpoint(processed, earlier=20 * before)
    rescale_progress(checkpoint, before=before, now=now)
    current, total, position = parts(checkpoint)
    assert current == {"ready": expected, "started": expected, "processed": expected, "completed": expected - 1}
    assert total == {name: count + 20 * now for name, count in current.items()}
    assert position == expected


def test_the_same_number_changes_nothing() -> None:
    checkpoint = make_checkpoint(5)
    rescale_progress(checkpoint, before=2, now=2)
    assert checkpoint == make_checkpoint(5)


def test_an_epochs_last_batch_is_the_end_of_any_epoch() -> None:
    checkpoint = make_checkpoint(7, is_last_batch=True)
    rescale_progress(checkpoint, before=2, now=1)
    current, total, _ = parts(checkpoint)
    assert min(current.values()) > 2**50
    assert current["completed"] == current["processed"] - 1
    assert total["completed"] == total["processed"] - 1


def test_the_middle_of_a_step_has_no_place_among_others() -> None:
    with pytest.raises(UserError, match=r"ckpt_path: the checkpoint lies inside an optimizer step \(1 of 4"):
        rescale_progress(make_checkpoint(5), before=4, now=2)
