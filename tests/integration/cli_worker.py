"""Runs command lines one after another, as one rank: torchrun's environment says which.

Argument: a file with a JSON list of them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from dpr_lightning.main import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        main(arguments)
