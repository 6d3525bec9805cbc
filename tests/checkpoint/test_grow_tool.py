"""tools/grow_checkpoint.py: targets, links, dry runs and full disks, on checkpoints of random numbers."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.growth import write_checkpoint
from megatron_tokenformer.checkpoint.manifest import read_manifest
from megatron_tokenformer.checkpoint.store import find_checkpoint
from megatron_tokenformer.commands.grow_checkpoint import main
from megatron_tokenformer.config.load import dump_config, load_config, merge
from megatron_tokenformer.config.sizes import parameter_count
from megatron_tokenformer.errors import UserError
from tests.checkpoint.test_damage import edited
from tests.checkpoint.test_grow import values
from tests.toy import toy_config

LARGER = "qkv=96,output=32,ffn=200"
NAME = "layers.1.ffn.value_tokens"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "run/checkpoints", toy_config(tmp_path), ranks=2)


def grow(source: Path, *words: str, save: str = "grown") -> Path:
    """Run the tool beside the source; where the grown checkpoint goes."""
    folder = source.parents[2] / save
    assert main(["--load", str(source), "--save", str(folder), *words]) == 0
    return folder


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return figures


def assert_grown(source: Path, path: Path) -> None:
    for state in ("weight", "exp_avg", "exp_avg_sq"):
        assert torch.equal(values(path, NAME, state)[:64], values(source, NAME, state))


def test_tokens_and_a_config_give_the_same_bytes(source: Path) -> None:
    (source.parent / "next.yaml").write_text(
        dump_config(toy_config(source.parents[2], model={"tokens": {"qkv": 96, "output": 32, "ffn": 200}}))
    )
    one = find_checkpoint(grow(source, "--config", str(source.parent / "next.yaml"), save="one"))
    two = find_checkpoint(grow(source, "--tokens", LARGER, save="two"))
    assert [s.hash for s in read_manifest(one).shards] == [s.hash for s in read_manifest(two).shards]
    assert_grown(source, two)


def test_of_a_folder_a_damaged_newest_checkpoint_is_passed_over_in_words(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = source.with_name("step-00000020")
    shutil.copytree(source, damaged)
    next(damaged.glob("*.safetensors")).write_bytes(b"short")
    (source.parent / "latest").write_text(f"{damaged.name}\n")
    grown = source.parents[2] / "grown"
    assert main(["--load", str(source.parent), "--save", str(grown), "--tokens", LARGER]) == 0
    assert f"warning: passing over {damaged}" in capsys.readouterr().out
    assert read_manifest(find_checkpoint(grown)).history[-1]["from"] == str(source)
    with pytest.raises(UserError, match="bytes, its manifest says"):
        grow(damaged, "--tokens", LARGER)


@pytest.mark.parametrize("config", [{"zzz\x1b": 1}, {"model": {"layers": "two"}}, {"model": {"layers": 3}}])
def test_a_config_that_is_damaged_is_the_checkpoints_fault_and_the_one_before_is_taken(
    source: Path, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = source.with_name("step-00000020")
    shutil.copytree(source, damaged)
    edited(lambda stored: merge(stored["config"], config))(damaged)
    with pytest.raises(UserError, match=f"checkpoint {damaged} is damaged: it") as refused:
        grow(damaged, "--tokens", LARGER)
    assert refused.value.exit_code == 1 and str(refused.value).isprintable()
    (source.parent / "latest").write_text(f"{damaged.name}\n")
    folder = source.parents[2] / "grown"
    assert main(["--load", str(source.parent), "--save", str(folder), "--tokens", LARGER]) == 0
    assert f"warning: passing over {damaged}: {refused.value}" in capsys.readouterr().out
    assert_grown(source, find_checkpoint(folder))


def test_places_are_written_down_for_readers_in_other_folders(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parents[2])
    assert main(["--load", "run", "--save", "grown", "--tokens", LARGER, "run_dir=next"]) == 0
    folder = source.parents[2] / "grown"
    assert read_manifest(find_checkpoint(folder)).history[-1]["from"] == str(source)
    assert load_config(folder / "config.yaml").checkpoint.load == str(folder)


def test_target_params_prints_the_counts_that_it_chose(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = find_checkpoint(grow(source, "--target-params", "133K", "--json"))
    config = read_manifest(path).config["model"]
    assert config["tokens"] == {"qkv": 128, "output": 128, "ffn": 512}
    lines = capsys.readouterr().out.splitlines()
    after = parameter_count(toy_config(source.parents[2], model={"tokens": config["tokens"]}).model)
    assert f"-> {after:,}" in lines[1]
    assert [line.split()[:4] for line in lines[3:6]] == [
        ["qkv", "16", "112", "128"],
        ["output", "16", "112", "128"],
        ["ffn", "64", "448", "512"],
    ]
    assert json.loads(lines[-1])["tokens_after"] == config["tokens"]


def test_without_a_config_the_next_stage_gets_the_checkpoints_own(source: Path) -> None:
    folder = grow(source, "--tokens", LARGER, "run_dir=elsewhere", "optimizer.lr=1e-2")
    config = load_config(folder / "config.yaml")
    own = toy_config(source.parents[2])
    assert (config.run_dir, config.optimizer.lr, config.checkpoint.load) == ("elsewhere", 1e-2, str(folder))
    assert config.training == own.training and config.data == own.data
    assert config.model.tokens.model_dump() == {"qkv": 96, "output": 32, "ffn": 200}


@pytest.mark.parametrize(
    "words, told",
    [
        (["--target-params", "1K"], "is no growth"),
        (["--tokens", "ffn=8"], "growth takes no tokens away: model.tokens.ffn was 64"),
        (["--tokens", "ffn=64"], "nothing grows"),
        (["--tokens", LARGER, "--no-verify"], "--no-verify goes with --link"),
        (["--tokens", LARGER, "--link", "--optimizer", "reset"], "leave one out"),
        (["--tokens", LARGER, "--link", "--old-token-noise", "0.1"], "leave one out"),
        (["--tokens", LARGER, "--tau", "keep", "--tau-steps", "5"], "--tau-steps 5 goes with --tau anneal"),
        (["--tokens", LARGER, "--values", "zero"], "--values zero with zero keys never learns"),
        (["--tokens", "ffn=65", "parallel.tensor=2"], "model.tokens.ffn=65 is not divisible"),
    ],
)
def test_what_cannot_be_meant_is_refused(source: Path, words: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        grow(source, *words)
    assert not (source.parents[2] / "grown").exists()


@pytest.mark.parametrize("folder", ["/proc/x", "{source}/manifest.json/x"])
def test_a_folder_that_takes_no_files_is_told_as_such(source: Path, folder: str) -> None:
    folder = folder.format(source=source)
    with pytest.raises(
        UserError, match=f"into {folder}: nothing can be written in {Path(folder).parent} "
    ) as told:
        main(["--load", str(source), "--save", folder, "--tokens", LARGER, "--dry-run"])
    assert told.value.exit_code == 1


def test_every_example_of_the_help_is_a_line_or_goes_on_with_a_backslash(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = capsys.readouterr().out.split("examples:")[1].splitlines()
    for before, line in itertools.pairwise(lines):
        assert line.startswith("      ") == before.endswith("\\"), line


@pytest.mark.parametrize("words", [[], ["--tokens", LARGER, "--target-params", "1M"]])
def test_exactly_one_target_is_required(
    source: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        grow(source, *words)
    assert end.value.code == 2
    assert "--target-params" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--link"], ["--link", "--no-verify"]])
def test_linked_shards_are_the_same_files_and_outlive_the_old_checkpoint(
    source: Path, words: list[str]
) -> None:
    path = find_checkpoint(grow(source, "--tokens", LARGER, *words))
    shards = read_manifest(source).shards
    assert all((path / shard.file).samefile(source / shard.file) for shard in shards)
    assert_grown(source, path)
    before = values(path, NAME)
    shutil.rmtree(source)
    assert torch.equal(values(path, NAME), before)


def test_a_checkpoint_behind_symbolic_links_is_linked_to_its_files(source: Path) -> None:
    behind = source.parent / "step-00000099"
    behind.mkdir()
    for path in source.iterdir():
        (behind / path.name).symlink_to(path)
    path = find_checkpoint(grow(behind, "--tokens", LARGER, "--link"))
    shard = path / read_manifest(source).shards[0].file
    assert not shard.is_symlink() and shard.samefile(source / shard.name)


@pytest.mark.skipif(
    os.stat("/dev/shm").st_dev == os.stat(tempfile.gettempdir()).st_dev,
    reason="needs two file systems; /dev/shm and the temporary folder are on one",
)
def test_between_file_systems_linking_becomes_copying_and_says_so(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(f"/dev/shm/grown-{os.getpid()}")
    try:
        words = ["--load", str(source), "--save", str(folder), "--tokens", LARGER, "--link", "--json"]
        assert main(words) == 0
        out = capsys.readouterr().out
        assert f"cannot link {source} into {folder}: Invalid cross-device link; copying instead" in out
        assert json.loads(out.splitlines()[-1])["old_rows"] == "copied"
        assert_grown(source, find_checkpoint(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_a_damaged_shard_is_not_linked_unless_told_not_to_look(source: Path) -> None:
    shard = source / read_manifest(source).shards[1].file
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="is damaged: its hash is not the manifest's"):
        grow(source, "--tokens", LARGER, "--link")
    assert not list((source.parents[2] / "grown").iterdir())
    grow(source, "--tokens", LARGER, "--link", "--no-verify")


@pytest.mark.parametrize("options", [[], ["--link"], ["--optimizer", "reset"]])
def test_a_dry_run_tells_the_sizes_and_writes_nothing(
    source: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--tokens", LARGER, *options, "--json"]
    folder = grow(source, *words, "--dry-run")
    assert not folder.exists()
    told = last_line(capsys)
    path = find_checkpoint(grow(source, *words))
    done = last_line(capsys)
    differ = {key for key in told if told[key] != done[key]}
    assert differ <= {"path", "bytes_free_before"}
    assert (told["path"], done["path"]) == (None, str(path))
    new = path / "grown-001.safetensors"
    old = sum(f.stat().st_size for f in path.glob("rank-*"))
    for promised, size in ((told["bytes_new"], new.stat().st_size), (told["bytes_old"], old)):
        assert abs(promised - size) < 0.1 * size, "all but the headers"
    assert done["old_rows"] == {"--link": "linked", "--optimizer": "rewritten"}.get(
        "".join(options[:1]), "copied"
    )


@pytest.mark.parametrize(
    "rule, words",
    [
        ([], []),
        (["--keys", "normal"], ["keys=normal gives new tokens weight at once"]),
        (["--old-token-noise", "0.02"], ["noise of 0.02 is added to the old tokens"]),
        (["--tau", "sqrt"], ["tau=sqrt scales every weight anew"]),
        (["--tau", "anneal", "--tau-steps", "5"], []),
        (["--tau-steps", "5"], []),
    ],
)
def test_a_dry_run_tells_whether_the_rule_is_exact(
    source: Path, rule: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    grow(source, "--tokens", LARGER, *rule, "--dry-run", "--json")
    told = last_line(capsys)
    assert (told["exact"], told["inexact_because"]) == (not words, words)


@pytest.mark.parametrize("words", [[], ["--dry-run"], ["--link"]])
def test_a_growth_beyond_the_disk_is_refused_before_anything_is_written(
    source: Path, words: list[str]
) -> None:
    with pytest.raises(UserError, match=r"it takes [\d,.]+ GB, and there [\d,.]+ GB are free"):
        grow(source, "--target-params", "10000B", *words)
    assert not (source.parents[2] / "grown").exists()


def test_a_grown_checkpoint_grows_again_with_links_to_both_of_its_parts(source: Path) -> None:
    first = find_checkpoint(grow(source, "--tokens", LARGER, "--link"))
    second = find_checkpoint(grow(first, "--tokens", "ffn=256", "--link", save="again"))
    assert sorted(path.name for path in second.glob("*.safetensors")) == [
        *("grown-001.safetensors", "grown-002.safetensors"),
        *("rank-00000.safetensors", "rank-00001.safetensors"),
    ]
    assert_grown(source, second)
    assert len(values(second, NAME)) == 256
    assert (second / "rank-00000.safetensors").stat().st_nlink == 3


def stacked(path: Path, role: str, kind: str) -> torch.Tensor:
    """The keys or the values of a role, of all layers: [layers x projections, rows, width]."""
    names = [name for name in read_manifest(path).shapes if name.endswith(kind)]
    parts = {"qkv": ("query", "key", "value"), "output": ("output",), "ffn": ("ffn",)}[role]
    return torch.stack([values(path, name) for name in names if name.split(".")[-2] in parts])


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("rule", [["--keys", "normal"], ["--link"], ["--optimizer", "reset"]])
def test_the_report_and_the_history_tell_the_mean_norms_of_old_and_new_tokens(
    tmp_path: Path, ranks: int, rule: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_checkpoint(tmp_path / "run/checkpoints", toy_config(tmp_path), ranks=ranks)
    path = find_checkpoint(grow(source, "--tokens", LARGER, *rule, "--json"))
    told = last_line(capsys)["norms"]
    assert told == read_manifest(path).history[-1]["norms"]
    for role, rows in (("qkv", 16), ("output", 16), ("ffn", 64)):
        for kind in ("keys", "values"):
            norms = stacked(path, role, f"{kind[:-1]}_tokens").double().norm(dim=2)
            assert told[role][f"old_{kind}"] == pytest.approx(norms[:, :rows].mean().item(), rel=1e-6)
            assert told[role][f"new_{kind}"] == pytest.approx(norms[:, rows:].mean().item(), rel=1e-6)


def test_norms_of_old_tokens_that_nobody_read_are_not_told(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grow(source, "--tokens", LARGER, "--link", "--no-verify", "--json")
    norms = last_line(capsys)["norms"]["ffn"]
    assert norms["old_keys"] is None and norms["old_values"] is None
    assert norms["new_keys"] == 0 and norms["new_values"] > 0


def test_noise_on_old_tokens_is_that_of_the_seed_whatever_wrote_the_shards(tmp_path: Path) -> None:
    grown = []
    for ranks in (1, 3):
        source = write_checkpoint(tmp_path / f"run{ranks}/checkpoints", toy_config(tmp_path), ranks=ranks)
        path = find_checkpoint(
            grow(source, "--tokens", LARGER, "--old-token-noise", "0.01", save=f"out{ranks}")
        )
        names = [name for name in read_manifest(source).shapes if name.endswith("_tokens")]
        noise = {
            name: values(path, name)[: len(values(source, name))] - values(source, name) for name in names
        }
        grown.append(noise)
        for name in names:
            assert noise[name].std().item() == pytest.approx(0.01, rel=0.15), name
            for state in ("exp_avg", "exp_avg_sq"):
                old = values(source, name, state)
                assert torch.equal(values(path, name, state)[: len(old)], old)
        assert torch.equal(values(path, "embedding.weight"), values(source, "embedding.weight"))
        assert not torch.allclose(noise[names[0]], noise[names[1]], atol=1e-3), "each has noise of its own"
    for name, noise in grown[0].items():
        assert torch.allclose(noise, grown[1][name], atol=1e-6), "but for rounding of the sum"


@pytest.mark.parametrize("noise", ["-1", "nan", "inf"])
def test_noise_that_is_no_size_is_refused(source: Path, noise: str) -> None:
    with pytest.raises(UserError, match="old_token_noise"):
        grow(source, "--tokens", LARGER, f"--old-token-noise={noise}")


@pytest.mark.parametrize("way", ["", "a link", "a relative path"])
def test_a_checkpoint_is_not_resized_over_itself(
    source: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    grown = grow(source, "--tokens", LARGER)
    save = grown
    if way == "a link":
        save = grown.with_name("link")
        save.symlink_to(grown)
    elif way == "a relative path":
        monkeypatch.chdir(grown)
        save = Path("../grown/.")
    before = (find_checkpoint(grown) / "manifest.json").read_bytes()
    for words in (("--tokens", "qkv=128"), ("--shrink", "--tokens", "qkv=8")):
        with pytest.raises(UserError, match="would be replaced"):
            main(["--load", str(grown), "--save", str(save), *words])
    assert (find_checkpoint(grown) / "manifest.json").read_bytes() == before


def test_the_folder_of_a_run_is_not_grown_into(source: Path) -> None:
    run = source.parents[1]
    (run / "config.yaml").write_text("the run's own")
    with pytest.raises(UserError, match="holds checkpoints, so it is a run's"):
        main(["--load", str(run), "--save", str(run), "--tokens", LARGER])
    assert (run / "config.yaml").read_text() == "the run's own"
    assert find_checkpoint(run) == source


def test_what_a_killed_growth_set_aside_gets_its_name_back(source: Path) -> None:
    grown = grow(source, "--tokens", LARGER)
    aside = grown / ".step-00000000.replaced"
    find_checkpoint(grown).rename(aside)
    (grown / ".step-00000000.writing").mkdir()
    shard = read_manifest(source).shards[0]
    (source / shard.file).write_bytes(b"x" * shard.size)
    with pytest.raises(UserError, match="damaged"):
        main(["--load", str(source), "--save", str(grown), "--tokens", LARGER])
    assert [path.name for path in sorted(grown.iterdir())] == ["config.yaml", "latest", "step-00000000"]
    assert read_manifest(find_checkpoint(grown)).shapes[NAME][0] == 200


@pytest.mark.parametrize("words", [(), ("--keys", "normal"), ("--tau", "sqrt"), ("--old-token-noise", "0.1")])
def test_the_old_models_loss_is_the_new_ones_only_if_the_function_is_the_same(
    source: Path, words: tuple[str, ...]
) -> None:
    path = source / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "loss": 2.0, "val_loss": 3.0}))
    manifest = read_manifest(find_checkpoint(grow(source, "--tokens", LARGER, *words)))
    assert (manifest.loss, manifest.val_loss) == ((None, None) if words else (2.0, 3.0))
    assert manifest.history[-1]["val_loss"] == 3.0
