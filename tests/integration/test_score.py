"""``score`` from end to end: two random policies, files of every kind, a run that is killed, and what is refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpr_lightning.analysis.score_blocks import NOT_UNICODE
from dpr_lightning.data.encoding import Reason
from dpr_lightning.main import main

ROWS = [
    {"prompt": f"question {n // 2}", "response": text}
    for n, text in enumerate(
        [
            "it is 4", "it is 5\n\n  or so", "smile \U0001f600 and \u6570", "line\u2028separator", "<b>no</b>\u202e",
            " ", "a long answer that is cut in the midst of itself", "it is 7", "it is 8", "last\r\n",
        ]
    )
]  # fmt: skip


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def run(frozen_dirs: tuple[str, str], data: Path, tmp_path: Path) -> Callable[..., Path]:
    def score(*more: str, out: str = "out", source: Path = data) -> Path:
        teacher, reference = frozen_dirs
        settings = ["--block_rows", "3", "--micro_batch_size", "2", "--max_response_tokens", "24", *more]
        names = ["--teacher", teacher, "--reference", reference, "--data", str(source), "--out", str(tmp_path / out)]
        main(["score", *names, *settings])
        return tmp_path / out

    return score


def rows_of(out: Path) -> list[dict[str, Any]]:
    parts = [out / name for name in json.loads((out / "manifest.json").read_text())["parts"]]
    if parts[0].suffix == ".parquet":
        return [row for part in parts for row in pq.read_table(part).to_pylist()]
    return [json.loads(line) for part in parts for line in part.read_text().split("\n") if line]


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "manifest.json"}


def test_scores_every_row_and_says_what_it_leaves_out(
    run: Callable[..., Path], frozen_dirs: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = run()
    printed = capsys.readouterr().out
    manifest = json.loads((out / "manifest.json").read_text())
    rows = rows_of(out)
    assert [row["row"] for row in rows] == [1, 2, 3, 4, 5, 7, 8, 9, 10]
    assert manifest["parts"] == [f"part-{n:05d}.parquet" for n in range(4)]
    assert manifest["rows"]["dropped"] == {Reason.EMPTY_RESPONSE.value: 1}
    assert manifest["rows"]["noted"] == {Reason.TRUNCATED.value: 1}
    assert (manifest["rows"]["read"], manifest["rows"]["scored"]) == (10, 9)
    assert [row["row"] for row in rows if not row["ends_by_eos"]] == [7]
    for row in rows:
        assert row["response"] == ROWS[row["row"] - 1]["response"]
        spans = "".join(row["response"][start:stop] for start, stop in row["offsets"])
        assert spans == row["response"] if row["ends_by_eos"] else row["response"].startswith(spans)
    # The rewards of one row, from transformers alone.
    row = rows[2]
    tokenizer = AutoTokenizer.from_pretrained(frozen_dirs[0])
    prompt = tokenizer(row["prompt"] + "\n")["input_ids"]
    response = tokenizer(row["response"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    said = []
    for path in frozen_dirs:
        logits_BTV = AutoModelForCausalLM.from_pretrained(path)(torch.tensor([prompt + response])).logits.float()
        logp_NV = logits_BTV[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
        said.append(logp_NV.gather(1, torch.tensor(response)[:, None])[:, 0])
    assert row["rewards"] == pytest.approx((said[0] - said[1]).tolist(), abs=1e-4)
    # And the figures from the rows.
    summary = manifest["summary"]
    assert summary["tokens"] == sum(row["num_tokens"] for row in rows)
    assert summary["mean_per_token"] == pytest.approx(sum(row["sum"] for row in rows) / summary["tokens"])
    table_KN = torch.tensor([[row["sum"] for row in rows], [float(row["num_tokens"]) for row in rows]]).double()
    assert summary["sum_length_correlation"] == pytest.approx(float(torch.corrcoef(table_KN)[0, 1]), abs=1e-6)
    by_mean = [row["row"] for row in sorted(rows, key=lambda row: row["mean"])]
    assert [row["row"] for row in summary["lowest"]] == by_mean[:3]
    assert [row["row"] for row in summary["highest"]] == by_mean[:-4:-1]
    assert "9 responses" in printed
    assert "1 of 10 rows not scored: empty response (first: " in printed
    assert "line 6)" in printed
    assert matplotlib.image.imread(out / "rewards.png").shape[1] == 900
    page = (out / "rewards.html").read_text()
    assert page.count('<article class="response">') == 9
    assert "\u202e" not in page


def test_every_kind_of_file_gives_the_same(run: Callable[..., Path], tmp_path: Path) -> None:
    usable = [row for row in ROWS if "\r" not in row["response"]]
    jsonl = write_jsonl(tmp_path / "a.jsonl", usable)
    as_json = tmp_path / "b.json"
    as_json.write_text(json.dumps(usable))
    as_csv = tmp_path / "c.csv"
    with as_csv.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["prompt", "response"], quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(usable)
    as_parquet = tmp_path / "d.parquet"
    pq.write_table(pa.Table.from_pylist(usable), as_parquet)
    expected = rows_of(run(source=jsonl, out="a"))
    for path in (as_json, as_csv, as_parquet):
        assert rows_of(run("--format", "jsonl", source=path, out=path.stem)) == expected


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_killed_run_goes_on_at_the_next_block(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    whole = run("--format", form, out="whole")

    class KilledError(BaseException):
        pass

    import dpr_lightning.analysis.score as module

    score_rows, calls = module.score_rows, []

    def dying(*args: Any, **settings: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KilledError
        return score_rows(*args, **settings)

    monkeypatch.setattr(module, "score_rows", dying)
    with pytest.raises(KilledError):
        run("--format", form)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [f"part-{n:05d}.{form}" for n in range(2)] + ["settings.json"]
    # What a kill in the midst of writing leaves.
    (out / f".part-00002.{form}.partial").write_bytes(b"half")
    run("--format", form)
    # Two of the four blocks were left.
    assert len(calls) == 3 + 2
    assert contents(out) == contents(whole)
    manifests = [json.loads((path / "manifest.json").read_text()) for path in (out, whole)]
    assert manifests[0]["summary"] == manifests[1]["summary"]


def test_a_finished_run_is_shown_anew_without_any_weights(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(run())
    monkeypatch.setattr("dpr_lightning.analysis.frozen.load_policy", lambda *_, **__: pytest.fail("weights loaded"))
    out = run("--page_rows", "4")
    page = (out / "rewards.html").read_text()
    assert page.count('<article class="response">') == 4
    assert "4 of 9 scored responses; 5 more are not shown" in page
    assert {**contents(out), "rewards.html": b""} == {**before, "rewards.html": b""}


def test_changed_input_and_settings_are_refused(
    run: Callable[..., Path], data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    monkeypatch.setattr("dpr_lightning.analysis.frozen.load_policy", lambda *_, **__: pytest.fail("weights loaded"))
    with pytest.raises(SystemExit, match="2"):
        run("--block_rows", "4")
    assert "was begun with other input: block_rows (was 3, is 4)" in capsys.readouterr().err
    write_jsonl(data, [*ROWS[:-1], {"prompt": "question 4", "response": "last, changed"}])
    with pytest.raises(SystemExit, match="2"):
        run()
    assert "was begun with other input: data (was " in capsys.readouterr().err


def test_half_a_surrogate_pair_is_counted(run: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "half.jsonl"
    path.write_text('{"prompt": "p", "response": "a \\ud83d"}\n{"prompt": "p", "response": "fine"}\n')
    manifest = json.loads((run(source=path) / "manifest.json").read_text())
    assert manifest["rows"]["dropped"] == {NOT_UNICODE: 1}
    assert manifest["rows"]["first"][NOT_UNICODE] == [f"{path} line 1"]
    assert manifest["summary"]["sum_length_correlation"] is None


def test_a_block_without_a_usable_row_is_an_empty_part(run: Callable[..., Path], tmp_path: Path) -> None:
    rows = [{"prompt": "p", "response": ""}] * 3 + [{"prompt": "p", "response": "fine"}]
    out = run(source=write_jsonl(tmp_path / "gap.jsonl", rows))
    assert [row["row"] for row in rows_of(out)] == [4]
    assert pq.read_table(out / "part-00000.parquet").num_rows == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--block_rows", "0"], "--block_rows: found 0"),
        (["--page_rows", "-1"], "--page_rows: found -1"),
        (["--micro_batch_size", "0"], "--micro_batch_size: found 0"),
        (["--max_response_tokens", "0"], "--max_response_tokens: found 0"),
        (["--data", "/no/such.jsonl"], "--data: no file /no/such.jsonl"),
        (["--preset", "gsm8k"], "no column 'question' for prompt"),
        (["--columns", "prompt"], "--columns: found 'prompt'"),
    ],
)
def test_bad_input_is_refused_before_any_weights_load(
    run: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    more: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("dpr_lightning.analysis.frozen.load_policy", lambda *_, **__: pytest.fail("weights loaded"))
    with pytest.raises(SystemExit, match="2"):
        run(*more)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_rows_and_directories_are_refused(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "bad.jsonl", [*ROWS, {"prompt": "p", "response": 7}])
    for settings, message in (
        ({"source": source}, "line 11"),
        ({"source": write_jsonl(tmp_path / "none.jsonl", [{"prompt": "p", "response": ""}])}, "none of the 1 rows"),
        ({"out": "rows.jsonl"}, "is a file where a directory"),
        ({"out": "."}, "holds files but no settings.json"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run(**settings)
        assert message in capsys.readouterr().err


def test_several_references_are_one_too_many(
    frozen_dirs: tuple[str, str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(
            ["score", "--teacher", frozen_dirs[0], "--alpha", "0.5", "0.7", "--data", str(data), "--out", str(tmp_path)]
        )
    assert "--alpha: found 2 values" in capsys.readouterr().err
