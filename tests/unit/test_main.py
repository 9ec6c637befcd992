from __future__ import annotations

import subprocess
import sys

import pytest

from dpr_lightning.main import COMMANDS, TRAINER_COMMANDS, main


def test_help_names_every_command_once(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    words = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [word for word in words if word in {*TRAINER_COMMANDS, *COMMANDS}] == [*TRAINER_COMMANDS, *COMMANDS]


def test_help_imports_nothing_slow() -> None:
    code = "import sys; from dpr_lightning.main import main; main(['--help']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"'torch'", "'lightning'", "'transformers'", "'datasets'"} & set(done.stdout.strip("[]\n").split(", "))


@pytest.mark.parametrize(("arguments", "found"), [([], "found none"), (["trian", "-c", "x.yaml"], "found 'trian'")])
def test_an_unknown_command_is_told_which_there_are(
    arguments: list[str], found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert f"COMMAND: {found}; give one of fit, validate, test, predict, demo" in capsys.readouterr().err
