"""The command line: LightningCLI's subcommands over YAML overlays, and commands that are not about one Trainer."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning import LightningDataModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from typing_extensions import override

from dpr_lightning.arguments import Parser
from dpr_lightning.callbacks.run_recorder import RunRecorder
from dpr_lightning.errors import NonFiniteError, UserError
from dpr_lightning.modules.base import CausalLMModule

COMMANDS = {"demo": ("dpr_lightning.demo.run", "train and compare SFT, continued SFT and DPR on the embedded tasks")}
"""Commands beside Trainer's: module with a ``main(args)``, and the line that ``--help`` shows."""


class CommandLine(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict`` for any module and data of this package.

    ``--run_dir`` is the one place that a run writes to: configuration, manifest, TensorBoard logs, checkpoints and
    model directories all lie below it.
    """

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str, default="runs/run", help="The one directory that this run writes to.")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # Lightning's own warns whenever main(args) is called from a program that has arguments itself.
        self.config = parser.parse_args(args)

    @override
    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        run_dir = Path(config.run_dir)
        if self.subcommand == "fit":
            check_run_dir(run_dir, is_resuming=bool(config.ckpt_path))
        config.trainer.default_root_dir = str(run_dir)
        if config.trainer.logger in (None, True):
            config.trainer.logger = _tensorboard(run_dir) if self.subcommand != "predict" else False
        for callback in config.trainer.callbacks or []:
            if callback.class_path.endswith(".ModelCheckpoint") and callback.init_args.dirpath is None:
                callback.init_args.dirpath = str(run_dir / "checkpoints")


def _tensorboard(run_dir: Path) -> Namespace:
    return Namespace(
        class_path="lightning.pytorch.loggers.TensorBoardLogger",
        init_args=Namespace(save_dir=str(run_dir), name="", version="tensorboard"),
    )


def check_run_dir(run_dir: Path, *, is_resuming: bool) -> None:
    """Refuse a directory that cannot be written to, or that holds another run.

    Raises:
        UserError: With what to do.
    """
    existing = next(path for path in [run_dir.absolute(), *run_dir.absolute().parents] if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"run_dir: '{run_dir}' cannot be written to ('{existing}' forbids it); choose another")
    if (run_dir / "config.yaml").exists() and not is_resuming:
        raise UserError(
            f"run_dir: '{run_dir}' already holds a run; continue it with --ckpt_path last, choose another --run_dir, "
            "or delete it"
        )


def command_line(args: ArgsType = None, *, run: bool = True) -> CommandLine:
    """Parse ``args`` (``sys.argv`` if None), build the classes, and run the subcommand."""
    return CommandLine(
        CausalLMModule,
        LightningDataModule,
        trainer_class=Trainer,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_callback=RunRecorder,
        save_config_kwargs={"save_to_log_dir": False},
        auto_configure_optimizers=False,
        parser_class=Parser,
        parser_kwargs={
            "prog": "dpr-lightning",
            "description": "Dense-Path REINFORCE: more out of the demonstrations that SFT was trained on.",
            "epilog": "Further commands: "
            + "; ".join(f"{name} ({text})" for name, (_, text) in COMMANDS.items())
            + ". Each has its own --help.",
        },
        args=args,
        run=run,
    )


def main(args: Sequence[str] | None = None) -> Any:
    """Run one command; a mistake of the user's is one line on standard error and exit status 2."""
    arguments = list(sys.argv[1:] if args is None else args)
    try:
        if arguments and arguments[0] in COMMANDS:
            return importlib.import_module(COMMANDS[arguments[0]][0]).main(arguments[1:])
        return command_line(arguments)
    except (UserError, NonFiniteError) as error:
        sys.stderr.write(f"dpr-lightning: error: {error}\n")
        raise SystemExit(2 if isinstance(error, UserError) else 1) from error
