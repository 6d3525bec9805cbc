"""tools/inspect_checkpoint.py: it tells what is there as it is, and names what is damaged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.growth import write_checkpoint
from megatron_tokenformer.checkpoint.manifest import MANIFEST, read_manifest
from megatron_tokenformer.checkpoint.shrink import carry_out, plan_shrink
from megatron_tokenformer.checkpoint.store import LATEST
from megatron_tokenformer.commands.inspect_checkpoint import main
from megatron_tokenformer.config.growth import Growth, Shrinking
from megatron_tokenformer.config.sizes import parameter_count
from megatron_tokenformer.errors import UserError
from tests.checkpoint.growing import grow
from tests.checkpoint.test_damage import edited
from tests.toy import toy_config

ROOT = Path(__file__).resolve().parents[2]
LAST = "layers.1.ffn.key_tokens"
LARGER = {"qkv": 96, "output": 32, "ffn": 200}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint by two ranks, and one that grew from it, both of random numbers."""
    folder = tmp_path_factory.mktemp("inspected")
    source = write_checkpoint(folder / "run/checkpoints", toy_config(folder), ranks=2)
    target = toy_config(folder, model={"tokens": LARGER})
    grow(source, target, folder / "grown", Growth(tau="anneal", tau_steps=100))
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "inspected"))


def inspect(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    """What the tool prints, and its object."""
    assert main([*words, "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    return "\n".join(lines), json.loads(last)


def test_a_grown_checkpoint_is_told_with_its_history(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "grown" / "step-00000000"
    text, told = inspect(str(path), capsys=capsys)
    model = toy_config(folder, model={"tokens": LARGER}).model
    assert told["parameters"] == parameter_count(model)
    assert f"parameters {parameter_count(model):,}, as weight, exp_avg, exp_avg_sq" in text
    assert told["bytes"] == sum(file.stat().st_size for file in path.iterdir())
    assert told["config"]["model"]["tokens"] == LARGER and "tokens qkv=96/output=32/ffn=200" in text
    assert told["latest"] and "latest" in text.splitlines()[0]
    (growth,) = told["history"]
    assert growth["tokens_after"] == LARGER and growth["from"].endswith("run/checkpoints/step-00000010")
    assert "growth 1: " in text and "keys zero, values normal, tau anneal, tau_steps 100" in text
    assert "ffn 8.0000 -> 14.1421 over 100 steps" in text
    assert [shard["file"] for shard in told["shards"]] == [
        "rank-00000.safetensors",
        "rank-00001.safetensors",
        "grown-001.safetensors",
    ]


def test_tensors_are_told_by_role_or_each(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(folder / "grown" / "step-00000000")
    by_role, told = inspect(path, capsys=capsys)
    each, _ = inspect(path, "--tensors", capsys=capsys)
    stored = json.loads((Path(path) / MANIFEST).read_text())
    names = [name for shard in stored["shards"] for name, _, _ in shard["intervals"]]
    last, all_layers = names.count(LAST), sum(name.endswith("ffn.key_tokens") for name in names)
    # 200 rows of 32; 3 states of 4 bytes; 2 layers.
    words = ["layers.*.ffn.key_tokens", "200", "x", "32", "2", "12,800", "153,600", str(all_layers)]
    assert words in [line.split() for line in by_role.splitlines()]
    words = [LAST, "200", "x", "32", "1", "6,400", "76,800", str(last)]
    assert words in [line.split() for line in each.splitlines()]
    manifest = read_manifest(Path(path))
    assert {row["name"]: row["shape"] for row in told["tensors"]} == manifest.shapes
    assert sum(row["parameters"] for row in told["tensors"]) == told["parameters"]
    assert sum(row["intervals"] for row in told["tensors"]) == sum(len(s.intervals) for s in manifest.shards)


@pytest.mark.parametrize("inside", ["", "checkpoints", "checkpoints/"])
def test_of_a_folder_all_are_listed_with_what_dead_saves_left(
    folder: Path, inside: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = folder / "run" / "checkpoints"
    shutil.copytree(checkpoints / "step-00000010", checkpoints / "step-00000700")
    edited(lambda stored: stored.update(step=700, val_loss=2.5))(checkpoints / "step-00000700")
    (checkpoints / LATEST).write_text("step-00000700\n")
    for name in (".step-00000800.writing", ".step-00000600.deleted", "step-00000650"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "rank-00000.safetensors").write_bytes(bytes(1000))
    text, told = inspect(f"{folder}/run/{inside}", capsys=capsys)
    assert [(Path(one["path"]).name, one["kind"], one["latest"]) for one in told["checkpoints"]] == [
        ("step-00000010", "checkpoint", False),
        ("step-00000700", "checkpoint", True),
        (".step-00000600.deleted", "half deleted", False),
        (".step-00000800.writing", "unfinished save", False),
        ("step-00000650", "incomplete", False),
    ]
    assert [one["bytes"] for one in told["checkpoints"]][2:] == [1000, 1000, 1000]
    (line,) = (line.split() for line in text.splitlines() if "step-00000700" in line)
    assert line[1] == "700" and line[-1] == "latest" and "2.500000" in line


def test_a_shrinking_is_called_one_and_means_are_told_line_by_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = folder / "grown" / "step-00000000", toy_config(folder)
    path, manifest = carry_out(plan_shrink(source, target, folder / "shrunk", Shrinking()))
    text, _ = inspect(str(path), capsys=capsys)
    assert f"  growth 1: {manifest.history[0]['time']}" in text and "  shrink 2: " in text
    reach, norms = manifest.history[1]["reach"]["ffn"], manifest.history[0]["norms"]["ffn"]
    assert f"    mean |K| |V|, ffn: kept {reach['kept']:.6g}, dropped {reach['dropped']:.6g}\n" in text
    assert f"    mean norm, ffn: old keys {norms['old_keys']:.6g}, new keys 0, old values" in text
    assert "reach" not in text and "kind" not in text


def test_where_nothing_is_complete_it_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = folder / "run" / "checkpoints"
    (checkpoints / "step-00000010").rename(checkpoints / ".step-00000010.replaced")
    (checkpoints / ".step-00000020.writing").mkdir()
    with pytest.raises(UserError, match=r"\.step-00000010\.replaced is, but was set aside") as refused:
        main([str(checkpoints), "--json"])
    assert refused.value.exit_code == 2
    out = capsys.readouterr().out
    assert "sound" not in out
    assert json.loads(out.splitlines()[-1])["checkpoints"][0]["parameters"] > 0, "it was looked into"
    next((checkpoints / ".step-00000010.replaced").glob("rank*")).unlink()
    with pytest.raises(UserError, match="No such file") as refused:
        main([str(checkpoints)])
    assert refused.value.exit_code == 1
    shutil.rmtree(checkpoints / ".step-00000010.replaced")
    (checkpoints / "step-00000030").mkdir()
    left = r"\.step-00000020\.writing \(unfinished save\), step-00000030 \(incomplete\)"
    with pytest.raises(UserError, match=f"nothing complete at {checkpoints}: {left}") as refused:
        main([str(checkpoints)])
    assert refused.value.exit_code == 2 and "sound" not in capsys.readouterr().out


def test_verify_reads_all_hashes_and_names_every_bad_file(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "grown" / "step-00000000"
    _, told = inspect(str(path), "--verify", capsys=capsys)
    assert told["hashes_verified"]
    for name in ("rank-00001.safetensors", "grown-001.safetensors"):
        content = bytearray((path / name).read_bytes())
        content[-1] ^= 1
        (path / name).write_bytes(content)
    text, told = inspect(str(path), capsys=capsys)
    assert "sound" in text and "--verify" in text and not told["hashes_verified"]
    for words in ([str(path)], [str(folder / "grown")]):
        with pytest.raises(UserError) as refused:
            main([*words, "--verify"])
        reason = f"checkpoint shard {path}/%s is damaged: its hash is not the manifest's"
        assert str(refused.value) == reason % "rank-00001.safetensors" + " (and 1 more)"
        assert refused.value.exit_code == 1
        assert f"DAMAGED: {reason % 'grown-001.safetensors'}\n" in capsys.readouterr().out


def test_the_tool_ends_with_one_for_damage_and_two_for_nothing(folder: Path) -> None:
    shard = folder / "grown" / "step-00000000" / "rank-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    tool = [sys.executable, str(ROOT / "tools/inspect_checkpoint.py")]
    for words, code, said in (
        ([str(folder / "grown"), "--verify"], 1, f"error: checkpoint shard {shard} is damaged: its hash"),
        ([str(folder / "nowhere")], 2, f"error: no checkpoint at {folder / 'nowhere'}: no manifest.json"),
        ([], 2, "usage:"),
    ):
        done = subprocess.run([*tool, *words], capture_output=True, text=True, timeout=60)
        assert (done.returncode, said in done.stderr) == (code, True), done.stderr
        assert "Traceback" not in done.stderr


def test_a_damaged_manifest_is_told_and_the_others_still(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = folder / "run" / "checkpoints"
    shutil.copytree(checkpoints / "step-00000010", checkpoints / "step-00000700")
    (checkpoints / "step-00000700" / MANIFEST).write_text("{")
    with pytest.raises(UserError, match=r"step-00000700/manifest\.json is damaged"):
        main([str(checkpoints), "--json"])
    out = capsys.readouterr().out
    assert any("step-00000700" in line and "damaged" in line for line in out.splitlines())
    sound, damaged = json.loads(out.splitlines()[-1])["checkpoints"]
    assert sound["parameters"] > 0 and not sound["damages"]
    assert "parameters" not in damaged and len(damaged["damages"]) == 1


def test_what_a_stranger_wrote_commands_no_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, bad = folder / "grown" / "step-00000000", "\x1b[2J\x07\u202e"

    def poison(stored: dict[str, Any]) -> None:
        stored["config"]["model"]["architecture"] = [bad]
        stored["history"] = [{"from": bad, bad: bad, "time": {bad: [bad]}, f"{bad}_before": 5}, {}]
        stored["tokenizer"] = {"type": bad, "fingerprint": bad, "vocab_size": 5}
        stored["source_tokens"], stored["layout"] = {bad: 5}, {bad: 1}
        stored["shards"][0]["hash"] = bad

    edited(poison)(path)
    text, _ = inspect(str(path), capsys=capsys)
    assert all(line.isprintable() for line in text.splitlines())
    assert "growth 2: none from none" in text


def test_looking_needs_neither_torch_nor_deepspeed() -> None:
    heavy = "{'torch', 'deepspeed', 'megatron.core', 'safetensors'} & sys.modules.keys()"
    code = f"import sys, megatron_tokenformer.commands.inspect_checkpoint; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "set()\n"
