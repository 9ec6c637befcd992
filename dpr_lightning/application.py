"""LightningCLI over YAML overlays: ``fit``, ``validate``, ``test`` and ``predict``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning import LightningDataModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins import CheckpointIO
from typing_extensions import override

from dpr_lightning.arguments import Parser
from dpr_lightning.callbacks.run_recorder import RunRecorder
from dpr_lightning.checkpoints import VerifiedCheckpointIO
from dpr_lightning.errors import UserError
from dpr_lightning.modules.base import CausalLMModule
from dpr_lightning.quiet import quieten
from dpr_lightning.run_directory import (
    CHECKPOINTS,
    INITIAL,
    TENSORBOARD,
    RunLogger,
    check_checkpoint,
    check_run_dir,
    find_trained_weights,
    locked,
    where_to_go_on,
)
from dpr_lightning.strategy import FullyShardedStrategy, check_strategy
from dpr_lightning.yaml_text import load_yaml

_SMALLEST = {
    "logprob_chunk_size": 1,
    "score_micro_batch_size": 1,
    "micro_batch_size": 1,
    "num_validation_prompts": 1,
    "seed": 0,
    "prediction_seed": 0,
}
"""Smallest value of settings of the model or the data that every subcommand uses."""


class CommandLine(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict`` for any module and data of this package.

    ``--run_dir`` is the one place that a run writes to: configuration, manifest, TensorBoard logs, checkpoints and
    model directories all lie below it.

    Args:
        args: See ``LightningCLI``.
        while_it_runs: What to leave when the command has ended.
        kwargs: See ``LightningCLI``.
    """

    def __init__(self, *args: Any, while_it_runs: ExitStack, **kwargs: Any) -> None:
        self.while_it_runs = while_it_runs
        self.trained_weights: str | None = None
        """What ``validate``, ``test`` and ``predict`` evaluate; None is a checkpoint, or where the run starts."""
        super().__init__(*args, **kwargs)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str, default="runs/run", help="Directory of all that this run writes.")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # Lightning's own warns whenever main(args) is called from a program that has arguments itself.
        self.config = parser.parse_args(args)  # type: ignore[arg-type]
        seed = self.config[self.config.subcommand].seed_everything
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise UserError(f"seed_everything: found {seed}; give a whole number from 0 to {2**32 - 1}")

    @override
    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        run_dir = Path(config.run_dir)
        check_run_dir(run_dir)
        is_fit = self.subcommand == "fit"
        if not is_fit and config.ckpt_path is None:
            self.trained_weights = find_trained_weights(run_dir)
        if not is_fit and config.ckpt_path == INITIAL:
            config.ckpt_path = None
        check_checkpoint(config.ckpt_path, run_dir)
        for name in ("max_epochs", "max_steps") if is_fit else ():
            if config.trainer[name] == 0:
                raise UserError(f"trainer.{name}: must be >= 1, got 0; no optimizer step would be taken")
        if self.subcommand == "fit" and not config.trainer.fast_dev_run:
            self.while_it_runs.enter_context(locked(run_dir))
        if self.subcommand == "fit" and not config.ckpt_path:
            text = self._parser(self.subcommand).dump(config, skip_none=False)
            config.ckpt_path = where_to_go_on(run_dir, load_yaml(text))
            self.save_config_kwargs["goes_on"] = config.ckpt_path is not None
        elif config.ckpt_path == "last":
            config.ckpt_path = str(run_dir / CHECKPOINTS)
        self.parser.add_instantiator(self._construct, object, subclasses=True)

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (MisconfigurationException, ValueError) as error:
            raise UserError(str(_innermost(error))) from error
        self.model.trained_weights = self.trained_weights
        try:
            # Now, and not when the weights are there: what its constructor refuses.
            self.model.optimizer([torch.nn.Parameter(torch.zeros(1))])
        except TypeError as error:
            raise UserError(f"model.optimizer: {error}; change it") from error
        if (
            isinstance(getattr(self.trainer, "strategy", None), FullyShardedStrategy)
            and self.model.backbone.quantization is not None
        ):
            raise UserError("model.backbone.quantization: a base in 4 bits cannot be sharded; use ddp, or leave it out")
        owners = (self.model, self.datamodule, getattr(self.datamodule, "demonstrations", None))
        for key, owner in zip(("model", "data", "data.demonstrations"), owners, strict=True):
            for name, smallest in _SMALLEST.items():
                value = getattr(owner, name, None)
                if value is not None and value < smallest:
                    raise UserError(f"{key}.{name}: found {value}; give a whole number of at least {smallest}")

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        # Set on the objects and not in the configuration, which is recorded and must be good for another run_dir.
        run_dir = Path(self.config[self.subcommand].run_dir)
        settings = self.config_init[self.subcommand].trainer
        if settings.logger in (None, True):
            is_predict = self.subcommand == "predict"
            kwargs["logger"] = False if is_predict else RunLogger(run_dir, name="", version=TENSORBOARD)
        plugins = settings.plugins if isinstance(settings.plugins, list) else [settings.plugins]
        settings.plugins = [plugin for plugin in plugins if plugin is not None]
        if not any(isinstance(plugin, CheckpointIO) for plugin in settings.plugins):
            settings.plugins.append(VerifiedCheckpointIO())
        settings.strategy = check_strategy(settings.strategy)
        settings.callbacks = without_replaced(settings.callbacks)
        for callback in settings.callbacks or []:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(run_dir / CHECKPOINTS)
        try:
            return super().instantiate_trainer(default_root_dir=run_dir, **kwargs)
        except (MisconfigurationException, TypeError, ValueError) as error:
            raise UserError(f"trainer: {error}") from error

    def _construct(self, class_type: type, *args: Any, **kwargs: Any) -> Any:
        """Make one object of the configuration; what its constructor refuses is refused under its key."""
        kwargs.pop("applied_instantiation_links", None)
        try:
            return class_type(*args, **kwargs)
        except UserError:
            raise
        except (MisconfigurationException, ValueError) as error:
            key = _key_of(class_type, kwargs, self.config[self.subcommand])
            raise UserError(f"{key}: {error}; change it") from error


def without_replaced(callbacks: Any) -> Any:
    """Return a list of callbacks without those of ours that a later one of the same class replaces.

    An overlay gives a recipe's callback other settings by ``callbacks+:``; two of them would both watch the run.
    """
    if not isinstance(callbacks, list):
        return callbacks
    # Checkpoints by different figures, and those by none, stand beside each other.
    later = [(type(callback), getattr(callback, "monitor", None)) for callback in callbacks]
    kept = []
    for callback in callbacks:
        own = later.pop(0)
        if not type(callback).__module__.startswith("dpr_lightning.") or own not in later:
            kept.append(callback)
    return kept


def _innermost(error: BaseException) -> BaseException:
    """Return the refusal inside the errors that jsonargparse wraps around it, or ``error`` if there is none."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            error = cause
        cause = cause.__cause__
    return error


def _key_of(class_type: type, settings: dict[str, Any], config: Namespace) -> str:
    """Return the key of the object of ``class_type`` that is made of ``settings``."""
    of_class = [(key, found) for key, name, found in _settings(config) if name in ("", class_type.__name__)]
    same = [key for key, found in of_class if found == settings]
    named = [key for key, name, _ in _settings(config) if name == class_type.__name__]
    return (same + named + [class_type.__name__])[0]


def _settings(node: Any, key: str = "") -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield key, name of the class (empty for a dataclass) and settings of every object below ``node``."""
    if isinstance(node, list):
        for item in node:
            yield from _settings(item, f"{key}.{_class_name(item)}")
    if not isinstance(node, Namespace):
        return
    inner = node.get("init_args", Namespace()) if "class_path" in node else node
    yield key, _class_name(node), dict(vars(inner))
    for name, value in vars(inner).items():
        yield from _settings(value, f"{key}.{name}" if key else name)


def _class_name(node: Any) -> str:
    return str(node.get("class_path", "")).rpartition(".")[2] if isinstance(node, Namespace) else ""


def command_line(args: ArgsType = None, *, run: bool = True, kind: type[CommandLine] | None = None) -> CommandLine:
    """Parse ``args`` (``sys.argv`` if None), build the classes, and run the subcommand; ``kind`` does it otherwise."""
    quieten()
    command = shlex.join(["dpr-lightning", *(args if isinstance(args, list) else sys.argv[1:])])
    with ExitStack() as while_it_runs:
        return _command_line(args, command, while_it_runs, run=run, kind=kind or CommandLine)


def _command_line(
    args: ArgsType, command: str, while_it_runs: ExitStack, *, run: bool, kind: type[CommandLine]
) -> CommandLine:
    return kind(
        CausalLMModule,
        LightningDataModule,
        trainer_class=Trainer,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_callback=RunRecorder,
        save_config_kwargs={"save_to_log_dir": False, "command": command},
        auto_configure_optimizers=False,
        parser_class=Parser,
        parser_kwargs={
            "prog": "dpr-lightning",
            "description": "Dense-Path REINFORCE: more out of the demonstrations that SFT was trained on.",
        },
        args=args,
        run=run,
        while_it_runs=while_it_runs,
    )
