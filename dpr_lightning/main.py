"""The program: one word for Trainer's subcommands and for the commands beside them.

Whatever is slow to import is imported by the command that needs it.
"""

from __future__ import annotations

import errno
import importlib
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from dpr_lightning.errors import CheckpointError, NonFiniteError, RunIsFinished, UserError

TRAINER_COMMANDS = {
    "fit": "train by one of configs/recipe",
    "validate": "figures on held-out prompts",
    "test": "the same on the test split",
    "predict": "answers to held-out prompts, inside the Trainer",
}
"""LightningCLI's subcommands, and the line that ``--help`` shows."""

COMMANDS = {
    "demo": ("dpr_lightning.demo.run", "train and compare SFT, continued SFT and DPR on the embedded tasks"),
    "plan": ("dpr_lightning.planning.command", "what a run of fit will need: memory, time, and whether it fits"),
    "diagnose": ("dpr_lightning.analysis.diagnose", "before any RL: does the dense reward know better from worse?"),
    "score": ("dpr_lightning.analysis.score", "token rewards of any responses, as a table and a page"),
    "credit": ("dpr_lightning.analysis.credit", "does the dense reward find a corrupted token, and the better answer?"),
    "variance": ("dpr_lightning.analysis.variance", "variance of the policy gradient by reward and return"),
    "generate": ("dpr_lightning.generation.command", "responses of any checkpoint to the prompts of a file"),
    "evaluate": ("dpr_lightning.protocol.command", "a run against its teacher on benchmarks"),
    "judge": ("dpr_lightning.judging.command", "win rates and ratings of responses by a judge, or of stored judgments"),
    "sweep": ("dpr_lightning.analysis.sweep", "many runs of one experiment, their results and their figures"),
}
"""Commands beside them: module with a ``main(args)``, and the line that ``--help`` shows."""


def main(args: Sequence[str] | None = None) -> None:
    """Run one command; a mistake of the user's is one line on standard error and exit status 2."""
    arguments = list(sys.argv[1:] if args is None else args)
    if arguments in (["--help"], ["-h"]):
        print(program_help())
        return
    if not arguments or not (arguments[0].startswith("-") or arguments[0] in {*TRAINER_COMMANDS, *COMMANDS}):
        found = f"found '{arguments[0]}'" if arguments else "found none"
        names = ", ".join([*TRAINER_COMMANDS, *COMMANDS])
        sys.stderr.write(f"dpr-lightning: error: COMMAND: {found}; give one of {names}\n")
        raise SystemExit(2)
    from dpr_lightning.quiet import quieten

    quieten()
    try:
        if arguments and arguments[0] in COMMANDS:
            importlib.import_module(COMMANDS[arguments[0]][0]).main(arguments[1:])
            return
        from dpr_lightning.application import command_line

        command_line(packaged_configs(arguments))
    except RunIsFinished as finished:
        print(finished)
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            error = UserError(f"'{error.filename!s:.60}...' is longer than file names may be; choose a shorter one")
        if not isinstance(error, _refusals()):
            raise
        sys.stderr.write(f"dpr-lightning: error: {' '.join(str(error).split())}\n")
        raise SystemExit(1 if isinstance(error, NonFiniteError | CheckpointError) else 2) from error


def program_help() -> str:
    """Return what ``--help`` prints."""
    lines = ["usage: dpr-lightning COMMAND ...", ""]
    lines += ["Dense-Path REINFORCE: more out of the demonstrations that SFT was trained on.", ""]
    for title, found in (
        ("training, by Lightning", TRAINER_COMMANDS.items()),
        ("before and after", ((name, text) for name, (_, text) in COMMANDS.items())),
    ):
        lines.append(f"{title}:")
        for name, text in found:
            lines += textwrap.wrap(text, 100, initial_indent=f"  {name:<10}", subsequent_indent=" " * 12)
        lines.append("")
    return "\n".join([*lines, "Each has its own --help."])


def _refusals() -> tuple[type[BaseException], ...]:
    """Return the errors that are the user's to mend; Lightning's own only where it has been imported."""
    lightning = sys.modules.get("lightning.fabric.utilities.exceptions")
    theirs = [] if lightning is None else [lightning.MisconfigurationException]
    return (UserError, NonFiniteError, CheckpointError, *theirs)


def packaged_configs(args: Sequence[str]) -> list[str]:
    """Return ``args`` with every ``configs/...`` that does not exist here replaced by the package's own file."""
    own = Path(__file__).resolve().parent
    return [
        str(own / arg) if arg.startswith("configs/") and not Path(arg).exists() and (own / arg).is_file() else arg
        for arg in args
    ]
