"""Where the device waits for the CPU: a profile of a few milliseconds, summed up."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_SYNCHRONIZE = ("cudaStreamSynchronize", "cudaEventSynchronize")
_LAUNCH = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
_TOP = 8


class Profile:
    """A running profile of one piece of work.

    Args:
        work: Name of the work.
    """

    def __init__(self, work: str) -> None:
        self.work = work
        self.is_cuda = torch.cuda.is_available()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.is_cuda else [])]
        self._profile = profile(activities=activities)
        _synchronize()
        self._profile.__enter__()
        self._start = time.perf_counter()

    def stop(self) -> tuple[dict[str, Any], str]:
        """End it; return the summary as a row, and the operations that took most as text."""
        _synchronize()
        seconds = time.perf_counter() - self._start
        self._profile.__exit__(None, None, None)
        events = self._profile.events()
        assert events is not None
        # User annotations are spans on the device, not kernels.
        on_device = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
        names = [event.name for event in events if event.device_type == DeviceType.CPU]
        row: dict[str, Any] = {"work": self.work, "ms": seconds * 1e3}
        if self.is_cuda:
            spans = sorted((event.time_range.start, event.time_range.end) for event in on_device)
            busy = _covered(spans) / 1e3
            row |= {
                "device busy ms": busy,
                "device idle": f"{max(0.0, 1 - busy / (seconds * 1e3)):.0%}",
                "kernels": sum(not event.name.startswith("Mem") for event in on_device),
                "launches": sum(name in _LAUNCH for name in names),
                "synchronisations": sum(name in _SYNCHRONIZE for name in names),
            }
        row["operations"] = sum(name.startswith("aten::") for name in names)
        averages = self._profile.key_averages()
        text = _top([event for event in averages if event.device_type == DeviceType.CPU], "self_cpu_time_total")
        if self.is_cuda:
            # Kernels alone: an operation has the time of its kernels too.
            kernels = [event for event in averages if event.device_type == DeviceType.CUDA]
            text += "\n" + _top([event for event in kernels if not event.is_user_annotation], "self_device_time_total")
        return row, text

    def cancel(self) -> None:
        """End it without a summary."""
        self._profile.__exit__(None, None, None)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _covered(spans: list[tuple[float, float]]) -> float:
    """Return the length of a union of spans, sorted by their beginnings."""
    total, end = 0.0, float("-inf")
    for start, stop in spans:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def _top(averages: Sequence[Any], key: str) -> str:
    """Return the operations with the largest ``key`` as lines of milliseconds, calls and names."""
    largest = sorted(averages, key=lambda event: -getattr(event, key))[:_TOP]
    lines = [f"{key}, ms  calls  operation"]
    lines += [f"{getattr(event, key) / 1e3:23.2f}  {event.count:5}  {event.key[:90]}" for event in largest]
    return "\n".join(lines)
