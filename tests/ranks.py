"""Several processes of one training run, as torchrun would start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def start_ranks(script: Path, arguments: Sequence[Sequence[str]], directory: Path, *, timeout: float = 200.0) -> None:
    """Run ``script`` once for each list of arguments, as ranks of one group, and fail where one of them does.

    Args:
        script: A Python file.
        arguments: Of each rank.
        directory: For what the ranks share.
        timeout: Seconds until they are killed.
    """
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = int(server.getsockname()[1])
    processes = []
    for rank, own in enumerate(arguments):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(len(arguments)),
            "LOCAL_WORLD_SIZE": str(len(arguments)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "test",
            "OMP_NUM_THREADS": "1",
            "HF_DATASETS_CACHE": str(directory / "cache"),
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, str(script), *own],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)
