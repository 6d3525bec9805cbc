"""W&B, TensorBoard, metrics.jsonl: what is in them after resumes and rollbacks, and that none ends a run."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_tokenformer.config.schema import Logging, RunConfig
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.metrics_file import MetricsFile, read_rows
from megatron_tokenformer.training import wandb_sink
from megatron_tokenformer.training.metrics import MetricsLog
from megatron_tokenformer.training.sinks import Guarded, check_packages
from megatron_tokenformer.training.wandb_sink import WandbSink
from tests.ranks import run_ranks
from tests.toy import toy_config
from tests.training.injection import train_injected, write_marked
from tests.training.wandb_files import config_of, history_of, records, run_of, wandb_files

BOTH: dict[str, Any] = {"wandb": {"mode": "offline", "group": "ladder"}, "tensorboard": True}
WANDB: dict[str, Any] = {"wandb": {"mode": "offline"}}
TENSORBOARD = {"tensorboard": True}


def evaluation(step: int, loss: float = 1.0) -> dict[str, Any]:
    return {"step": step, "tokens": 10 * step, "flops": 1e3 * step, "val_loss": loss, "val_ppl": 2.0}


@contextmanager
def opened(config: RunConfig, step: int = -1) -> Iterator[MetricsLog]:
    with MetricsLog(config, step, is_main=True) as log:
        yield log


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """No file of this process can grow beyond what this one has, and a few bytes more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 11, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    found = EventAccumulator(str(folder / "tensorboard")).Reload().Scalars(name)
    return [(event.step, event.value) for event in found]


def texts(folder: Path, tag: str) -> list[str]:
    events = EventAccumulator(str(folder / "tensorboard")).Reload().Tensors(f"{tag}/text_summary")
    return [event.tensor_proto.string_val[0].decode() for event in events]


def children_of(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in found.split()]


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"


SPIKES = {
    "steps": 9,
    "spike_window": 4,
    "spike_factor": 3.0,
    "on_spike": "rollback",
    "eval_steps": 0,
    "micro_batch_size": 8,
}


def test_a_run_that_goes_back_is_whole_in_all_three(tmp_path: Path) -> None:
    """A spike at step 6 sends a real run back to 4: W&B has both ways, the others the one that counts."""
    write_marked(tmp_path, 5 * 8 + 3)
    config = toy_config(tmp_path, logging=BOTH, training=SPIKES, checkpoint={"interval": 4, "keep_last": 9})
    run_ranks(1, train_injected, config, "spike")
    folder = Path(config.run_dir)
    rows = {row["step"]: row for row in read_rows(folder / "metrics.jsonl") if "loss" in row}
    assert list(rows) == list(range(1, 10))
    (path,) = wandb_files(folder)
    history = history_of(path)
    assert [row["step"] for row in history if "loss" in row] == [1, 2, 3, 4, 5, *range(5, 10)]
    own = [row["_step"] for row in history]
    assert own == sorted(set(own)), "W&B takes no row at a step before its last"
    for row in history[-5:]:
        assert {key: row[key] for key in rows[row["step"]]} == rows[row["step"]], "the same names and values"
    (told,) = [row for row in history if "event" in row]
    assert told["event"] == "spike" and "back to" in told["told"] and told["spike/spike_step"] == 6
    assert scalars(folder, "loss") == [(step, pytest.approx(row["loss"])) for step, row in rows.items()]
    assert texts(folder, "event/spike") == [told["told"]]


def test_wandb_has_config_stage_group_and_events_and_draws_against_step(tmp_path: Path) -> None:
    config = toy_config(tmp_path, logging=BOTH)
    growth = {"step": 0, "event": "growth", "parameters_before": 5, "parameters_after": 9}
    with opened(config) as log:
        log.evaluation(evaluation(0))
        log.event({**growth, "tokens_before": {"qkv": 1}}, "grown from 5 to 9 parameters")
    (path,) = wandb_files(tmp_path / "run")
    run, told = run_of(path), config_of(path)
    assert (run.run_group, run.project, run.display_name) == ("ladder", "megatron_tokenformer", "run")
    assert told["stage"] == "run" and told["model"] == config.model.model_dump(mode="json")
    metrics = [record.metric for record in records(path) if record.HasField("metric")]
    assert [metric.step_metric for metric in metrics if metric.glob_name == "*"] == ["step"]
    (row,) = history_of(path)
    assert row["told"] == "grown from 5 to 9 parameters" and row["growth/parameters_after"] == 9
    summary = [item for r in records(path) if r.HasField("summary") for item in r.summary.update]
    keys = {"/".join(item.nested_key) or item.key for item in summary}
    assert "events/00000000 growth" in keys, "it stays to be read when the row has scrolled by"
    (text,) = texts(tmp_path / "run", "config")
    assert "hidden_size: 32" in text


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path: Path) -> None:
    """It was killed at step 5, has a checkpoint of step 3, and then goes on twice without going back."""
    config = toy_config(tmp_path, logging=BOTH)
    for start, steps in ((-1, range(6)), (3, range(4, 7)), (6, range(7, 9))):
        with opened(config, start) as log:
            for step in steps:
                log.evaluation(evaluation(step, loss=10.0 * start + step))
    files = wandb_files(tmp_path / "run")
    assert len({run_of(path).run_id for path in files}) == 1 and len(files) == 3
    history = [row for path in files for row in history_of(path)]
    assert [row["step"] for row in history] == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    assert [row["_step"] for row in history] == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11], "never back"
    expected = [-10.0, -9.0, -8.0, -7.0, 34.0, 35.0, 36.0, 67.0, 68.0]
    assert [row["val_loss"] for row in read_rows(tmp_path / "run/metrics.jsonl")] == expected
    assert scalars(tmp_path / "run", "val_loss") == list(enumerate(expected))


@pytest.fixture
def no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "none"))


def test_online_without_a_login_is_offline_and_says_so(
    tmp_path: Path, no_login: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = toy_config(tmp_path, logging={"wandb": {"mode": "online"}})
    with opened(config) as log:
        log.evaluation(evaluation(0))
    (path,) = wandb_files(tmp_path / "run")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert "logging.wandb.mode=online: No API key configured" in line
    assert f"`wandb sync {path.parent}` sends it" in line
    assert [row["step"] for row in history_of(path)] == [0]


def test_online_without_a_server_is_offline_and_says_so(
    tmp_path: Path, no_login: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(wandb_sink, "START_S", 1.0)
    config = toy_config(tmp_path, logging={"wandb": {"mode": "online"}})
    with opened(config) as log:
        log.evaluation(evaluation(0))
    lines = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(lines) == 1 and "written offline" in lines[0], lines
    assert [row["step"] for row in history_of(wandb_files(tmp_path / "run")[-1])] == [0]


def sink_of(log: MetricsLog) -> WandbSink:
    (guarded,) = log._sinks
    assert isinstance(guarded._sink, WandbSink)
    return guarded._sink


def test_a_wandb_service_that_dies_is_started_again_and_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = toy_config(tmp_path, logging=WANDB)
    with opened(config) as log:
        log.evaluation(evaluation(0))
        sink = sink_of(log)
        (service,) = children_of(sink._process.pid)
        os.kill(service, signal.SIGKILL)
        step, out, deadline = 0, "", time.monotonic() + 120.0
        while "W&B fails" not in out:
            assert time.monotonic() < deadline, "nobody notices"
            step += 1
            log.evaluation(evaluation(step))
            time.sleep(0.005)
            out += capsys.readouterr().out
        noticed, last = step, step + 100
        for step in range(noticed + 1, last + 1):
            log.evaluation(evaluation(step))
    out += capsys.readouterr().out
    files = wandb_files(tmp_path / "run")
    assert len(files) == 2, "one of each service"
    lines = [line for line in out.splitlines() if "W&B" in line]
    assert lines[0].startswith("warning: W&B fails (") and lines[1:] == ["W&B is written again"]
    lost = sorted(set(range(last + 1)) - {row["step"] for path in files for row in history_of(path)})
    assert not lost or lost == list(range(lost[0], lost[-1] + 1)), (
        "only what the service had in hand when it died"
    )
    assert not lost or lost[-1] < noticed, "and not what came after"
    assert len(read_rows(tmp_path / "run/metrics.jsonl")) == last + 1


def test_a_wandb_that_hangs_keeps_no_run_from_its_steps_nor_from_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wandb_sink, "FINISH_S", 0.5)
    monkeypatch.setattr(wandb_sink, "GRACE_S", 0.5)
    config = toy_config(tmp_path, logging=WANDB)
    with opened(config) as log:
        process = sink_of(log)._process
        (service,) = children_of(process.pid)
        os.kill(service, signal.SIGSTOP)
        for step in range(20_000):
            log.evaluation(evaluation(step))
    out = capsys.readouterr().out
    assert "W&B has not taken all rows in time; `wandb sync " in out
    assert len(read_rows(tmp_path / "run/metrics.jsonl")) == 20_000
    assert process.returncode is not None
    assert state_of(service) in ("gone", "Z"), "nothing is left"


def test_wandb_that_cannot_start_is_told_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    monkeypatch.setenv("WANDB_X_SERVICE_WAIT", "not a number")
    with opened(toy_config(tmp_path, logging=WANDB)) as log:
        for step in range(5):
            log.evaluation(evaluation(step))
    lines = [line for line in capsys.readouterr().out.splitlines() if "W&B" in line]
    assert lines[0].startswith("warning: W&B fails (")
    (last,) = lines[1:]
    assert last.startswith("warning: W&B lacks some of the last 5 rows (")


def test_tensorboard_on_a_full_disk_catches_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = toy_config(tmp_path, logging=TENSORBOARD)
    with opened(config) as log:
        log.evaluation(evaluation(0))
        (file,) = (tmp_path / "run/tensorboard").iterdir()
        with full_disk(file):  # metrics.jsonl is shorter, and has room
            for step in range(1, 4):
                log.evaluation(evaluation(step))
        for step in range(4, 20):
            log.evaluation(evaluation(step))
    lines = [line for line in capsys.readouterr().out.splitlines() if "TensorBoard" in line]
    assert lines[0].startswith("warning: TensorBoard fails (") and "File too large" in lines[0]
    assert lines[1:] == ["TensorBoard is written again"]
    assert {step for step, _ in scalars(tmp_path / "run", "val_loss")} == set(range(20))


def test_metrics_on_a_full_disk_are_kept_and_written_when_there_is_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run/metrics.jsonl"
    with opened(toy_config(tmp_path)) as log:
        log.evaluation(evaluation(0))
        with full_disk(path):
            for step in range(1, 5):
                log.evaluation(evaluation(step))
            assert len(read_rows(path)) == 1
            log.rewind(3)
        log.evaluation(evaluation(4))
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2, 3, 4]
    lines = [line for line in capsys.readouterr().out.splitlines() if "metrics.jsonl" in line]
    assert lines[0].startswith(f"warning: {path} cannot be written (File too large); training goes on")
    assert lines[1:] == [f"{path} is written again, with all rows"]


def test_metrics_that_are_never_written_are_in_the_log_of_the_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run/metrics.jsonl"
    log = MetricsLog(toy_config(tmp_path), -1, is_main=True)
    log.evaluation(evaluation(0))
    with full_disk(path), log:
        log.evaluation(evaluation(1, loss=1.25))
    assert '{"step": 1, "tokens": 10, "flops": 1000.0, "val_loss": 1.25' in capsys.readouterr().out


def test_a_metrics_file_that_is_swept_away_begins_anew_without_holes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, -1)
    file.write({"step": 1, "loss": float("nan")})
    path.unlink()
    file.rewind(1)
    file.write({"step": 2})
    file.close()
    assert path.read_text() == '{"step": 2}\n'


@pytest.mark.parametrize("package, logging", [("wandb", WANDB), ("tensorboard", TENSORBOARD)])
def test_a_package_that_is_not_there_is_named_before_anything_is_trained(
    package: str, logging: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.sys.modules, package, None)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=rf"pip install 'megatron-tokenformer\[{package}\]'"):
        check_packages(Logging.model_validate(logging))
    check_packages(Logging())


class Flaky:
    """A sink that fails at the calls that it is told to, and settles each call two calls later."""

    def __init__(self, bad: set[int], taken: list[int]) -> None:
        self.bad, self.taken, self.mine = bad, taken, 0

    def log(self, row: dict[str, Any]) -> None:
        if row["step"] in self.bad:
            self.bad.discard(row["step"])
            raise OSError(f"no {row['step']}")
        self.taken.append(row["step"])
        self.mine += 1

    event = rewind = log  # type: ignore[assignment]

    def settled(self) -> int:
        done, self.mine = max(self.mine - 2, 0), min(self.mine, 2)
        return done

    def close(self) -> str | None:
        return None


def test_what_a_sink_had_in_hand_when_it_failed_is_given_to_it_again() -> None:
    taken: list[int] = []
    said: list[str] = []
    bad = {5}
    guarded = Guarded("it", lambda first: Flaky(bad, taken), said.append)
    for step in range(30):
        guarded.log({"step": step})
    guarded.close()
    assert taken[:5] == [0, 1, 2, 3, 4] and set(taken) == set(range(30))
    assert taken[5:] == list(range(3, 30)), "from the first call that was not settled, in order"
    assert said[0].startswith("warning: it fails (no 5)")
