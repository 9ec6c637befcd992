"""The shapes of a backbone: from its directory, the local cache, the hub, or what is published of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from transformers import AutoConfig

from dpr_lightning.errors import UserError
from dpr_lightning.models.adapters import find_source
from dpr_lightning.models.backbone import BackboneConfig, load_config, locate, of_base

_PUBLISHED = Path(__file__).resolve().parent / "architectures"
_SECONDS_TO_ANSWER = 5.0


def find_architecture(name_or_path: str, backbone: BackboneConfig) -> tuple[Any, str]:
    """Return a model's configuration, and where it was found.

    A hub name is looked up in the local cache, then on the hub if it answers, then among the architectures that ship
    with the package: the values that each model's own ``config.json`` publishes.

    Raises:
        UserError: It is nowhere.
    """
    source = find_source(name_or_path)
    name, backbone = source.base, of_base(source, backbone)
    if Path(locate(name)).is_dir():
        return _of_text(load_config(name, backbone), backbone), f"'{name}'"
    try:
        config = AutoConfig.from_pretrained(
            name, revision=backbone.revision, trust_remote_code=backbone.trust_remote_code, local_files_only=True
        )
        return _of_text(config, backbone), "the local cache"
    except (OSError, ValueError, KeyError):
        pass
    published = published_architectures()
    refusal: UserError | None = None
    if _hub_answers():
        try:
            return _of_text(load_config(name, backbone), backbone), "the hub"
        except UserError as error:
            refusal = error
    if name in published:
        why = "the hub refused it" if refusal is not None else "the hub cannot be reached"
        return AutoConfig.for_model(**published[name]), f"the package's own list, as {why}"
    if refusal is not None:
        raise refusal
    raise UserError(
        f"model.backbone.name_or_path: '{name}' is no directory, the hub cannot be reached, and the package knows the "
        f"architecture of {', '.join(published)} only; give one of them or a directory with a config.json"
    )


def _of_text(config: Any, backbone: BackboneConfig) -> Any:
    """Return the configuration of the text model where a text-only class is named for a multimodal checkpoint."""
    expected = None if backbone.model_class is None else backbone.model_class.config_class
    if expected is not None and hasattr(config, "text_config") and not isinstance(config, expected):
        return config.get_text_config()
    return config


def published_architectures() -> dict[str, dict[str, Any]]:
    """Return the text model's configuration of each backbone under ``configs/backbone``, by hub name."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(_PUBLISHED.glob("*.json"))]
    return {found["name_or_path"]: found["config"] for found in files}


def _hub_answers() -> bool:
    """Return whether the hub is there; transformers itself would try for half a minute."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=_SECONDS_TO_ANSWER)
    except Exception:  # of whichever HTTP library it uses
        return False
    return True
