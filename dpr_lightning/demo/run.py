"""``dpr-lightning demo``: SFT, its half-training reference, DPR and continued SFT on the embedded tasks, compared.

Every stage is the command line that a user would type, with the overlays of ``configs/demo``; this file only makes
the data, strings the stages together, and measures.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm import tqdm

from dpr_lightning.analysis.frozen import find_policies
from dpr_lightning.analysis.measure import steps_for, token_forwards
from dpr_lightning.analysis.preferences import DENSE, TEACHER, rank
from dpr_lightning.analysis.teacher_samples import draw_and_score
from dpr_lightning.data.demonstrations import DemonstrationConfig
from dpr_lightning.data.prompts import Prompts, load_prompts
from dpr_lightning.data.templates import TextTemplate
from dpr_lightning.demo import report
from dpr_lightning.demo.data import EmbeddedTasks
from dpr_lightning.demo.verifier import TaskVerifier
from dpr_lightning.errors import UserError
from dpr_lightning.evaluation.answers import Answers, answer
from dpr_lightning.evaluation.ranking import pair_up
from dpr_lightning.manifest import atomic_write_json, environment, read_json, read_run_record
from dpr_lightning.models.backbone import BackboneConfig, load_tokenizer
from dpr_lightning.terminal import headline, make_console
from dpr_lightning.types import SamplingConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NUM_DEMONSTRATIONS = 640
SLIP_SHARE = 0.15
"""Share of demonstrations with a wrong result, as people's have: imitation alone has a ceiling there."""
NUM_VALIDATION = 200
NUM_TEST = 500
NUM_SAMPLES = 4
"""Responses to each test prompt above temperature 0."""
NUM_RANKED = 8
"""Samples of the teacher to each validation prompt for the ranking diagnostic."""
RANKING_BATCH = 256
"""Of these, how many one scoring forward takes."""
TEMPERATURES = (0.0, 0.7, 1.0)
SAMPLING = SamplingConfig(max_new_tokens=40, batch_size=512)


def main(args: Sequence[str] | None = None) -> None:
    """Run the demo for one seed or several and print its table."""
    parser = argparse.ArgumentParser(prog="dpr-lightning demo", description=main.__doc__)
    parser.add_argument("--run_dir", type=Path, default=Path("runs/demo"), help="where everything is written")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run for each; several give a summary")
    parser.add_argument(
        "--split", choices=["validation", "test"], default="test", help="prompts to compare on; tune on validation"
    )
    parsed = parser.parse_args(args)
    # A log file has no width; the table needs this much.
    console = make_console(132)
    results = []
    for seed in parsed.seeds:
        result = run_seed(parsed.run_dir / f"seed_{seed}", seed=seed, split=parsed.split, console=console)
        results.append(result)
    if len(results) > 1:
        summary = report.summarize(results)
        atomic_write_json(parsed.run_dir / "summary.json", summary)
        report.print_summary(summary, console)


def run_seed(run_dir: Path, *, seed: int, split: str, console: Console) -> dict[str, Any]:
    """Train and compare for one seed; a finished seed's result is read back.

    Raises:
        UserError: ``run_dir`` holds an unfinished run.
    """
    finished = run_dir / "report.json"
    if finished.exists():
        result = read_json(finished)
        if result["split"] != split:
            raise UserError(f"run_dir: '{run_dir}' was compared on {result['split']} prompts; choose another --run_dir")
        report.print_report(result, run_dir, console)
        return result
    if run_dir.exists():
        raise UserError(f"run_dir: '{run_dir}' holds an unfinished demo; delete it or choose another --run_dir")
    start = time.perf_counter()
    files = _write_data(run_dir / "data", seed)
    data = [
        f"--data.demonstrations.source={files['train']}",
        f"--data.demonstrations.validation_source={files['validation']}",
    ]

    console.rule(headline(f"1/5 SFT, with references on the way (seed {seed})"))
    _fit("sft", ["sft"], run_dir / "sft", seed, data)
    sft = run_dir / "sft" / "final"

    console.rule(headline("2/5 Before any RL: does the dense reward know right from wrong?"))
    prompts = {name: _load(files[name], sft) for name in ("validation", "test")}
    ranking = _rank(run_dir / "sft", prompts["validation"], seed)
    report.print_ranking(ranking, console)

    console.rule(headline("3/5 Dense-Path REINFORCE"))
    _fit("dpr", ["rollouts", "dpr"], run_dir / "dpr", seed, [f"--model.teacher={run_dir / 'sft'}"])
    compute = _compute(run_dir)

    console.rule(headline(f"4/5 SFT continued for the same compute ({compute['continued_steps']} steps)"))
    continued = [f"--model.backbone.name_or_path={sft}", f"--trainer.max_steps={compute['continued_steps']}"]
    _fit("sft", ["sft", "continued"], run_dir / "continued", seed, [*data, *continued])

    console.rule(headline(f"5/5 {len(prompts[split])} {split} prompts"))
    policies = {"SFT": sft, "SFT continued": run_dir / "continued" / "final", "DPR": run_dir / "dpr" / "final"}
    answers = _answer(policies, prompts[split], seed)
    result = {
        "seed": seed,
        "split": split,
        "num_prompts": len(prompts[split]),
        "num_samples": NUM_SAMPLES,
        "ranking": ranking,
        "compute": compute,
        "policies": report.measure(answers, baseline="SFT", seed=seed),
        "seconds": time.perf_counter() - start,
        "environment": environment(),
    }
    atomic_write_json(finished, result)
    report.print_report(result, run_dir, console)
    return result


def _write_data(directory: Path, seed: int) -> dict[str, Path]:
    """Write demonstrations and held-out tasks; return the files by split. The seed changes demonstrations."""
    directory.mkdir(parents=True)
    tasks = EmbeddedTasks(NUM_DEMONSTRATIONS, SLIP_SHARE, num_validation=NUM_VALIDATION, num_test=NUM_TEST)
    return tasks(directory, seed)


def _fit(recipe: str, overlays: Sequence[str], run_dir: Path, seed: int, extra: Sequence[str]) -> None:
    """Run ``dpr-lightning fit`` in this process, and show the command."""
    from dpr_lightning.main import main as run_command

    names = ["base", f"recipe/{recipe}", "backbone/tiny", "hardware/cpu", *(f"demo/{name}" for name in overlays)]
    configs = [argument for name in names for argument in ("-c", str(CONFIGS / f"{name}.yaml"))]
    command = ["fit", *configs, f"--run_dir={run_dir}", f"--seed_everything={seed}", f"--data.seed={seed}", *extra]
    print("dpr-lightning", shlex.join(command), file=sys.stderr)
    run_command(command)


def _load(path: Path, model_dir: Path) -> Prompts:
    config = DemonstrationConfig(source=str(path))
    tokenizer = load_tokenizer(str(model_dir), BackboneConfig(name_or_path=str(model_dir)))
    return load_prompts(config, template=TextTemplate(), tokenizer=tokenizer)["train"]


def _rank(run_dir: Path, prompts: Prompts, seed: int) -> dict[str, Any]:
    """How often the dense reward at each alpha, and log pi_SFT, put a right answer above a wrong one to its prompt."""
    batch = prompts.batch(range(len(prompts)))
    policies = find_policies(str(run_dir), micro_batch_size=RANKING_BATCH)
    drawn = draw_and_score(
        policies,
        batch.prompt_ids,
        batch.rows,
        verifier=TaskVerifier(),
        sampling=SAMPLING,
        num_samples=NUM_RANKED,
        seed=seed,
    )
    assert drawn.is_correct_N is not None
    pairs = pair_up(drawn.is_correct_N, drawn.prompt_index_N)
    summed = {(row["score"], row["alpha"]): row for row in rank(drawn.scored, pairs, seed=seed) if row["of"] == "sum"}
    return {
        "num_prompts": len(prompts),
        "num_samples": NUM_RANKED,
        "num_pairs": len(pairs),
        "accuracy": float(drawn.is_correct_N.mean()),
        "dense": {
            alpha: {"share": row["accuracy"], "length_correlation": row["pearson"]}
            for alpha in policies.references
            for row in (summed[DENSE, alpha],)
        },
        "logp": summed[TEACHER, None]["accuracy"],
    }


def _compute(run_dir: Path) -> dict[str, Any]:
    """Count what DPR spent beyond SFT, and how many SFT steps that buys."""
    sft, dpr = read_run_record(run_dir / "sft" / "run.json"), read_run_record(run_dir / "dpr" / "run.json")
    forwards = token_forwards(dpr)
    return {
        "token_forwards": forwards,
        "sft_steps": sft["optimizer_steps"],
        "dpr_steps": dpr["optimizer_steps"],
        "continued_steps": steps_for(forwards, sft),
    }


def _answer(policies: dict[str, Path], prompts: Prompts, seed: int) -> dict[str, dict[float, Answers]]:
    batch = prompts.batch(range(len(prompts)))
    per_policy = sum(NUM_SAMPLES if temperature > 0 else 1 for temperature in TEMPERATURES) * len(prompts)
    with tqdm(total=per_policy * len(policies), desc="Answers", unit="response") as bar:
        return {
            name: answer(
                model_dir,
                batch.prompt_ids,
                batch.rows,
                verifier=TaskVerifier(),
                sampling=SAMPLING,
                temperatures=TEMPERATURES,
                num_samples=NUM_SAMPLES,
                seed=seed,
                on_progress=bar.update,
            )
            for name, model_dir in policies.items()
        }
