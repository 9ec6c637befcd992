"""What can only be a directory is refused at once; what may be on the hub is left to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpr_lightning.errors import UserError
from dpr_lightning.models import backbone
from dpr_lightning.models.backbone import BackboneConfig, load_config, load_model, load_tokenizer
from dpr_lightning.models.location import is_missing_directory, suggestion
from dpr_lightning.models.policies import find_frozen_pair


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with one finished run."""
    monkeypatch.chdir(tmp_path)
    for name in ("final", "reference/alpha_0.5", "checkpoints"):
        (tmp_path / "runs" / "sft2" / name).mkdir(parents=True)
    (tmp_path / "runs" / "sft2" / "config.yaml").write_text("{}")
    return tmp_path / "runs"


@pytest.mark.parametrize(
    "name",
    [
        "/no/such/place",
        "./here",
        "../there",
        "~/models/x",
        "a/b/c",
        "runs/sft3",
        "runs/sft2/finel",
        "name with spaces",
        "trailing/",
        "back\\slash",
        "x" * 5000,
        "a/" + "x" * 300,
        "nul\0byte",
    ],
)
def test_a_directory_that_is_missing(runs: Path, name: str) -> None:
    assert is_missing_directory(name)


@pytest.mark.parametrize("name", ["gpt2", "org/model", "Qwen/Qwen2.5-7B", "meta-llama/Llama-3.1-8B", "runs/sft2"])
def test_a_name_on_the_hub_or_a_directory_that_is_here(runs: Path, name: str) -> None:
    assert not is_missing_directory(name)


def test_nothing_is_asked_of_the_hub(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("the hub was asked")

    for loader in (backbone.AutoTokenizer, backbone.AutoConfig, backbone.AutoModelForCausalLM):
        monkeypatch.setattr(loader, "from_pretrained", never)
    for name in ("runs/sft3", "/no/such/place", "x" * 5000):
        for load in (load_tokenizer, load_config, load_model):
            with pytest.raises(UserError, match=r"cannot be loaded \(there is no such directory\)"):
                load(name, BackboneConfig(name_or_path=name))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("runs/sft3", "runs/sft2"),
        ("runs/sft2/finel", "runs/sft2/final"),
        ("run/sft2", "runs"),
        ("runs/sft2", None),
        ("nothing/like/it", None),
        ("gpt3", None),
    ],
)
def test_what_was_meant(runs: Path, name: str, meant: str | None) -> None:
    assert suggestion(name) == meant


def test_a_runs_directory_as_a_model_names_its_model(runs: Path) -> None:
    for name in ("runs/sft2", "runs/sft3"):
        with pytest.raises(UserError, match=r"did you mean 'runs/sft2/final'\?"):
            load_tokenizer(name, BackboneConfig(name_or_path=name))


@pytest.mark.parametrize("inside", ["final", "reference/alpha_0.5", "checkpoints"])
def test_a_teacher_inside_a_run_asks_for_the_run(runs: Path, inside: str) -> None:
    with pytest.raises(
        UserError, match=r"did you mean 'runs/sft2', the run that it lies in\? Else set model.reference"
    ):
        find_frozen_pair(f"runs/sft2/{inside}", None)


def test_a_teacher_that_is_missing_names_the_run_that_is_like_it(runs: Path) -> None:
    with pytest.raises(UserError, match=r"'runs/sft3' is no directory here.*did you mean 'runs/sft2'\?"):
        find_frozen_pair("runs/sft3", None)
    with pytest.raises(UserError, match="is no directory here"):
        find_frozen_pair("x" * 5000, None)
