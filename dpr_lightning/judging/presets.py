"""The presets by name, made from what the command line gives."""

from __future__ import annotations

from pathlib import Path

from dpr_lightning.errors import UserError
from dpr_lightning.judging.alpaca_eval import AlpacaEval1Preset, AlpacaEval2Preset, AlpacaEvalPreset
from dpr_lightning.judging.arena_hard import ArenaHard2Preset, ArenaHardPreset
from dpr_lightning.judging.length_control import LengthControl
from dpr_lightning.judging.mt_bench import TEMPLATE_NAMES, MTBenchPreset
from dpr_lightning.judging.mt_bench_pair import PAIR_TEMPLATE_NAMES, MTBenchPairPreset
from dpr_lightning.judging.paper import PaperPreset
from dpr_lightning.judging.preset import Preset
from dpr_lightning.judging.templates import alpaca_eval_template, arena_hard_template, mt_bench_templates

PRESETS: dict[str, type[Preset]] = {
    preset.name: preset
    for preset in (
        PaperPreset,
        AlpacaEval1Preset,
        AlpacaEval2Preset,
        ArenaHardPreset,
        ArenaHard2Preset,
        MTBenchPreset,
        MTBenchPairPreset,
    )
}


def make_preset(
    name: str,
    *,
    templates: Path | None = None,
    will_ask: bool = True,
    length_control: LengthControl | None = None,
    max_tokens: int = 512,
) -> Preset:
    """Return a preset, with its templates where a model will be asked.

    Args:
        name: A key of :data:`PRESETS`.
        templates: The user's file of templates.
        will_ask: Whether templates are wanted.
        length_control: For AlpacaEval only.
        max_tokens: Longest reply of the judge under ``paper``; the official presets have their own.

    Raises:
        UserError: A template is missing, or something does not go with the preset.
    """
    kind = PRESETS[name]
    if length_control is not None and not issubclass(kind, AlpacaEvalPreset):
        raise UserError(f"--gamed_baseline: it belongs to AlpacaEval, found --preset {name}; leave it out")
    if templates is not None and (kind is PaperPreset or not will_ask):
        raise UserError("--templates: no template is asked for here; leave it out")
    if kind is PaperPreset:
        return PaperPreset(max_tokens=max_tokens)
    if issubclass(kind, AlpacaEvalPreset):
        template = alpaca_eval_template(templates, kind.template_file) if will_ask else []
        return kind(template=template, length_control=length_control)
    if issubclass(kind, ArenaHardPreset):
        system, user = arena_hard_template(templates) if will_ask else ("", "")
        return kind(system=system, template=user)
    if kind is MTBenchPairPreset:
        return MTBenchPairPreset(templates=mt_bench_templates(templates, PAIR_TEMPLATE_NAMES) if will_ask else None)
    return MTBenchPreset(templates=mt_bench_templates(templates, TEMPLATE_NAMES) if will_ask else None)
