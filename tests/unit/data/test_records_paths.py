"""Sources that can only be files are refused at once, and no hub is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpr_lightning.data.readers import local_files
from dpr_lightning.errors import UserError


@pytest.mark.parametrize(
    "source", ["./rows", "a/b/rows", "here/rows", "~/no_such_rows", "/none/rows", "rows.jsonl", "*.x"]
)
def test_a_missing_file_is_named(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(UserError, match=r"data.source: no file .* \(looked from"):
        local_files(source, "data.source")


@pytest.mark.parametrize("source", ["owner/name", "name"])
def test_what_may_be_a_name_on_the_hub_is_left_to_it(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_files(source, "data.source") == ()
