"""The result as one HTML page: nothing is loaded from elsewhere, and all text from outside is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from dpr_lightning.judging.preset import Record
from dpr_lightning.judging.records import PairRecord
from dpr_lightning.judging.report import describe_counts, show, show_figure

_MAX_JUDGMENTS = 1000
_MAX_CHARACTERS = 4000

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
body { font: 15px/1.45 sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; }
th, td { border-bottom: 1px solid #ccc; padding: 0.25rem 0.75rem; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f5f5; padding: 0.5rem; }
.refused { color: #a00; font-weight: bold; }
.bar { background: #47a; height: 0.8rem; }
.scale { width: 12rem; background: #e5e5e5; }
</style></head><body>
<h1>{{ title }}</h1>
{% for model in models %}
<h2>{{ model.model }}{% if model.baseline %} against {{ model.baseline }}{% endif %}</h2>
{% if model.refused %}<p class="refused">No score: {{ model.refused }}</p>{% endif %}
{% for warning in model.warnings %}<p class="refused">Warning: {{ warning }}</p>{% endfor %}
<ul>{% for line in counts(model.counts) %}<li>{{ line }}</li>{% endfor %}</ul>
{% if model.official %}<table><tr><th>official figure</th><th>value</th><th>how</th></tr>
{% for figure in model.official %}
<tr><td>{{ figure.name }}</td><td class="number">{{ show_figure(figure) }}</td><td>{{ figure.note }}</td></tr>
{% endfor %}</table>{% endif %}
{% if model.win_rate %}<table>
<tr><th>win rate over games, 95% over prompts</th><td class="number">{{ show(model.win_rate) }}</td></tr>
<tr><th>{{ model.units.wins_ties_losses }} won, tied, lost as a whole</th>
<td class="number">{{ model.win_rate.wins }}, {{ model.win_rate.ties }}, {{ model.win_rate.losses }}</td></tr>
<tr><th>share of prompts whose orders agree</th><td class="number">{{ show(model.order.consistency) }}</td></tr>
<tr><th>preference for the answer shown first</th><td class="number">{{ show(model.order.first_shown) }}</td></tr>
</table>{% endif %}
{% if model.length %}<table><tr><th>characters longer</th><th>win rate</th><th>prompts</th><th></th></tr>
{% for row in model.length.bins %}
<tr><td>{{ row.from }} to {{ row.to }}</td><td class="number">{{ show(row) }}</td><td class="number">{{ row.n }}</td>
<td><div class="scale"><div class="bar" style="width: {{ "%.1f"|format(100 * row.value) }}%"></div></div></td></tr>
{% endfor %}</table>{% endif %}
{% if model.categories %}<table><tr><th>category</th><th>win rate</th><th>prompts</th></tr>
{% for row in model.categories %}
<tr><td>{{ row.category }}</td><td class="number">{{ show(row) }}</td><td class="number">{{ row.n }}</td></tr>
{% endfor %}</table>{% endif %}
{% endfor %}
<h2>Judgments</h2>
<p>{{ judgments|length }} of {{ num_judgments }}; long texts are cut.</p>
{% for judgment in judgments %}
<details><summary>{{ judgment.key }}: {{ judgment.verdict }}</summary>
{% if judgment.prompt %}<pre>{{ judgment.prompt }}</pre>{% endif %}
{% for text in judgment.texts %}<pre>{{ text }}</pre>{% endfor %}
</details>
{% endfor %}
</body></html>
"""


def render_page(result: Mapping[str, Any], records: Sequence[Record]) -> str:
    """Return the page.

    Args:
        result: What ``report.json`` holds.
        records: The judgments; the first thousand are listed.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.ChainableUndefined)
    functions: dict[str, Any] = {"show": show, "show_figure": show_figure, "counts": describe_counts}
    return environment.from_string(_PAGE).render(
        title=f"Judged by {result['judge']}, preset {result['preset']}",
        models=result["models"],
        judgments=[_judgment(record) for record in records[:_MAX_JUDGMENTS]],
        num_judgments=len(records),
        **functions,
    )


def _judgment(record: Record) -> dict[str, Any]:
    if isinstance(record, PairRecord):
        verdicts = [
            f"{game.label} ({game.first} first)" if game.value is not None else f"none ({game.failure})"
            for game in record.games
        ]
        verdict, texts = ", ".join(verdicts), [game.text for game in record.games if game.text]
    else:
        verdict = f"turn {record.turn}, {'none' if record.rating is None else f'{record.rating:g}'}"
        texts = [record.text]
    return {
        "key": _cut(record.key, 100),
        "verdict": verdict,
        "prompt": _cut(record.prompt, _MAX_CHARACTERS),
        "texts": [_cut(text, _MAX_CHARACTERS) for text in texts],
    }


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."
