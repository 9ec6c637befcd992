"""``credit`` and ``diagnose`` from end to end: a run of random policies, and files of every kind that they take."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpr_lightning.data.demonstrations import DemonstrationConfig
from dpr_lightning.data.templates import TextTemplate
from dpr_lightning.main import main
from dpr_lightning.manifest import write_directory

VERIFIER = "dpr_lightning.evaluation.FinalNumber"
NUM_ROWS = 12


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Sums with one-digit results: a random policy that ends with a digit is right one time in ten."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"prompt": f"add {n % 5} and {n // 5}", "response": f"so #### {n % 5 + n // 5}"} for n in range(NUM_ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def copy_model(source: str) -> Callable[[Path], None]:
    return lambda directory: shutil.copytree(source, directory, dirs_exist_ok=True) and None


@pytest.fixture(scope="module")
def sft_run(tmp_path_factory: pytest.TempPathFactory, frozen_dirs: tuple[str, str], rows_file: str) -> str:
    """A directory like a finished SFT run's: teacher, two references, and the data that it names."""
    root = tmp_path_factory.mktemp("run") / "sft"
    config = DemonstrationConfig(source=rows_file, validation_source=rows_file, max_response_tokens=10)
    data = {"demonstrations": dataclasses.asdict(config), "template": TextTemplate().to_manifest()}
    teacher, reference = frozen_dirs
    write_directory(root / "final", copy_model(teacher), {"data": data})
    write_directory(root / "reference" / "alpha_0.25", copy_model(reference), {})
    # The teacher itself: a reference that says nothing.
    write_directory(root / "reference" / "alpha_0.5", copy_model(teacher), {})
    return str(root)


def run(*args: str | Path) -> None:
    main([str(arg) for arg in args])


def figures(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def by_score(rows: list[dict[str, Any]], *names: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    return {tuple(row[name] for name in names): row for row in rows}


def test_credit_on_the_embedded_tasks(sft_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("credit", "--teacher", sft_run, "--num_prompts", "16", "--num_samples", "2", "--max_new_tokens", "6")
    run(*arguments, "--out", tmp_path / "first.json")
    printed = capsys.readouterr().out
    run(*arguments, "--out", tmp_path / "second.json")
    first, second = figures(tmp_path / "first.json"), figures(tmp_path / "second.json")
    assert first == second
    found = first["localisation"]
    assert found["num_rows"] == 16
    assert found["dropped"] == {"not right": 0, "cut": 0, "nothing to corrupt": 0}
    rows = by_score(found["scores"], "score", "alpha")
    assert {alpha for _, alpha in rows} == {"0.25", "0.5", None}
    # A reference equal to the teacher makes r_hat 0 everywhere: exactly what chance gives, ties and all.
    for name in ("top_1", "top_3", "mrr", "top_1_so_far"):
        assert rows["r_hat", "0.5"][name]["value"] == pytest.approx(rows["chance", None][name]["value"])
    assert first["pairs"]["num_pairs"] == 0
    assert "no pairs" in printed
    assert "Finding a mistake: 16 worked answers" in printed


def test_credit_at_one_alpha_with_the_result_corrupted(sft_run: str, rows_file: str, tmp_path: Path) -> None:
    run(
        "credit", "--teacher", sft_run, "--alpha", "0.25", "--data", rows_file, "--place", "last",
        "--verifier", VERIFIER, "--num_samples", "4", "--max_new_tokens", "4", "--out", tmp_path / "out.json",
    )  # fmt: skip
    found = figures(tmp_path / "out.json")
    assert list(found["references"]) == ["0.25"]
    # Results 0 to 6 are one digit of one token; all but EOS stands before it.
    assert found["localisation"]["mean_num_corrupted"] == 1.0
    assert found["localisation"]["num_rows"] == NUM_ROWS
    assert found["pairs"]["source"].startswith("4 samples of the teacher a prompt")


def test_credit_of_pairs(sft_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"p{n}", "chosen": f"it is {n}", "rejected": f"it is {n} or so"} for n in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    run("credit", "--teacher", sft_run, "--data", path, "--out", tmp_path / "out.json")
    found = figures(tmp_path / "out.json")
    rows = by_score(found["pairs"]["scores"], "score", "alpha", "of")
    # The chosen one is always the shorter; a reward of 0 everywhere ties.
    assert rows["length", None, "sum"]["accuracy"] == 0.0
    assert rows["r_hat", "0.5", "sum"]["accuracy"] == 0.5
    # More tokens of negative log-probability.
    assert rows["log pi_SFT", None, "sum"]["accuracy"] == 1.0
    assert rows["log pi_SFT", None, "sum"]["pearson"] < 0
    assert found["localisation"]["num_rows"] == 10
    assert "10 pairs of 10 prompts" in capsys.readouterr().out


def test_credit_says_what_it_leaves_out(sft_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    texts = ["it is 4", "it is 5", "it is 6", "no number", "a long answer that is cut 7"]
    rows = [{"prompt": f"p{n}", "response": text, "answer": "6" if n == 2 else "x"} for n, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(
        "credit", "--teacher", sft_run, "--data", path, "--max_response_tokens", "10", "--out", tmp_path / "out.json",
    )  # fmt: skip
    found = figures(tmp_path / "out.json")
    assert found["localisation"]["num_rows"] == 3
    assert found["localisation"]["dropped"] == {"not right": 0, "cut": 1, "nothing to corrupt": 1}
    assert found["pairs"] is None
    printed = capsys.readouterr().out
    assert "1 of 5 worked answers left out: cut" in printed
    assert "No pairs to rank" in printed


def test_diagnose_with_a_verifier(sft_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("diagnose", "--teacher", sft_run, "--verifier", VERIFIER, "--num_samples", "6")
    run(*arguments, "--out", tmp_path / "first.json")
    printed = capsys.readouterr().out
    run(*arguments, "--out", tmp_path / "second.json")
    found = figures(tmp_path / "first.json")
    assert found == figures(tmp_path / "second.json")
    assert found["evidence"] == "verifier"
    # Ten tokens at most, as the run recorded; 12 prompts, of which equal ones are one.
    assert found["samples"]["mean_length"] <= 10
    assert found["samples"]["num_prompts"] == NUM_ROWS
    assert found["samples"]["accuracy"]["n"] == NUM_ROWS
    rewards = by_score(found["rewards"], "alpha", "form")
    assert set(rewards) == {(a, f) for a in ("0.25", "0.5") for f in ("as is", "clip_high 0")}
    assert rewards["0.5", "as is"]["std_per_token"] == 0.0
    assert rewards["0.25", "clip_high 0"]["positive_mass"] == 0.0
    best = by_score(found["best_of_n"]["rewards"], "alpha", "form")
    # A reward that ties everywhere picks a random one.
    assert best["0.5", "as is"]["gain"]["value"] == pytest.approx(0.0)
    assert found["best_of_n"]["random"]["value"] == pytest.approx(found["samples"]["accuracy"]["value"])
    assert found["verdict"]["status"] in ("cannot tell", "not expected")
    assert "Verdict: " in printed
    assert "held out by the SFT run" in printed


def test_diagnose_by_a_judges_scores(sft_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # 40 prompts, two responses each; the judge likes the shorter, as log pi_SFT does, and there is a tie.
    path = tmp_path / "scores.jsonl"
    rows = [
        {"prompt": f"p{n}", "response": text, "score": score}
        for n in range(40)
        for text, score in ((f"{n}", 8.0), (f"{n} and more and more", 3.0), (f"{n} and more", 3.0))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(
        "diagnose", "--teacher", sft_run, "--data", path, "--num_samples", "2", "--max_new_tokens", "4",
        "--out", tmp_path / "out.json",
    )  # fmt: skip
    found = figures(tmp_path / "out.json")
    assert (found["evidence"], found["ranking"]["num_pairs"]) == ("judge", 80)
    scores = by_score(found["ranking"]["scores"], "score", "alpha", "of")
    assert scores["log pi_SFT", None, "sum"]["accuracy"] == 1.0
    best = found["best_of_n"]
    assert (best["oracle"]["value"], best["random"]["value"]) == pytest.approx((8.0, 14 / 3))
    assert best["teacher"]["value"] == 8.0
    assert found["samples"]["accuracy"] is None
    assert "judged responses" in capsys.readouterr().out


def test_diagnose_by_demonstrations_is_called_the_weaker_test(
    sft_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("diagnose", "--teacher", sft_run, "--num_samples", "3", "--out", tmp_path / "out.json")
    found = figures(tmp_path / "out.json")
    assert found["evidence"] == "demonstrations"
    # Random samples are never the demonstration.
    assert (found["ranking"]["num_pairs"], found["best_of_n"]) == (3 * NUM_ROWS, None)
    assert found["verdict"]["status"] != "expected"
    assert "weaker test" in capsys.readouterr().out


def test_two_directories_of_another_trainer(frozen_dirs: tuple[str, str], rows_file: str, tmp_path: Path) -> None:
    run(
        "diagnose", "--teacher", frozen_dirs[0], "--reference", frozen_dirs[1], "--data", rows_file,
        "--num_samples", "2", "--max_new_tokens", "4", "--out", tmp_path / "deep" / "out.json",
    )  # fmt: skip
    assert len(figures(tmp_path / "deep" / "out.json")["references"]) == 1


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        ("diagnose", ["--alpha", "0.7"], "--alpha is 0.7, but"),
        ("credit", ["--num_samples", "0"], "--num_samples: found 0"),
        ("diagnose", ["--max_new_tokens", "0"], "--max_new_tokens: found 0"),
        ("diagnose", ["--data", "/no/such.jsonl"], "--data: no file /no/such.jsonl"),
        ("credit", ["--data", "{rows}", "--preset", "gsm8k"], "no column 'question' for prompt"),
        ("credit", ["--data", "{rows}", "--columns", "reply=x"], "unknown key 'reply'"),
        ("credit", ["--verifier", "pathlib.Path"], "is no Verifier"),
        ("credit", ["--num_prompts", "2001"], "--num_prompts: found 2001; without --data at most 2000"),
        ("credit", ["--preset", "gsm8k"], "--preset: found gsm8k, but no --data"),
        ("diagnose", ["--columns", "prompt=q"], "--columns: found ['prompt=q'], but no --data"),
        (
            "credit",
            ["--data", "{rows}", "--verifier", "dpr_lightning.demo.verifier.TaskVerifier"],
            "row 1: no column 'fa",
        ),
        ("diagnose", ["--chat"], "--chat: the model was trained with TextTemplate"),
    ],
)
def test_bad_input_is_refused_before_any_weights_load(
    sft_run: str,
    rows_file: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    more: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("dpr_lightning.analysis.frozen.load_policy", lambda *_, **__: pytest.fail("weights loaded"))
    with pytest.raises(SystemExit, match="2"):
        run(command, "--teacher", sft_run, *[text.replace("{rows}", rows_file) for text in more])
    assert message in capsys.readouterr().err


def test_judged_data_and_a_verifier_are_one_too_many(
    sft_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(SystemExit, match="2"):
        run("diagnose", "--teacher", sft_run, "--data", path, "--verifier", VERIFIER)
    assert "--verifier: the data are judged already" in capsys.readouterr().err


def test_variance_of_the_gradient(sft_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("variance", "--teacher", sft_run, "--num_prompts", "3", "--num_samples", "4", "--max_new_tokens", "6")
    run(*arguments, "--gamma", "0.5", "--out", tmp_path / "first.json")
    run(*arguments, "--gamma", "0.5", "--out", tmp_path / "second.json")
    first = figures(tmp_path / "first.json")
    assert first == figures(tmp_path / "second.json")
    assert "expected" in capsys.readouterr().out
    by_alpha = {
        row["alpha"]: by_score(row["estimators"], "reward", "gamma", "baseline") for row in first["by_reference"]
    }
    base = by_alpha["0.25"]["dense", 1.0, "none"]
    assert base["variance_ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert base["variance"] > 0
    # The teacher as its own reference pays nothing, so there is no gradient.
    assert all((row["variance"], row["variance_ratio"]) == (0.0, None) for row in by_alpha["0.5"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_samples", "5"], "--num_samples: found 5; give an even number from 4 on"),
        (["--num_samples", "2"], "--num_samples: found 2"),
        (["--gamma", "1.5"], "--gamma: found 1.5"),
        (["--clip_low", "1", "--clip_high", "0"], "clip_low must be below clip_high"),
        (["--num_prompts", "1"], "found 1 prompts; the variance between them needs two or more"),
    ],
)
def test_variance_refuses(arguments: list[str], message: str, sft_run: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run("variance", "--teacher", sft_run, "--max_new_tokens", "4", *arguments)
    assert message in capsys.readouterr().err
