from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from dpr_lightning.data import readers
from dpr_lightning.data.readers import open_records


@pytest.mark.parametrize("is_large", [False, True])
def test_only_large_files_show_a_bar(
    is_large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(readers, "_LARGE", 1 if is_large else 2**20)
    datasets.enable_progress_bars()
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n')
    assert len(open_records(str(path), subset=None, hub_split="train", key="source")) == 1
    assert ("Generating" in capfd.readouterr().err) == is_large
    assert datasets.is_progress_bar_enabled()
