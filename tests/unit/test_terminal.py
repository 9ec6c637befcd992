"""Text from outside reaches the terminal as it is, whatever rich would read in it."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from dpr_lightning.judging.page import render_page
from dpr_lightning.judging.paper import PaperPreset
from dpr_lightning.judging.records import GameRecord, PairRecord
from dpr_lightning.judging.report import judged_model, print_result
from dpr_lightning.terminal import Table, headline, make_console

TEXTS = ["[/b]", "[bold]x[/bold]", "[/]", "[red", "]", "\\[b]", "[link=http://x]y[/link]", ":smile:", "[@click=x]y[/]"]


def written(*printed: Any, markup: bool = True) -> str:
    console = Console(file=io.StringIO(), width=500, markup=markup)
    for renderable in printed:
        console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("text", TEXTS)
def test_tables_show_text_on_any_console(text: str) -> None:
    table = Table(text, title=f"title {text}")
    table.add_column(f"second {text}", justify="right")
    table.add_row(f"cell {text}", None)
    table.add_row("", text)
    shown = written(table)
    assert shown.count(text) >= 5
    assert f"title {text}" in shown
    assert f"cell {text}" in shown


@pytest.mark.parametrize("text", TEXTS)
def test_consoles_show_text(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    console = make_console(120)
    console.print(f"error: {text}", highlight=False)
    console.rule(headline(f"method {text}"))
    shown = capsys.readouterr().out
    assert f"error: {text}" in shown
    assert f"method {text}" in shown


@pytest.mark.parametrize("text", TEXTS)
def test_a_judges_report_of_any_names(text: str) -> None:
    game = GameRecord(value=1.0, first="model")
    records = [
        PairRecord(key=str(n), model=text, baseline=f"b{text}", games=(game,), category=f"{text}{n % 2}")
        for n in range(4)
    ]
    model = judged_model(records, PaperPreset(), lost={f"no {text}": 0}, repeated={}, max_failed=1.0, seed=0)
    result = {"preset": text, "judge": f"judge {text}", "models": [model]}
    console = Console(file=io.StringIO(), width=500)
    print_result(result, console)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    for part in (text, f"b{text}", f"{text}0", f"judge {text}"):
        assert part in shown
    assert render_page(result, records)
