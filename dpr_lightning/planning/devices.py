"""What a device offers, and how long an operation takes on it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch

_EFFICIENCY = 0.6
_LAUNCH = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device of those that a run uses."""

    name: str
    memory: float
    """GiB."""
    half_tflops: float
    """Peak of dense matrix products of 16 bits."""
    single_tflops: float
    """The same of 32 bits."""
    bandwidth: float
    """GB/s of its memory."""
    efficiency: float = _EFFICIENCY
    """Share of both peaks that an operation reaches."""
    launch_seconds: float = _LAUNCH
    """An operation takes no less: starting it from Python."""
    reserve: float = 0.0
    """GiB of its memory that are not for tensors."""
    fragmentation: float = 0.0
    """Share of the rest that the allocator cannot use."""

    @property
    def usable(self) -> float:
        """Bytes for tensors."""
        return (self.memory - self.reserve) * (1.0 - self.fragmentation) * 2**30

    def seconds_of(self, flops: float, num_bytes: float, is_half: bool) -> float:
        """Return the seconds of one operation: the longest of computing, moving and starting it."""
        peak = (self.half_tflops if is_half else self.single_tflops) * 1e12
        computing, moving = flops / peak, num_bytes / (self.bandwidth * 1e9)
        return max(max(computing, moving) / self.efficiency, self.launch_seconds)


def _gpu(name: str, memory: float, half_tflops: float, single_tflops: float, bandwidth: float) -> Device:
    return Device(
        name=name,
        memory=memory,
        half_tflops=half_tflops,
        single_tflops=single_tflops,
        bandwidth=bandwidth,
        # CUDA's context, cuBLAS' workspaces, NCCL's buffers; and what the caching allocator leaves between blocks.
        reserve=1.0,
        fragmentation=0.05,
    )


GPUS = {
    device.name: device
    for device in (
        _gpu("A100-40", 39.4, 312.0, 19.5, 1555.0),
        _gpu("A100-80", 79.1, 312.0, 19.5, 2039.0),
        _gpu("H100-80", 79.1, 989.0, 67.0, 3350.0),
        _gpu("H200", 139.8, 989.0, 67.0, 4800.0),
        _gpu("L40S", 44.4, 362.0, 91.6, 864.0),
        _gpu("RTX-4090", 23.5, 165.0, 82.6, 1008.0),
    )
}
"""Memory as torch reports it, peaks as the maker's data sheets give them (SXM where there are several, no sparsity)."""


def attached_gpu() -> Device | None:
    """Return the GPU of this machine, or None; one that is not in the table has the figures of the slowest."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    memory = found.total_memory / 2**30
    for device in GPUS.values():
        model = device.name.partition("-")[0] if device.name != "RTX-4090" else "4090"
        if model in found.name and abs(device.memory - memory) < 0.1 * memory:
            return _gpu(found.name, memory, device.half_tflops, device.single_tflops, device.bandwidth)
    slowest = min(GPUS.values(), key=lambda device: device.half_tflops)
    return _gpu(found.name, memory, slowest.half_tflops, slowest.single_tflops, slowest.bandwidth)


def this_cpu(num_processes: int) -> Device:
    """Return this machine as a device, its speed measured in half a second with one thread's share of its cores."""
    tflops = {dtype: _measure_tflops(dtype) for dtype in (torch.float32, torch.bfloat16)}
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return Device(
        name=f"this machine's CPU, {torch.get_num_threads()} threads",
        memory=memory / num_processes,
        half_tflops=tflops[torch.bfloat16],
        single_tflops=tflops[torch.float32],
        bandwidth=_measure_bandwidth(),
        efficiency=1.0,
    )


def _measure_tflops(dtype: torch.dtype, size: int = 768) -> float:
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    return 2 * size**3 / _fastest(lambda: left @ right) / 1e12


def _measure_bandwidth(num_bytes: int = 2**26) -> float:
    source = torch.zeros(num_bytes, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * num_bytes / _fastest(lambda: target.copy_(source)) / 1e9


def _fastest(run: object, times: int = 4) -> float:
    assert callable(run)
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
