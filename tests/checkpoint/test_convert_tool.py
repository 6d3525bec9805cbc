"""tools/convert_checkpoint.py: what it writes, tells, compares and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.growth import write_checkpoint
from megatron_tokenformer.checkpoint.portable import PortableModel, read_native
from megatron_tokenformer.checkpoint.store import find_checkpoint
from megatron_tokenformer.commands import convert_checkpoint
from megatron_tokenformer.commands.convert_checkpoint import compare, logits_of, main
from megatron_tokenformer.errors import UserError
from tests.checkpoint.published import random_weights, settings, write_whole
from tests.toy import toy_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return write_whole(tmp_path / "published", settings(), random_weights(settings()))


def convert(published: Path, *words: str) -> int:
    """From published weights to a native checkpoint in `native` beside them."""
    save = published.parent / "native"
    formats = ["--from", "official", "--to", "native"]
    return main([*formats, "--load", str(published), "--save", str(save), *words])


def test_it_writes_compares_and_tells(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(published, "--json") == 0
    path = find_checkpoint(published.parent / "native")
    out = capsys.readouterr().out
    figures: dict[str, Any] = json.loads(out.splitlines()[-1])
    assert figures["path"] == str(path)
    assert figures["parameters"] == 64 * 32 + 2 * 2 * (3 * 12 + 20 + 48) * 32 + 2 * 32
    assert figures["taus"] == read_native(path).taus
    assert figures["logits"]["difference"] == 0.0, "the same numbers, and the same code"
    assert 4.0 < figures["logits"]["largest"] < 64.0
    assert "2 layers x 32, 4 heads, vocabulary 64" in out
    assert "tokens 12 / 20 / 48, tau 3.464 / 4.472 / 6.928, l2_norm_gelu" in out
    assert "largest difference of logits 0.0e+00" in out


def test_the_comparison_sees_one_changed_number(published: Path) -> None:
    convert(published, "--no-verify")
    right = read_native(published.parent / "native")

    def first_changed() -> torch.Tensor:
        keys = right.tensors["layers.0.ffn.key_tokens"]().clone()
        keys[0, 0] += 1.0
        return keys

    tensors = {**right.tensors, "layers.0.ffn.key_tokens": first_changed}
    wrong = PortableModel(right.model, right.sequence_length, right.taus, tensors)
    figures = compare(right, published, lambda path, ids: logits_of(wrong, ids))
    assert figures["share"] > 1e-4
    no_number = compare(right, published, lambda path, ids: logits_of(right, ids) * torch.nan)
    assert no_number["share"] > 1e30


def test_what_computes_something_else_fails(
    published: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    native = convert_checkpoint.FORMATS["native"]
    broken = convert_checkpoint.Format(native.read, native.write, lambda path, ids: torch.zeros(2, 32, 64))
    monkeypatch.setitem(convert_checkpoint.FORMATS, "native", broken)
    with pytest.raises(UserError, match=r"does not compute what .* does, so there is no .*/native;"):
        convert(published, "--json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["logits"]["share"] == pytest.approx(1.0)
    assert list(published.parent.iterdir()) == [published]
    assert convert(published, "--no-verify") == 0


def test_what_is_not_compared_yet_has_not_its_name(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native, save = convert_checkpoint.FORMATS["native"], published.parent / "native"
    (published.parent / ".native.unverified/of a killed one").mkdir(parents=True)
    (save / ".step-00000000.writing").mkdir(parents=True)

    def logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
        assert not list(save.glob("step-*"))
        assert native.logits is not None
        return native.logits(path, ids)

    looking = convert_checkpoint.Format(native.read, native.write, logits)
    monkeypatch.setitem(convert_checkpoint.FORMATS, "native", looking)
    assert convert(published) == 0
    assert sorted(path.name for path in save.iterdir()) == ["latest", "step-00000000"]
    assert sorted(published.parent.iterdir()) == [save, published]


@pytest.mark.parametrize("tolerance", ["nan", "inf", "-1e-5"])
def test_a_tolerance_that_is_none_is_refused_at_once(published: Path, tolerance: str) -> None:
    with pytest.raises(UserError, match=r"--tolerance .* is no share of a logit"):
        convert(published, f"--tolerance={tolerance}")
    assert list(published.parent.iterdir()) == [published]


def test_weights_that_are_no_numbers_fail(published: Path) -> None:
    weights = random_weights(settings())
    weights["sequential.2.mlp.key_param_tokens"][0, 0] = torch.nan
    write_whole(published, settings(), weights)
    with pytest.raises(UserError, match="NaN or infinite"):
        convert(published)


def test_a_yaml_elsewhere_is_named(published: Path) -> None:
    elsewhere = (published / "model.yml").rename(published.parent / "named.yml")
    with pytest.raises(UserError, match="--yaml FILE"):
        convert(published)
    assert convert(published, "--yaml", str(elsewhere), "--no-verify") == 0


def test_an_existing_folder_is_refused_before_anything_is_read(published: Path) -> None:
    (published.parent / "native").mkdir()
    (published.parent / "native/notes.txt").write_text("mine")
    (published / "pytorch_model.bin").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"native holds notes\.txt already"):
        convert(published)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--from", "native", "--to", "native"], "converts nothing"),
        (["--from", "native", "--to", "official"], "invalid choice: 'official'"),
        (["--from", "gguf", "--to", "native"], "invalid choice: 'gguf'"),
    ],
)
def test_formats_that_make_no_sense_are_refused(
    words: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((UserError, SystemExit)) as refused:
        main([*words, "--load", str(tmp_path), "--save", str(tmp_path / "new")])
    assert reason in f"{refused.value} {capsys.readouterr().err}"
    assert not (tmp_path / "new").exists()


def test_as_a_command_it_ends_with_one_line(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run/checkpoints", toy_config(tmp_path))  # native, and so not official
    words = ["--from", "official", "--to", "native", "--load", tmp_path / "run", "--save", tmp_path / "new"]
    tool = [sys.executable, ROOT / "tools/convert_checkpoint.py", *words]
    done = subprocess.run(tool, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no published checkpoint at ")
    assert done.stderr.count("\n") == 1
