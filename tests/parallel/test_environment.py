"""What CUDA reads when it starts is set by us, before torch is there, and never over the user's own value."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tokenformer.config.schema import Parallel
from megatron_tokenformer.parallel.environment import set_device_variables

NAME = "CUDA_DEVICE_MAX_CONNECTIONS"
ROOT = Path(__file__).resolve().parents[2]

# At the moment that torch is first imported: what the variable is.  Stops there, so nothing is trained.
WATCH = """
import os, sys

class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print("torch:", os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Watch())
from megatron_tokenformer.training import pretrain
pretrain.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "tensor, given, expected", [(2, None, "1"), (2, "8", "8"), (1, None, None), (1, "8", "8")]
)
def test_one_queue_with_tensor_parallelism(
    monkeypatch: pytest.MonkeyPatch, tensor: int, given: str | None, expected: str | None
) -> None:
    monkeypatch.setenv(NAME, given or "")  # so that monkeypatch restores what we set
    if given is None:
        monkeypatch.delenv(NAME)
    set_device_variables(Parallel(tensor=tensor))
    assert os.environ.get(NAME) == expected


@pytest.mark.parametrize("tensor, expected", [(2, "1"), (1, "None")])
def test_pretrain_sets_it_before_torch_is_imported(tensor: int, expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != NAME}
    environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    config = str(ROOT / "configs/tokenformer-124m.yaml")
    done = subprocess.run(
        [sys.executable, "-c", WATCH, "--config", config, f"parallel.tensor={tensor}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**environment, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.strip() == f"torch: {expected}", done.stderr


def test_one_process_under_torchrun_does_not_wait_for_a_server_that_is_elsewhere() -> None:
    script = "\n".join(
        [
            "from megatron_tokenformer.config.schema import Parallel",
            "from megatron_tokenformer.parallel.environment import find_processes",
            "from megatron_tokenformer.parallel.layout import start",
            "print(start(Parallel(), find_processes()))",
        ]
    )
    torchrun = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **torchrun, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)},
    )
    assert "1 process(es) started by torchrun or deepspeed" in done.stdout, done.stderr
