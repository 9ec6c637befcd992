from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from dpr_lightning.errors import UserError
from dpr_lightning.manifest import (
    atomic_write_json,
    environment,
    is_complete,
    read_json,
    read_manifest,
    refuse_taken,
    sha256_of_files,
    tokenizer_fingerprint,
    verify,
    write_directory,
)


def writes(**files: str) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        for name, text in files.items():
            (directory / f"{name}.safetensors").write_text(text)

    return write


def test_a_directory_appears_with_its_manifest(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "final"
    write_directory(path, writes(model="weights"), {"kind": "final", "step": 3})
    manifest = read_manifest(path)
    assert (manifest["kind"], manifest["step"]) == ("final", 3)
    assert manifest["weights_sha256"] == {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    assert manifest["environment"]["dpr-lightning"] == "0.1.0"
    assert is_complete(path)
    verify(path)
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["final"]


def test_the_final_name_is_free_until_everything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "final"
    seen: list[bool] = []

    def write(directory: Path) -> None:
        writes(model="weights")(directory)
        seen.append(path.exists() or is_complete(directory))

    write_directory(path, write, {})
    assert seen == [False]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def write(directory: Path) -> None:
        writes(model="half")(directory)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_directory(tmp_path / "final", write, {})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_replacement_leaves_the_old_directory(tmp_path: Path) -> None:
    path = tmp_path / "final"
    write_directory(path, writes(model="old"), {})

    def write(directory: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_directory(path, write, {}, exist_ok=True)
    assert (path / "model.safetensors").read_text() == "old"
    verify(path)


def _killed(tmp_path: Path, at: str) -> None:
    """Run a replacement of a complete directory in a process that dies inside it."""
    child = os.fork()
    if child == 0:
        real_rename = Path.rename

        def rename(self: Path, target: Any) -> Any:
            result = real_rename(self, target)
            if at == "between renames" and self.name == "final":
                os._exit(9)
            return result

        Path.rename = rename  # type: ignore[method-assign]

        def write(directory: Path) -> None:
            writes(model="new", extra="new")(directory)
            if at == "in write":
                os._exit(9)

        write_directory(tmp_path / "final", write, {}, exist_ok=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9


@pytest.mark.multiprocess
@pytest.mark.parametrize("at", ["in write", "between renames"])
def test_a_killed_process_leaves_something_that_the_next_attempt_clears(at: str, tmp_path: Path) -> None:
    path = tmp_path / "final"
    write_directory(path, writes(model="old"), {})
    _killed(tmp_path, at)
    assert len(list(tmp_path.iterdir())) == 2
    assert is_complete(path) == (at == "in write")
    write_directory(path, writes(model="newest"), {}, exist_ok=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["final"]
    assert sha256_of_files(path) == {"model.safetensors": hashlib.sha256(b"newest").hexdigest()}


@pytest.mark.multiprocess
def test_a_complete_directory_survives_a_kill_between_the_renames_and_a_refused_attempt(tmp_path: Path) -> None:
    write_directory(tmp_path / "final", writes(model="old"), {})
    _killed(tmp_path, "between renames")
    with pytest.raises(UserError, match="already there and complete"):
        write_directory(tmp_path / "final", writes(model="other"), {})
    assert (tmp_path / "final" / "model.safetensors").read_text() == "old"


def test_a_taken_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "final"
    path.mkdir()
    refuse_taken(path, exist_ok=False)  # an empty directory is no loss
    write_directory(path, writes(model="first"), {})
    with pytest.raises(UserError, match=r"final' is already there and complete; delete it"):
        write_directory(path, writes(model="second"), {})
    write_directory(path, writes(model="second"), {}, exist_ok=True)
    assert (path / "model.safetensors").read_text() == "second"
    (path / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"holds files but no manifest\.json"):
        write_directory(path, writes(model="third"), {}, exist_ok=True)
    shutil.rmtree(path)
    path.write_text("a file")
    with pytest.raises(UserError, match="is a file where a directory"):
        write_directory(path, writes(model="third"), {}, exist_ok=True)


def test_a_process_that_is_not_the_writer_takes_part_and_writes_nothing(tmp_path: Path) -> None:
    called: list[Path] = []
    write_directory(tmp_path / "final", called.append, {}, is_writer=False)
    assert called == [tmp_path / ".final.partial"]
    assert list(tmp_path.iterdir()) == []


def test_damaged_weights_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "final"
    write_directory(path, writes(a="one", b="two"), {})
    (path / "a.safetensors").write_text("onE")
    with pytest.raises(UserError, match=r"a.safetensors' is not the file that manifest.json lists"):
        verify(path)
    (path / "a.safetensors").unlink()
    with pytest.raises(UserError, match=r"a.safetensors' is missing"):
        verify(path)
    (path / "a.safetensors").write_text("one")
    (path / "c.bin").write_text("left over from another model")
    with pytest.raises(UserError, match=r"c.bin' is not the file"):
        verify(path)


def test_unreadable_manifests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("[1]")
    with pytest.raises(UserError, match="holds a list where an object should be"):
        read_manifest(tmp_path)


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    atomic_write_json(path, {"b": 1, "a": Path("x")})
    assert json.loads(path.read_text()) == {"a": "x", "b": 1}
    atomic_write_json(path, {"c": "é"})
    assert read_json(path) == {"c": "é"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


def test_environment_names_the_commit_and_versions() -> None:
    found = environment()
    assert {"python", "torch", "lightning", "transformers", "dpr-lightning"} <= set(found)
    assert all(isinstance(value, str) and value for value in found.values())


def tokenizer(vocabulary: str, *, merges: tuple[tuple[str, str], ...] = (), eos: str = "b") -> PreTrainedTokenizerFast:
    tokens = [*vocabulary, *(left + right for left, right in merges)]
    model = models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=list(merges))
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token=eos)


def test_the_fingerprint_is_of_what_ids_mean() -> None:
    plain = tokenizer_fingerprint(tokenizer("abc"))
    assert len(plain) == 16
    assert plain == tokenizer_fingerprint(tokenizer("abc"))
    different = [
        tokenizer("acb"),
        tokenizer("abcd"),
        tokenizer("abc", eos="c"),
        tokenizer("abc", merges=(("a", "c"),)),
    ]
    same_tokens = [
        tokenizer("abc", merges=(("a", "b"), ("ab", "c"), ("b", "c"))),
        tokenizer("abc", merges=(("a", "b"), ("b", "c"), ("ab", "c"))),
    ]
    prints = [plain, *map(tokenizer_fingerprint, different)]
    assert len(set(prints)) == len(prints)
    # Other ids for the merged tokens, and another order of merging.
    assert tokenizer_fingerprint(same_tokens[0]) != tokenizer_fingerprint(same_tokens[1])


def test_the_fingerprint_leaves_settings_out(tmp_path: Path) -> None:
    changed = tokenizer("abc")
    expected = tokenizer_fingerprint(changed)
    changed.chat_template = "{{ messages }}"
    changed.padding_side = "left"
    changed.pad_token = "a"
    changed(["a", "ab"], padding=True, truncation=True, max_length=4)
    assert tokenizer_fingerprint(changed) == expected
    changed.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(PreTrainedTokenizerFast.from_pretrained(tmp_path)) == expected
