"""What is alive, and what it costs, on tensors whose sizes are worked out by hand."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dpr_lightning.planning.tracker import ACTIVATIONS, COPIES, WEIGHTS, Tracker


def track() -> Tracker:
    return Tracker(FakeTensorMode(allow_non_fake_inputs=True), lambda flops, num_bytes, is_half: 1.0)


def test_peak_counts_what_is_alive_together() -> None:
    tracker = track()
    with tracker.fake:
        weight = torch.empty(10, 10)
    tracker.tag([weight], WEIGHTS)
    with tracker:
        tracker.begin("two")
        first = weight @ weight
        second = first + 1
        del first
        tracker.begin("one")
        third = second.t()
    # 400 bytes each: the weight, and two results; then one of them, and a view that takes nothing.
    assert dict(tracker.stages["two"].peak) == {WEIGHTS: 400, ACTIVATIONS: 800}
    assert dict(tracker.stages["one"].peak) == {WEIGHTS: 400, ACTIVATIONS: 400}
    # 2 n^3 for the product; a product reads two and writes one, an addition reads and writes one.
    assert (tracker.stages["two"].flops, tracker.stages["two"].num_bytes) == (2000.0, 2000)
    assert (tracker.stages["two"].num_kernels, tracker.stages["one"].num_kernels) == (2, 0)
    assert third.shape == (10, 10)


def test_autocast_copies_of_weights_are_told_apart() -> None:
    tracker = track()
    with tracker.fake:
        weight = torch.nn.Parameter(torch.empty(8, 8))
        states = torch.empty(4, 8)
    tracker.tag([weight], WEIGHTS)
    with tracker, torch.autocast("cpu", dtype=torch.bfloat16):
        tracker.begin("forward")
        out = torch.nn.functional.linear(states, weight)
    assert out.dtype == torch.bfloat16
    assert tracker.stages["forward"].peak[COPIES] == 8 * 8 * 2


def test_real_masks_index_fake_tensors() -> None:
    tracker = track()
    mask = torch.tensor([[True, False, True], [False, False, True]])
    with tracker.fake:
        states = torch.empty(2, 3, 5, requires_grad=True)
    with tracker:
        tracker.begin("index")
        picked = states[mask]
        laid = picked.new_zeros(mask.shape).masked_scatter(mask, picked[:, 0])
        laid.sum().backward()
    assert picked.shape == (3, 5)
    assert states.grad is not None
    assert states.grad.shape == (2, 3, 5)


def test_a_tensor_too_large_to_be_real_is_made_as_a_fake() -> None:
    tracker = track()
    column, row = torch.arange(4096)[:, None], torch.arange(4096)[None]
    with tracker:
        tracker.begin("mask")
        mask = column >= row
    assert mask.shape == (4096, 4096)
    assert tracker.stages["mask"].peak[ACTIVATIONS] == 4096 * 4096


def test_a_stage_that_is_entered_again_keeps_its_higher_peak() -> None:
    tracker = track()
    with tracker.fake:
        weight = torch.empty(10)
    with tracker:
        tracker.begin("a")
        kept = torch.cat([weight] * 5)
        del kept
        tracker.begin("b")
        tracker.begin("a")
        kept = torch.cat([weight] * 2)
    assert tracker.stages["a"].peak[ACTIVATIONS] == 5 * 40
    assert len(kept) == 20
