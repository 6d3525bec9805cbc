"""Time and layouts: a step computed by hand, what fits; the tool, and the page made with it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_tokenformer.commands.estimate import main
from megatron_tokenformer.config.estimate import (
    Hardware,
    assumptions,
    best_layouts,
    estimate,
    layouts,
    parse_bytes,
)
from megatron_tokenformer.config.load import load_config
from megatron_tokenformer.config.sizes import FORMULAS
from megatron_tokenformer.errors import UserError

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/tokenformer-1.4b.yaml")
SCHEDULE = str(ROOT / "configs/progressive/pile-124m-to-1.4b.yaml")
STAGES = ("124m", "354m", "757m", "1.4b")
H100 = Hardware(peak=989e12, memory=80 * 10**9)


def test_a_step_computed_by_hand() -> None:
    """1.4B on two nodes: tensor 2, pipeline 2, data 4, each replica in a node but data ranks over two."""
    overrides = ["parallel={tensor: 2, pipeline: 2, sequence: true}", "training.micro_batch_size=4"]
    found = estimate(load_config(CONFIG, overrides), 16, Hardware(989e12, 80 * 10**9, per_node=4))
    s, b, d, v, n, m = 1024, 4, 768, 50304, 9216, 32
    assert (found.data_ranks, found.micro_batches) == (4, m)
    layer = 4 * d * 8 * n + 2 * s * d
    last = 3 * (6 * layer + 2 * d * v)  # the second of two stages: six layers and the head
    computing = last * s * b / (2 * 0.4 * 989e12)
    wide, ring = 2 * s * b * d, 1 / 2
    in_layer = 4 * (2 * wide) * ring + 2 * (3 * wide + wide) * ring  # gathers and scatters
    totals = 6 * 4 * s * b * (3 + 1 + 1) / 3 * 2 * ring  # six sums of three kinds
    ends = 2 * wide * ring + (3 * 4 * s * b + 2 * 2 * d) * 2 * ring
    calls = 6 * (8 + 4 + 6) + 2 + 3 + 1
    tensor = (6 * (in_layer + totals) + ends) / 200e9 + calls * 20e-6
    pipeline = wide / 2 / 20e9 + 20e-6
    numbers = 6 * 8 * n * 2 * d // 2 + v * d // 2 + 2 * d
    sums = 4 * numbers * 2 + 2 * numbers  # in fp32, and bf16 weights gathered; two ports of each node
    embedding = 4 * v * d // 2  # fp32, half of the rows, over two stages
    end = sums * 3 / 4 / 40e9 + embedding / 20e9 + 3 * 20e-6
    assert found.seconds == pytest.approx(
        {
            "computing": m * computing,  # 46 ms, and the launches of 6 layers 3.6
            "launching": 0.0,
            "tensor": m * tensor,
            "pipeline": m * pipeline,
            "bubble": computing + tensor + pipeline,
            "end of step": end,
        }
    )
    assert found.mfu(H100) == pytest.approx(
        3 * (12 * layer + 2 * d * v) * 2**19 / (found.step_time * 16 * 989e12)
    )


@pytest.mark.parametrize("recompute, kernels", [("none", 40 + 80), ("layer", 40 + 40 + 80)])
def test_a_small_micro_batch_takes_the_time_of_its_launches(recompute: str, kernels: int) -> None:
    """124M, a sequence on each of 512 GPUs: 2.1 ms of computing, and 12 layers of launches at 5 us."""
    overrides = ["training.micro_batch_size=1", f"training.recompute={recompute}"]
    found = estimate(load_config(str(ROOT / "configs/tokenformer-124m.yaml"), overrides), 512, H100)
    s, d, v, n = 1024, 768, 50304, 576
    layer = 4 * d * 8 * n + 2 * s * d
    computing = ((3 + (recompute == "layer")) * 12 * layer + 3 * 2 * d * v) * s / (0.4 * 989e12)
    assert found.micro_batches == 1
    assert found.seconds["computing"] == pytest.approx(computing)
    assert found.seconds["computing"] + found.seconds["launching"] == pytest.approx(12 * kernels * 5e-6)


@pytest.mark.parametrize(
    "per_node, ranks, apart, gpus, ports",
    [
        (8, 8, 1, 64, None),
        (8, 4, 2, 64, None),
        (6, 4, 1, 4, None),  # all in one node
        (6, 4, 1, 12, 2),  # 4 to 7: two on each
        (8, 3, 2, 6, None),
        (8, 3, 2, 12, 1),  # 6, 8, 10
        (8, 8, 2, 16, 4),
        (8, 16, 1, 64, 8),
        (8, 8, 8, 64, 1),
        (8, 1, 4, 64, None),
    ],
)
def test_a_group_goes_at_the_speed_of_its_slowest(
    per_node: int, ranks: int, apart: int, gpus: int, ports: int | None
) -> None:
    """At the link's only if every such group is in one node, else through the fewest ports of any."""
    hardware = Hardware(989e12, 80 * 10**9, per_node, link=200e9, network=20e9)
    assert hardware.speed(ranks, apart, gpus) == (200e9 if ports is None else ports * 20e9)
    assert hardware.speed(ranks, apart, gpus, pairs=True) == (200e9 if ports is None else 20e9)


@pytest.mark.parametrize("per_node, gpus, sizes", [(6, 24, {1, 2}), (6, 4, {1, 2, 4}), (8, 24, {1, 2, 4})])
def test_tensor_ranks_stay_in_a_node(per_node: int, gpus: int, sizes: set[int]) -> None:
    """On nodes of 6 GPUs the second group of 4 would lie on two; 3, 6 and 8 are refused by the schema."""
    hardware = Hardware(989e12, 80 * 10**9, per_node)
    found = list(layouts(load_config(CONFIG), gpus, hardware))
    assert {layout.parallel.tensor for layout in found} == sizes
    assert all(hardware.speed(layout.parallel.tensor, 1, gpus) == hardware.link for layout in found)


def test_layouts_fit_and_the_first_is_the_fastest() -> None:
    config = load_config(CONFIG)
    for gigabytes in (80, 24, 10):
        hardware = Hardware(peak=989e12, memory=gigabytes * 10**9)
        found = best_layouts(config, 16, hardware, count=5)
        assert found and all(layout.memory_bytes <= 0.9 * gigabytes * 1e9 for layout in found)
        assert [layout.step_time for layout in found] == sorted(layout.step_time for layout in found)
        for layout in found:
            again = estimate(layout.config, 16, hardware)  # runs as it is written down
            assert again == layout
    assert not best_layouts(config, 16, Hardware(peak=989e12, memory=2 * 10**9))


def test_less_memory_costs_time() -> None:
    config = load_config(CONFIG)
    times = [
        best_layouts(config, 8, Hardware(989e12, memory * 10**9), count=1)[0].step_time
        for memory in (80, 24, 12)
    ]
    assert times == sorted(times) and times[0] < times[-1]


def test_a_dense_model_has_no_scores_to_recompute() -> None:
    dense = load_config(str(ROOT / "configs/transformer-1.3b.yaml"))
    tight = Hardware(peak=989e12, memory=8 * 10**9)
    found = best_layouts(dense, 16, tight, count=50)
    assert {layout.config.training.recompute for layout in found} == {"none", "layer"}


def test_a_batch_that_cannot_be_split_so_far_gets_another_layout() -> None:
    (best,) = best_layouts(load_config(CONFIG), 1024, H100, count=1)
    assert best.data_ranks <= 512


@pytest.mark.parametrize(
    "text, size", [("80GB", 80 * 10**9), ("80GiB", 80 * 2**30), ("141e9", 141 * 10**9), ("0.5GB", 5 * 10**8)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def run(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(list(words)) == 0
    return capsys.readouterr().out.splitlines()


def test_the_tool_shows_the_formula_the_assumptions_and_the_layouts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--config", CONFIG, "--gpus", "64", "--layouts", "2", "--json", "parallel.tensor=2")
    lines = run(capsys, *words)
    figures: dict[str, Any] = json.loads(lines[-1])
    assert figures["parameters"] == 1_397_589_504
    assert figures["flops"] == figures["flops_per_token"] * figures["tokens"]
    assert figures["as_configured"]["tensor"] == 2 and len(figures["layouts"]) == 2
    memory = figures["layouts"][0]
    assert memory["memory_bytes"] == sum(memory["memory_by_kind"].values())
    text = "\n".join(lines)
    for told in (
        FORMULAS["tokenformer"],
        "40% of the peak of 989 TFLOP/s",
        "as configured: 64 GPU(s)",
        "layout 2: ",
        "bubble",
    ):
        assert told in text
    assert "layout 3" not in text


def test_a_config_that_does_not_run_so_is_told_and_others_are_found(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = "\n".join(run(capsys, "--config", CONFIG, "--gpus", "1024"))
    assert "as configured it does not run: training.global_batch_size=512 is not a multiple of" in text
    assert "layout 1: 1024 GPU(s)" in text
    text = "\n".join(run(capsys, "--config", CONFIG, "--gpus", "8", "--gpu-memory", "2GB"))
    assert "DOES NOT FIT" in text and "nothing fits: no layout of 8 GPUs" in text


@pytest.mark.parametrize(
    "words, told",
    [
        (
            ["--gpu", "NVIDIA H100"],
            "the bf16 peak of --gpu 'NVIDIA H100' is not known; write it as torch.cuda",
        ),
        (["--gpu", "Tesla V100-SXM2-16GB"], "the bf16 peak of --gpu 'Tesla V100-SXM2-16GB' is not known"),
        (["training.precision=fp32"], "give --peak TFLOPS for training.precision=fp32"),
        (["--gpu-memory", "much"], "--gpu-memory much is not a size; write one such as 80GB"),
        (["--gpu-memory", "nan"], "--gpu-memory nan is not a size"),
        (["--gpus", "0"], "--gpus 0 is not a number of GPUs"),
        (["--gpus", "8,16"], "--gpus 8,16 with --config; give one number"),
        (["--gpus", ""], "--gpus '' is not a number of GPUs"),
        (["--link-speed", "0"], "--link-speed 0.0 is not a finite number above 0"),
        (["--efficiency", "nan"], "--efficiency nan is not a finite number above 0"),
        (["--efficiency", "4"], "--efficiency 4.0 is more than all of the peak; write a share"),
        (["--peak", "inf"], "--peak inf is not a finite number above 0"),
        (["--launch-time", "-5"], "--launch-time -5.0 is not a finite number above 0"),
        (["--layouts", "0"], "--layouts 0 is not a finite number above 0"),
    ],
)
def test_mistakes_are_told_in_words(words: list[str], told: str) -> None:
    with pytest.raises(UserError) as refused:
        main(["--config", CONFIG, *words])
    assert told in str(refused.value) and refused.value.exit_code == 2


def test_a_v100_is_estimated_in_fp16(capsys: pytest.CaptureFixture[str]) -> None:
    device = ("--gpu", "Tesla V100-SXM2-32GB", "--gpu-memory", "32GB")
    assert "125 TFLOP/s" in "\n".join(run(capsys, "--config", CONFIG, *device, "training.precision=fp16"))


def test_several_layouts_of_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--schedule", SCHEDULE, "--gpus", "16", "--layouts", "2")
    own, _, *rows = run(capsys, *words, "common.training.global_batch_size=256")
    assert [row.split(" | ")[0] for row in rows] == [f"| {stage}" for stage in STAGES for _ in range(2)]
    times = [float(row.split(" | ")[own.split(" | ").index("step, s")]) for row in rows]
    assert all(first <= second for first, second in zip(times[::2], times[1::2]))
    assert run(capsys, *words) != [own, _, *rows], "overrides are of the schedule"


def test_help_tells_how_a_schedule_is_changed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    assert "common.section.key=value" in told and "stages.NAME.config.section.key=value" in told


def test_it_starts_without_torch() -> None:
    imported = "megatron_tokenformer.commands.estimate"
    program = f"import sys, {imported}; print({{'torch', 'deepspeed'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_the_page_is_what_the_tool_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a change of formulas, put the new output into the page, and read again what it says of it."""
    monkeypatch.chdir(ROOT)
    lines = (ROOT / "docs/scaling.md").read_text(encoding="utf-8").splitlines()
    command = next(line for line in lines if line.startswith("    python tools/estimate.py --schedule"))
    printed = run(capsys, *shlex.split(command)[2:])
    start = lines.index(printed[0])
    assert lines[start : start + len(printed)] == printed
    assert len(printed) == 2 + 4 * 8
    page = "\n".join(line.strip() for line in lines)
    assumed = run(capsys, "--config", "configs/tokenformer-124m.yaml")
    first = assumed.index("assumed:")
    last = assumed.index("", first)
    assert last - first == 1 + len(assumptions(H100))
    for line in [FORMULAS["tokenformer"], *assumed[first + 1 : last]]:
        assert line.strip() in page
