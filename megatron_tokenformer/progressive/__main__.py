"""Train a schedule of growing models: each stage grown from the last one's result, then trained on.

Killed anywhere, the same call goes on where it was: RUN_DIR/journal.json says what is done.  Exit code 85: it
was asked to leave (by SIGTERM, SIGUSR1 or a stage's training.max_minutes), all is saved, call it again.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import signal
import sys

from megatron_tokenformer.errors import UserError, run_cli
from megatron_tokenformer.progressive.chain import (
    job_files,
    requeued,
    submission,
    submit,
    this_job,
)
from megatron_tokenformer.progressive.execute import Asked
from megatron_tokenformer.progressive.journal import Journal, read_journal
from megatron_tokenformer.progressive.launchers import LAUNCHERS, grow_command
from megatron_tokenformer.progressive.lock import exclusive
from megatron_tokenformer.progressive.plan import Plan, load_plan
from megatron_tokenformer.progressive.report import write_report
from megatron_tokenformer.progressive.stages import Machine, dry_run, pending, run_stages

CHAIN = "slurm"

EPILOG = """\
launchers:
  local      torchrun on this host
  deepspeed  `deepspeed` on this host, or on the hosts of launch.hostfile
  srun       srun, in the SLURM allocation that this command runs in (examples/slurm/progressive.sbatch)
  slurm      submits a chain of SLURM jobs, one for each stage and of its size, and returns

examples:
  python -m megatron_tokenformer.progressive --config configs/progressive/demo.yaml --launcher deepspeed
  python -m megatron_tokenformer.progressive --config configs/progressive/pile-124m-to-1.4b.yaml \\
      --launcher slurm launch.slurm.partition=gpu launch.nodes=4 --dry-run
  ... common.training.steps=100 stages.small.config.optimizer.lr=1e-3
"""


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, run what is left of the schedule, report."""
    given = _parse(argv)
    plan = load_plan(given.config, given.overrides)
    if given.stage is not None and given.stage not in [stage.name for stage in plan.stages]:
        raise UserError(f"--stage {given.stage} is none of {', '.join(s.name for s in plan.stages)}")
    if given.report_only:
        _report(plan)
        return 0
    if given.launcher == CHAIN:
        return _submit(plan, given)
    launcher = LAUNCHERS[given.launcher]
    for stage in plan.stages:
        if given.stage in (None, stage.name):
            launcher(stage, plan.launch)  # refuses now what it could not start days later
    if given.dry_run:
        print(dry_run(plan, read_journal(plan.folder), launcher, grow_command))
        return 0
    back = requeued(this_job()) if given.requeue else contextlib.nullcontext()
    asked = Asked()
    with asked.listening(signal.SIGUSR1), exclusive(plan.folder) as lock, back:
        journal = read_journal(plan.folder)
        _look_for_data(plan, journal, given)
        run_stages(Machine(plan, launcher, grow_command, journal, lock, asked, given.stage))
        try:
            _report(plan)
        except Exception as error:  # the stages are done, and the jobs that wait for this one may begin
            print(f"warning: no report: {type(error).__name__}: {error}")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", required=True, help="YAML file of the schedule")
    launchers = [*LAUNCHERS, CHAIN]
    add("--launcher", choices=launchers, default="local", help="what starts processes (default: local)")
    add("--stage", metavar="NAME", help="bring this stage alone to its end; the ones before must be done")
    requeue = (
        "put the SLURM job that this is back into the queue when it was asked to leave (exit code 85), or "
        "a run has failed that had saved a checkpoint since it was started"
    )
    add("--requeue", action="store_true", help=requeue)
    add("--dry-run", action="store_true", help="print the commands that are left, and do nothing")
    add("--report-only", action="store_true", help="write the report of what is done so far, and do nothing")
    add("overrides", nargs="*", metavar="key=value", help="changes to the schedule")
    # Overrides may stand before or after options, as in `... launch.nodes=4 --dry-run common.model.layers=2`.
    return parser.parse_intermixed_args(argv)


def _look_for_data(plan: Plan, journal: Journal, given: argparse.Namespace) -> None:
    """Refuse now what a stage would miss days later, unless its hosts are others than this one."""
    elsewhere = given.launcher == "deepspeed" and plan.launch.hostfile is not None
    for stage, step in pending(plan, journal):
        if step == "train" and given.stage in (None, stage.name):
            try:
                stage.require_data()
            except UserError as error:
                if not elsewhere:
                    raise
                there = f"the hosts of {plan.launch.hostfile} must have it"
                print(f"warning: {error}; {there}", file=sys.stderr)


def _submit(plan: Plan, given: argparse.Namespace) -> int:
    journal = read_journal(plan.folder)
    if given.stage is not None:
        raise UserError("--launcher slurm submits all stages that are not done; leave out --stage")
    if given.dry_run:
        before = None
        for stage, path, text in job_files(plan, journal, given.config, given.overrides):
            print(f"# stage {stage.name}\n{shlex.join(submission(path, before))}\n# {path}:\n{text}")
            before = f"JOB-OF-{stage.name}"
        return 0
    lines = submit(plan, journal, given.config, given.overrides)
    print("\n".join(lines) or "every stage is done")
    return 0


def _report(plan: Plan) -> None:
    plan.folder.mkdir(parents=True, exist_ok=True)
    print(f"\n{write_report(plan, read_journal(plan.folder))}\nwritten to {plan.folder}/report.md")


if __name__ == "__main__":
    run_cli(main, "python -m megatron_tokenformer.progressive")
