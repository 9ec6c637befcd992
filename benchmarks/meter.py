"""Peak memory of each phase of ``fit``: on a CUDA device what tensors hold, on a CPU what is resident."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.gate import resident


class MemoryCounter(Protocol):
    """Bytes in use, and the most since the last reset."""

    def current(self) -> int:
        """Return bytes in use now."""
        ...

    def reset_peak(self) -> None:
        """Begin a new peak."""
        ...

    def peak(self) -> int:
        """Return the most bytes in use since the last reset."""
        ...


class HostMemory:
    """Resident memory of this process (Linux)."""

    def current(self) -> int:
        """Return bytes resident now."""
        return resident("VmRSS")

    def reset_peak(self) -> None:
        """Let the kernel begin a new high-water mark."""
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Return the high-water mark."""
        return resident("VmHWM")


class CudaMemory:
    """Memory that torch has allocated for tensors on the current CUDA device."""

    def current(self) -> int:
        """Return bytes allocated now."""
        return torch.cuda.memory_allocated()

    def reset_peak(self) -> None:
        """Reset torch's peak."""
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Return torch's peak."""
        return torch.cuda.max_memory_allocated()


class PhaseMeter:
    """The peak of each phase of this process, above what was in use before the first model was loaded.

    Args:
        memory: What is measured.
    """

    def __init__(self, memory: MemoryCounter) -> None:
        self.memory = memory
        self.baseline = 0
        self.peaks: dict[str, int] = {}
        """Bytes by phase: ``rollout``, ``scoring``, ``training``."""
        self._wrapped: list[tuple[Any, str, Any]] = []

    def watch_fit(self) -> None:
        """Measure every phase of all later ``fit`` in this process, until :meth:`release`."""
        from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

        from dpr_lightning.modules import base
        from dpr_lightning.modules.dpr import DPRModule

        load: Callable[..., Any] = base.load_policies

        def load_with_baseline(*args: Any, **kwargs: Any) -> Any:
            self.baseline = self.memory.current()
            return load(*args, **kwargs)

        self._replace(base, "load_policies", load_with_baseline)
        self.wrap(base.CausalLMModule, "sample", "rollout")
        self.wrap(DPRModule, "score", "scoring")
        self.wrap(_TrainingEpochLoop, "advance", "training")

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        """Measure every call of a method."""
        plain = getattr(owner, name)

        def measured(*args: Any, **kwargs: Any) -> Any:
            self.memory.reset_peak()
            try:
                return plain(*args, **kwargs)
            finally:
                self.peaks[phase] = max(self.peaks.get(phase, 0), self.memory.peak() - self.baseline)

        self._replace(owner, name, measured)

    def release(self) -> None:
        """Give every method back."""
        while self._wrapped:
            owner, name, plain = self._wrapped.pop()
            setattr(owner, name, plain)

    def _replace(self, owner: Any, name: str, method: Any) -> None:
        self._wrapped.append((owner, name, getattr(owner, name)))
        setattr(owner, name, method)
