"""``make gpu``: correctness, speed and memory on one NVIDIA GPU, in at most eight minutes (docs/gpu.md)."""
