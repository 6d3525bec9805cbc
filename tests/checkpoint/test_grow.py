"""Growth: the loss stays, new tokens learn, old state is carried, and what is not growth is refused."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from megatron_tokenformer.checkpoint.manifest import Interval, Manifest, read_manifest
from megatron_tokenformer.checkpoint.shards import IntervalReader
from megatron_tokenformer.checkpoint.store import find_checkpoint
from megatron_tokenformer.config.growth import Growth
from megatron_tokenformer.config.load import dump_config, validate
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.metrics_file import read_rows
from megatron_tokenformer.model.tau import taus_from_json
from tests.checkpoint.growing import grow
from tests.ranks import run_ranks
from tests.toy import toy_config, train_toy

TOKENS = [
    {"qkv": 16, "output": 16, "ffn": 64},
    {"qkv": 32, "output": 24, "ffn": 64},
    {"qkv": 96, "output": 32, "ffn": 200},
]


def stage(folder: Path, number: int, tensor: int, load: Path | None = None, **sections: Any) -> RunConfig:
    """Train the toy at the given size for ten steps and return its config."""
    config = toy_config(
        folder,
        model={"tokens": TOKENS[number], **sections.pop("model", {})},
        parallel={"tensor": tensor},
        training={"micro_batch_size": 4},
        checkpoint={"load": str(load) if load else None},
        **sections,
    )
    config = config.model_copy(update={"run_dir": str(folder / f"stage{number}")})
    run_ranks(tensor, train_toy, config, tensor=tensor)
    return config


def validation_losses(config: RunConfig) -> list[float]:
    rows = read_rows(Path(config.run_dir) / "metrics.jsonl")
    return [row["val_loss"] for row in rows if "val_loss" in row]


def values(path: Path, name: str, state: str = "weight") -> torch.Tensor:
    """One tensor of a checkpoint, whole."""
    manifest = read_manifest(path)
    rows, columns = manifest.shapes[name]
    pieces = IntervalReader(path, manifest).read(Interval(name, 0, rows * columns), state)
    return torch.cat([piece for _, piece in pieces]).view(rows, columns)


@pytest.mark.parametrize("kind", ["l2_norm_gelu", "gelu_l2_norm"])
@pytest.mark.parametrize("tensor", [1, 2])
def test_grown_twice_the_loss_is_preserved_and_falls_on(tmp_path: Path, tensor: int, kind: str) -> None:
    model = {"score_norm": kind}
    config = stage(tmp_path, 0, tensor, model=model)
    for number in (1, 2):
        target = toy_config(tmp_path, model={"tokens": TOKENS[number], **model})
        path, _ = grow(find_checkpoint(config.run_dir), target, tmp_path / f"grown{number}", Growth())
        before = validation_losses(config)[-1]
        config = stage(tmp_path, number, 3 - tensor, load=path, model=model)
        after, end = validation_losses(config)
        assert after == pytest.approx(before, rel=1e-6)
        assert end < after
        name = "layers.1.ffn.key_tokens" if number == 2 else "layers.1.attention.query.key_tokens"
        old_rows = TOKENS[number - 1]["ffn" if number == 2 else "qkv"]
        learned = values(find_checkpoint(config.run_dir), name)[old_rows:]
        assert learned.abs().amin(dim=1).gt(0).all(), "gradients reach every new key"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig]:
    folder = tmp_path_factory.mktemp("trained")
    return folder, stage(folder, 0, tensor=2)


def grown(trained: tuple[Path, RunConfig], tmp_path: Path, **rule: Any) -> tuple[Path, Path, Manifest]:
    folder, config = trained
    source = find_checkpoint(config.run_dir)
    target = toy_config(folder, model={"tokens": TOKENS[2]})
    return source, *grow(source, target, tmp_path, Growth(**rule))


def test_old_rows_are_carried_bit_for_bit_and_new_rows_start_as_told(
    trained: tuple[Path, RunConfig], tmp_path: Path
) -> None:
    source, path, manifest = grown(trained, tmp_path)
    old = read_manifest(source)
    assert manifest.adam_step == old.adam_step == 10
    assert (manifest.step, manifest.position, manifest.totals) == (0, old.position, old.totals)
    for name in manifest.shapes:
        if name.startswith("final_norm"):
            continue
        for state in ("weight", "exp_avg", "exp_avg_sq"):
            before, after = values(source, name, state), values(path, name, state)
            assert torch.equal(after[: len(before)], before)
            new = after[len(before) :]
            if state == "weight" and name.endswith("value_tokens"):
                assert new.std() > 0
            else:
                assert new.eq(0).all()


def test_reset_drops_the_moments_of_all(trained: tuple[Path, RunConfig], tmp_path: Path) -> None:
    source, path, manifest = grown(trained, tmp_path, optimizer="reset")
    assert (manifest.states, manifest.adam_step) == (["weight"], 0)
    name = "layers.0.attention.output.value_tokens"
    assert torch.equal(values(path, name)[:16], values(source, name))
    size = sum(f.stat().st_size for f in path.glob("*.safetensors"))
    assert size < 1.1 * 4 * sum(
        r * c for r, c in (s if len(s) == 2 else (s[0], 1) for s in manifest.shapes.values())
    )


@pytest.mark.parametrize(
    "rule, expected",
    [
        ({}, [(4.0, 96**0.5), (4.0, 4.0 + (96**0.5 - 4.0) * 4 / 5)]),  # half of ten steps
        ({"tau": "keep"}, [(4.0, 4.0), (4.0, 4.0)]),
        ({"tau": "sqrt"}, [(96**0.5, 96**0.5)] * 2),
        ({"tau": "anneal", "tau_steps": 8}, [(4.0, 96**0.5), (4.0, (4.0 + 96**0.5) / 2)]),
    ],
)
def test_tau_is_kept_annealed_or_set(
    trained: tuple[Path, RunConfig], tmp_path: Path, rule: dict[str, Any], expected: list[tuple[float, float]]
) -> None:
    (start, end), (_, middle) = expected
    _, _, manifest = grown(trained, tmp_path, **rule)
    tau = taus_from_json(manifest.taus)["qkv"]
    assert (tau.at(0), tau.at(1000), tau.at(4)) == pytest.approx((start, end, middle))


def test_growing_again_replaces_what_is_there(trained: tuple[Path, RunConfig], tmp_path: Path) -> None:
    grown(trained, tmp_path)
    _, path, manifest = grown(trained, tmp_path, keys="normal")
    assert values(path, "layers.0.ffn.key_tokens")[64:].std() > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000000"]
    assert [entry["keys"] for entry in manifest.history] == ["normal"]


@pytest.mark.parametrize(
    "model, rule, words",
    [
        (
            {"tokens": TOKENS[2], "hidden_size": 64},
            {},
            "model.hidden_size: it was 32, the config has 64",
        ),
        ({"tokens": TOKENS[2], "layers": 3}, {}, "model.layers: it was 2, the config has 3"),
        ({"tokens": TOKENS[2], "attention_heads": 2}, {}, "model.attention_heads"),
        ({"tokens": TOKENS[2], "vocab_size": 128}, {}, "model.vocab_size"),
        (
            {"tokens": {"qkv": 8, "output": 16, "ffn": 64}},
            {},
            "model.tokens.qkv was 16, the config has 8",
        ),
        ({"tokens": TOKENS[0]}, {}, "nothing grows"),
        ({"tokens": TOKENS[2], "score_norm": "softmax"}, {}, "model.score_norm: it was l2_norm_gelu"),
    ],
)
def test_what_is_not_growth_is_refused_in_words(
    trained: tuple[Path, RunConfig], tmp_path: Path, model: dict[str, Any], rule: dict[str, Any], words: str
) -> None:
    folder, config = trained
    with pytest.raises(UserError, match=words):
        grow(find_checkpoint(config.run_dir), toy_config(folder, model=model), tmp_path, Growth(**rule))
    assert not list(tmp_path.iterdir())


def test_softmax_grows_only_when_asked_because_its_loss_changes(tmp_path: Path) -> None:
    model = {"score_norm": "softmax"}
    source = find_checkpoint(stage(tmp_path, 0, tensor=1, model=model).run_dir)
    target = toy_config(tmp_path, model={"tokens": TOKENS[2], **model})
    with pytest.raises(UserError, match="allow_inexact accepts that"):
        grow(source, target, tmp_path / "grown", Growth())
    path, _ = grow(source, target, tmp_path / "grown", Growth(allow_inexact=True))
    config = stage(tmp_path, 2, tensor=1, load=path, model=model)
    before, after = read_manifest(source).val_loss, validation_losses(config)[0]
    assert before is not None and after != pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize(
    "rule, words",
    [
        ({"keys": "zero", "values": "zero"}, "never learns"),
        ({"tau": "keep", "tau_steps": 5}, "tau_steps belongs to tau=anneal"),
    ],
)
def test_rules_that_cannot_work_are_refused_in_words(rule: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        validate(Growth, rule, "growth")


@pytest.mark.parametrize("optimizer", ["carry", "reset"])
def test_a_damaged_shard_is_not_grown(
    trained: tuple[Path, RunConfig], tmp_path: Path, optimizer: Literal["carry", "reset"]
) -> None:
    folder, config = trained
    copy = tmp_path / "copy"
    shutil.copytree(find_checkpoint(config.run_dir), copy)
    shard = copy / "rank-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    target = toy_config(folder, model={"tokens": TOKENS[2]})
    with pytest.raises(UserError, match=r"rank-00001\.safetensors is damaged"):
        grow(copy, target, tmp_path / "out", Growth(optimizer=optimizer))
    assert not (tmp_path / "out" / "latest").exists()


def test_a_runs_own_folder_is_not_grown_into(trained: tuple[Path, RunConfig]) -> None:
    folder, config = trained
    checkpoints = Path(config.run_dir) / "checkpoints"
    with pytest.raises(UserError, match="so it is a run's; grow into a folder of its own"):
        grow(
            find_checkpoint(checkpoints),
            toy_config(folder, model={"tokens": TOKENS[2]}),
            checkpoints,
            Growth(),
        )
    assert find_checkpoint(checkpoints).name == "step-00000010"


def test_a_full_disk_is_told_in_words_and_leaves_nothing(
    trained: tuple[Path, RunConfig], tmp_path: Path
) -> None:
    folder, config = trained
    command = [
        sys.executable,
        str(Path(__file__).parents[2] / "tools/grow_checkpoint.py"),
        "--load",
        config.run_dir,
    ]
    grown = toy_config(folder, model={"tokens": TOKENS[2]})
    (tmp_path / "run.yaml").write_text(dump_config(grown))
    command += ["--config", str(tmp_path / "run.yaml"), "--save", str(tmp_path / "out")]
    limited = f"trap '' XFSZ; ulimit -f 64; exec {shlex.join(command)}"  # no file beyond 64 kB
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(f"into {tmp_path / 'out'}: File too large")
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").iterdir())
