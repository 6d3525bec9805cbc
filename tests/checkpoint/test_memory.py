"""Loading takes memory for a rank's own part and one block, not for the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.growth import write_checkpoint
from megatron_tokenformer.checkpoint import engine_state
from megatron_tokenformer.checkpoint.manifest import read_manifest
from megatron_tokenformer.checkpoint.shards import BLOCK_ELEMENTS, MAPPED_ELEMENTS
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.config.sizes import parameter_count
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training.run import open_run
from tests.ranks import run_ranks
from tests.toy import toy_config

MB = 1_000_000
MARGIN = 12 * MB
"""of the allocator's and of the interpreter's; a second block would be 17 MB"""


def memory(line: str) -> int:
    """Bytes that this process has (VmRSS) or had at most (VmHWM), with what it looked at of mapped files."""
    told = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(told[line].split()[0]) * 1024


def peak_growth(act: Callable[[], object]) -> int:
    """The most that was held while `act` ran, less what was held before."""
    Path("/proc/self/clear_refs").write_text("5")  # the kernel starts the peak anew
    before = memory("VmRSS")
    act()
    return memory("VmHWM") - before


def load(layout: Layout, config: RunConfig, path: Path) -> int:
    manifest = read_manifest(path)
    with open_run(config, layout) as run:
        module, zero = run.engine.deepspeed.module, run.engine.deepspeed.optimizer
        return peak_growth(lambda: engine_state.load(module, zero, layout, path, manifest))


def test_two_ranks_that_load_one_shard_hold_their_own_parts_and_a_block(tmp_path: Path) -> None:
    sections = {
        "model": {"hidden_size": 256, "tokens": {"qkv": 1024, "output": 1024, "ffn": 4096}},
        "training": {"micro_batch_size": 4, "eval_steps": 0},
    }
    config = toy_config(tmp_path, **sections, parallel={"tensor": 2})
    path = write_checkpoint(tmp_path / "stored", config, ranks=1)
    (shard,) = read_manifest(path).shards
    assert shard.size > 100 * MB
    weights = 4 * parameter_count(config.model) / 2
    for grown in run_ranks(2, load, config, path, tensor=2):
        # The weights have their place already, in fp32, as parameters and as the optimizer's masters.
        most = 2 * weights + 4 * (BLOCK_ELEMENTS + MAPPED_ELEMENTS) + MARGIN
        assert grown < most < shard.size
        assert grown > 1.5 * weights, "the moments are this rank's own; they cannot have been missed"
