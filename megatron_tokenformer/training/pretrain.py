"""Train one model: what `deepspeed`, `torchrun`, `srun` or plain `python` start in every process."""

from __future__ import annotations

import argparse

from megatron_tokenformer.config.load import load_config
from megatron_tokenformer.config.schema import RunConfig, check_world
from megatron_tokenformer.errors import TO_BE_CONTINUED, UserError, run_cli
from megatron_tokenformer.parallel.environment import find_processes, set_device_variables
from megatron_tokenformer.parallel.telling import tell
from megatron_tokenformer.quiet import quiet_imports
from megatron_tokenformer.training.signals import requests_to_leave

EPILOG = """\
A run goes on from its own newest checkpoint in RUN_DIR/checkpoints; a new run starts from checkpoint.load if
that is given (a checkpoint, or a folder of them).  On a GPU it uses bf16 and nccl, without one fp32 and gloo.

SIGTERM, SIGUSR1 and the end of training.max_minutes make all ranks save and leave within a step; a second
signal ends them at once.  Exit codes: 0 done, 1 a failure of the run, 2 wrong usage or config, 85 left as
asked (the same command goes on), 86 a step took longer than training.step_timeout_minutes.

examples:
  python -m megatron_tokenformer.training.pretrain --config configs/tokenformer-124m.yaml
  torchrun --nproc-per-node 2 -m megatron_tokenformer.training.pretrain --config FILE parallel.tensor=2
  deepspeed --hostfile hosts --module megatron_tokenformer.training.pretrain --config FILE training.steps=9
"""


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, join the other processes, train."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the config")
    parser.add_argument(
        "--profile",
        type=int,
        default=0,
        metavar="STEPS",
        help="trace so many steps, after three to warm up, with torch's profiler into RUN_DIR/profile",
    )
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # given by launchers, unused
    arguments = parser.parse_args(argv)
    try:
        if arguments.profile < 0:
            raise UserError(f"--profile {arguments.profile} is no number of steps")
        left = pretrain(load_config(arguments.config, arguments.overrides), arguments.profile)
    except Exception as error:
        return tell(error)
    return 0 if left is None else TO_BE_CONTINUED


def pretrain(config: RunConfig, profile_steps: int = 0) -> str | None:
    """Train in this process as one of the run's; trace so many of its steps.

    Returns:
        Why the run left before its end; None if it did not.
    """
    processes = find_processes()
    check_world(config, processes.world_size)
    set_device_variables(config.parallel)
    with requests_to_leave(config.training.max_minutes) as requests:
        # Imported when the configuration is known to be right: torch, DeepSpeed, megatron-core take seconds.
        with quiet_imports():
            from megatron_tokenformer.parallel import layout
            from megatron_tokenformer.training.loop import train

        left = train(config, layout.start(config.parallel, processes), profile_steps, requests)
        if left is not None:
            layout.on_all_ranks(lambda: None)  # a launcher may end the others when the first has ended
        layout.stop()  # not after a failure: it would wait for ranks that still wait for this one
    return left


if __name__ == "__main__":
    run_cli(main, "python -m megatron_tokenformer.training.pretrain")
