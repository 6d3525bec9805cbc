"""benchmarks/train_step.py trains each model and its twin and tells their figures; speed decides nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import train_step
from ladder import CONFIGS, SIZES, twin_configs

from megatron_tokenformer.config.load import load_config
from megatron_tokenformer.config.sizes import flops_per_token, parameter_count
from megatron_tokenformer.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    *("--configs", "124m", "--layers", "1", "--sequence-length", "16", "--micro-batch", "2"),
    *("--steps", "2", "--rounds", "1"),
]


def run(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, str(ROOT / "benchmarks/train_step.py"), *SMALL, *arguments]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)


@pytest.mark.long
def test_figures_are_those_of_the_models_on_two_tensor_ranks(tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    launcher += ("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0")
    path, small = tmp_path / "figures.json", "model.vocab_size=512"
    done = run("--folder", str(tmp_path), "--json", str(path), small, "parallel.tensor=2", launcher=launcher)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[1].strip() for row in rows] == ["", "Tokenformer 124m", "GPT 124m"]
    figures = json.loads(path.read_text())
    assert {"device", "torch", "commit", "date"} <= set(figures["environment"])
    for row in rows[1:]:
        name = row[1].strip()
        file = name.lower().replace("gpt", "transformer").replace(" ", "-")
        model = load_config(CONFIGS / f"{file}.yaml", ["model.layers=1", small]).model
        ((own),) = figures["contenders"][name]
        assert own["parameters"] == parameter_count(model)
        assert "tensor 2" in own["layout"] and len(own["steps"]) == 2
        assert own["tokens_per_s"] == pytest.approx(2 * 16 / own["step_s"])
        flops = own["tokens_per_s"] * flops_per_token(model, 16) / 2  # a device has half
        assert own["tflops_per_device"] == pytest.approx(flops / 1e12)
    ours, twin = (figures["contenders"][f"{name} 124m"][0]["tokens_per_s"] for name in ("Tokenformer", "GPT"))
    assert figures["tokenformer_to_gpt"] == {"124m": pytest.approx([ours / twin])}
    assert list(tmp_path.iterdir()) == [path], "data and runs are removed"
    figures["settings"]["configs"] = ["450m"]
    figures["contenders"]["Tokenformer 450m"] = figures["contenders"]["Tokenformer 124m"]
    last = train_step.table(figures).splitlines()[-1].split("|")
    assert (last[1].strip(), last[-2].strip()) == ("Tokenformer 450m", "-"), "no twin, no ratio"


def test_a_mistake_is_told_before_anything_runs() -> None:
    done = run("model.attention_heads=5")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and "attention_heads=4 would work" in done.stderr


@pytest.mark.parametrize("option", ["--rounds", "--steps", "--micro-batch", "--layers"])
def test_nothing_is_done_no_times(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train_step.py", option, "0"])
    with pytest.raises(UserError, match=f"^{option} 0 is not above 0$") as refused:
        train_step.main()
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    "name, layers, width",
    [("Tokenformer 450m", 1, 1024), ("Tokenformer 1.4b", 1, 768), ("GPT 1.3b", 2, 2048)],
)
def test_layers_are_of_the_tokenformer_and_the_twins_in_proportion(
    name: str, layers: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1.3B has 24 layers beside 12, and 450m 24 of its own."""
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--layers", "1"])
    model = train_step.run_config(name, "unknown", Path(), train_step.parse_arguments()).model
    assert (model.layers, model.hidden_size) == (layers, width)


def test_every_config_can_be_chosen() -> None:
    chosen = [path for size in SIZES for path in twin_configs(size).values()]
    assert sorted(chosen) == sorted(CONFIGS.glob("*.yaml"))


def test_ranks_agree_on_free_ports_whatever_the_launchers_is() -> None:
    """Even with the last port there is, which one of them keeps."""
    program = "import sys, train_step; port = train_step.agreed_ports(); "
    program += "print(*map(port, range(3)), flush=True); sys.stdin.read()"
    paths = os.pathsep.join((str(ROOT), str(ROOT / "benchmarks")))
    given = {"PYTHONPATH": paths, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "65535"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env={**given, "RANK": rank, "LOCAL_RANK": rank},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    told = [rank.stdout.readline().split() for rank in ranks]
    for rank in ranks:
        rank.communicate(timeout=60)
    assert told[0] == told[1] and len(told[0]) == 3
    assert all(0 < int(port) < 65535 for port in told[0])
