"""The paper's comparison: a Tokenformer that grows, one from scratch, a dense twin, Net2Net's growth of that.

Each arm of --config is trained for each seed by the stage machine.  What is done is skipped, so a call that
was stopped goes on.  In the end, or with --report-only for what is done so far, it writes RUN_DIR/results.md,
results.json and perplexity_vs_flops.png.  The CPU-sized study needs the data of examples/demo/run.sh.

examples:
  python examples/scaling_study/study.py --dry-run
  nohup python examples/scaling_study/study.py > runs/scaling_study.log &
  python examples/scaling_study/study.py --config examples/scaling_study/gpu.yaml --launcher deepspeed
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

from arms import Run, load_study, plan_runs
from outcome import as_json, outcomes, render
from picture import study_chart
from tqdm import tqdm

from megatron_tokenformer.config.sizes import parameter_count
from megatron_tokenformer.durable import replace_durably
from megatron_tokenformer.errors import run_cli
from megatron_tokenformer.evaluation.picture import draw
from megatron_tokenformer.metrics_file import read_rows
from megatron_tokenformer.progressive.launchers import LAUNCHERS
from megatron_tokenformer.several import call_python, for_all

HERE = Path(__file__).parent
PLOT, CALLS = "perplexity_vs_flops.png", "calls.jsonl"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", type=Path, default=HERE / "study.yaml", help="the study (default: that of the CPU)")
    add("--launcher", choices=list(LAUNCHERS), default="local", help="of the stage machine (default: local)")
    add("--dry-run", action="store_true", help="print the arms with their sizes, and train nothing")
    add("--report-only", action="store_true", help="report what is done so far, and train nothing")
    add("overrides", nargs="*", metavar="key=value", help="changes to the study, such as seeds='[1]' jobs=1")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Train what is not trained yet, and report."""
    given = parse(argv)
    study = load_study(given.config, given.overrides)
    runs = plan_runs(study, given.config)
    print(described(runs[: len(study.arms)]), flush=True)
    if given.dry_run:
        return 0
    if not given.report_only:
        record_call(Path(study.run_dir) / CALLS)
        train(runs, given.launcher, study.jobs)
    done = [run for run in runs if run.done]
    found = outcomes(study, done)
    folder = Path(study.run_dir)
    text = render(study, found) if found else "nothing is done yet\n"
    told = {"calls": read_rows(folder / CALLS) if (folder / CALLS).exists() else []}
    told |= as_json(study, found)
    replace_durably(folder / "results.json", json.dumps(told, indent=1) + "\n")
    if found:
        draw(study_chart(study, found), folder / PLOT)
        replace_durably(folder / "results.md", f"{text}\n![perplexity against FLOPs]({PLOT})\n")
    print(f"\n{text}\n{len(done)} of {len(runs)} runs are done; results are in {folder}")
    return 0


def described(runs: list[Run]) -> str:
    """What the arms are, one a line."""
    lines = []
    for run in runs:
        sizes = " -> ".join(f"{parameter_count(s.config.model) / 1e6:.2f}M" for s in run.plan.stages)
        steps = " + ".join(str(stage.config.training.steps) for stage in run.plan.stages)
        lines.append(
            f"{run.arm.name}: {run.arm.title}; {sizes} parameters, {steps} steps, "
            f"{run.tokens:,} tokens, {run.flops:.3e} FLOPs"
        )
    return "\n".join(lines)


def train(runs: list[Run], launcher: str, jobs: int) -> None:
    """Bring all runs to their end, with a bar of the operations that all of them take.

    Raises:
        UserError: a run failed.
    """
    with tqdm(total=sum(run.flops for run in runs) / 1e12, unit=" TFLOP", mininterval=5) as bar:

        def tell(done: int) -> None:
            bar.set_description(f"{done} of {len(runs)} runs", refresh=False)
            bar.update(sum(spent(run) for run in runs) / 1e12 - bar.n)

        tell(0)
        for_all(jobs, lambda run: bring_to_its_end(run, launcher), runs, tell)


def bring_to_its_end(run: Run, launcher: str) -> None:
    """Call the stage machine, unless the run is done."""
    if not run.done:
        module = "megatron_tokenformer.progressive"
        words = ("-m", module, "--config", run.schedule, "--launcher", launcher)
        call_python(run.plan.folder, *words, environment={"OMP_NUM_THREADS": "1"})


def spent(run: Run) -> float:
    """Operations that a run has logged."""
    return run.flops if run.done else max((row["flops"] for _, row in run.rows()), default=0.0)


def record_call(path: Path) -> None:
    """Add to a file when, with what and on what this call trains."""
    call = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
    }
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(call) + "\n")


def commit() -> str:
    """The commit of this code, with `+` if files differ from it; `unknown` without git."""
    words = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+", "--abbrev=7", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    run_cli(main)
