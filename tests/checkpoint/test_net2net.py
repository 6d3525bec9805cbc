"""Net2Net: a wider dense model computes the same, its copies learn apart, its optimizer goes on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tokenformer.checkpoint import net2net
from megatron_tokenformer.checkpoint.blocks import read_blocks
from megatron_tokenformer.checkpoint.manifest import Manifest, read_manifest
from megatron_tokenformer.checkpoint.net2net import plan_widening
from megatron_tokenformer.checkpoint.store import find_checkpoint
from megatron_tokenformer.commands.grow_checkpoint import main
from megatron_tokenformer.config.growth import Growth, Widening
from megatron_tokenformer.config.load import dump_config
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.evaluation.load import load_model
from megatron_tokenformer.metrics_file import read_rows
from megatron_tokenformer.model.language_model import LanguageModel
from tests.ranks import run_ranks
from tests.toy import DENSE, VOCABULARY, toy_config, train_toy

WIDTH, HEADS = 32, 4
READS_ROWS = ("output.weight", "down.weight")
READS_COLUMNS = ("query.weight", "key.weight", "value.weight", "up.weight")


def wide(factor: float) -> dict[str, Any]:
    """The toy's dense model, so many times as wide."""
    return {**DENSE, "hidden_size": int(factor * WIDTH), "attention_heads": int(factor * HEADS)}


def train(folder: Path, name: str, model: dict[str, Any], load: Path | None = None, **parallel: Any) -> Path:
    """Ten steps on as many ranks as the layout has; the run's folder."""
    config = toy_config(
        folder,
        model=model,
        parallel=parallel,
        training={"micro_batch_size": 2},
        checkpoint={"load": str(load) if load else None},
    ).model_copy(update={"run_dir": str(folder / name)})
    run_ranks(max(parallel.values(), default=1), train_toy, config, **parallel)
    return folder / name


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that was written by two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("net2net")
    return find_checkpoint(train(folder, "narrow", DENSE, tensor=2))


def target_of(narrow: Path, factor: float, **model: Any) -> RunConfig:
    return toy_config(narrow.parents[2], model={**wide(factor), **model})


def widen(narrow: Path, folder: Path, factor: float, **rule: Any) -> tuple[Path, Manifest]:
    return net2net.carry_out(plan_widening(narrow, target_of(narrow, factor), folder, Widening(**rule)))


def model_of(path: Path) -> LanguageModel:
    return load_model(path, read_manifest(path), "fp32", torch.device("cpu")).requires_grad_(True)


def batch() -> Tensor:
    return torch.randint(VOCABULARY, (8, 33), generator=torch.Generator().manual_seed(0))


def gradients(path: Path) -> dict[str, Tensor]:
    model, tokens = model_of(path), batch()
    logits = model(tokens[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].t().flatten()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def state(path: Path, key: str) -> dict[str, Tensor]:
    """One state of every parameter, whole."""
    manifest = read_manifest(path)
    sizes = {name: math.prod(shape) for name, shape in manifest.shapes.items()}
    whole = {n: next(read_blocks(path, manifest, n, key, size))[1] for n, size in sizes.items()}
    return {name: values.view(manifest.shapes[name]) for name, values in whole.items()}


def tiled(tensor: Tensor, like: Tensor) -> Tensor:
    """Copies of a tensor side by side, as many as fit into the shape of another."""
    return tensor.tile([new // old for new, old in zip(like.shape, tensor.shape)])


@pytest.mark.parametrize("factor", [2, 3])
def test_logits_stay_and_another_layout_trains_on(narrow: Path, tmp_path: Path, factor: int) -> None:
    path, manifest = widen(narrow, tmp_path / "wide", factor)
    before, after = (model_of(p)(batch()[:, :-1]) for p in (narrow, path))
    assert (after - before).abs().max() <= 1e-6 * before.abs().max()
    old = read_manifest(narrow)
    assert (manifest.val_loss, manifest.position, manifest.totals) == (old.val_loss, old.position, old.totals)
    entry = manifest.history[-1]
    assert (entry["kind"], entry["exact"], entry["hidden_size_after"]) == ("net2net", True, factor * WIDTH)

    run = train(narrow.parents[2], f"wide-{factor}", wide(factor), load=path, pipeline=2)
    first, last = [row["val_loss"] for row in read_rows(run / "metrics.jsonl") if "val_loss" in row]
    assert first == pytest.approx(old.val_loss, rel=1e-6)
    assert last < first


def test_what_reads_a_channel_has_its_weight_shared_and_nothing_else_changes(
    narrow: Path, tmp_path: Path
) -> None:
    path, _ = widen(narrow, tmp_path, 3)
    old, new = state(narrow, "weight"), state(path, "weight")
    for name, weight in new.items():
        if name.endswith(READS_ROWS):
            assert torch.allclose(
                sum(weight.chunk(3, 0)), tiled(old[name], weight[: len(old[name])]), atol=1e-6
            )
        elif name.endswith(READS_COLUMNS):
            shared = sum(weight.chunk(3, 1))
            assert torch.allclose(shared, tiled(old[name], shared), atol=1e-6)
        elif name == "final_norm.gain_minus_one":
            assert torch.allclose(sum(weight.chunk(3)) + 3.0, old[name] + 1.0, atol=1e-6)
        elif name == "final_norm.bias":
            assert torch.allclose(sum(weight.chunk(3)), old[name], atol=1e-6)
        else:
            assert torch.equal(weight, tiled(old[name], weight)), name


@pytest.mark.parametrize("factor", [2, 3])
def test_moments_become_what_gradients_become(narrow: Path, tmp_path: Path, factor: int) -> None:
    """With equal shares the new gradients are known: of each parameter a whole part of the old ones."""
    path, manifest = widen(narrow, tmp_path, factor, spread=0.0)
    old, new = gradients(narrow), gradients(path)
    first, second = (state(narrow, key) for key in ("exp_avg", "exp_avg_sq"))
    wide_first, wide_second = (state(path, key) for key in ("exp_avg", "exp_avg_sq"))
    for name, gradient in new.items():
        part = (gradient.norm() / tiled(old[name], gradient).norm()).item()
        assert part == pytest.approx(1.0 if name.startswith("final_norm") else 1.0 / factor, rel=1e-4), name
        assert torch.allclose(gradient, part * tiled(old[name], gradient), atol=1e-3 * gradient.abs().max())
        assert torch.allclose(wide_first[name], part * tiled(first[name], gradient), rtol=1e-4)
        assert torch.allclose(wide_second[name], part**2 * tiled(second[name], gradient), rtol=1e-3)
    assert manifest.adam_step == read_manifest(narrow).adam_step == 10


def test_reset_drops_the_moments(narrow: Path, tmp_path: Path) -> None:
    _, manifest = widen(narrow, tmp_path, 2, optimizer="reset")
    assert (manifest.states, manifest.adam_step) == (["weight"], 0)


def alike(gradient: Tensor, dim: int) -> float:
    """Cosine between the gradients of two copies; 1 if Adam would move them alike."""
    one, other = gradient.chunk(2, dim)
    return F.cosine_similarity(one.flatten(), other.flatten(), dim=0).item()


def test_copies_learn_apart_unless_shares_are_equal(narrow: Path, tmp_path: Path) -> None:
    apart, equal = (gradients(widen(narrow, tmp_path / f"{s}", 2, spread=s)[0]) for s in (0.5, 0.0))
    for name in ("embedding.weight", "layers.0.attention.value.weight", "layers.1.mlp.up.weight"):
        dim = 1 if name.startswith("embedding") else 0
        assert alike(apart[name], dim) < 0.99, name
        assert alike(equal[name], dim) > 0.99999, name


def test_blocks_and_layouts_do_not_show(
    narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = widen(narrow, tmp_path / "whole", 2)
    monkeypatch.setattr(net2net, "BLOCK_ELEMENTS", 300)
    _, blocks = widen(narrow, tmp_path / "blocks", 2)
    assert [s.hash for s in whole.shards] == [s.hash for s in blocks.shards]


def test_a_width_that_is_no_multiple_changes_the_loss_and_must_be_asked_for(
    narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(net2net, "BLOCK_ELEMENTS", 1000)  # so that the last copies are cut, too
    with pytest.raises(UserError, match=r"48 channels are no multiple of 32.*hidden_size=64 would be exact"):
        widen(narrow, tmp_path, 1.5)
    path, manifest = widen(narrow, tmp_path, 1.5, allow_inexact=True)
    assert manifest.val_loss is None and manifest.history[-1]["exact"] is False
    old, new = state(narrow, "weight"), state(path, "weight")
    name = "layers.0.attention.query.weight"
    read = new[name][:, :WIDTH].clone()
    read[:, : WIDTH // 2] += new[name][:, WIDTH:]
    assert torch.allclose(read, torch.cat([old[name], old[name][: WIDTH // 2]]), atol=1e-6)
    name = "layers.1.mlp.down.weight"
    read = new[name][: 4 * WIDTH].clone()
    read[: 2 * WIDTH] += new[name][4 * WIDTH :]
    assert torch.allclose(read, torch.cat([old[name], old[name][:, : WIDTH // 2]], dim=1), atol=1e-6)
    before, after = (model_of(p)(batch()[:, :-1]) for p in (narrow, path))
    assert not torch.allclose(before, after, rtol=1e-3)


@pytest.mark.parametrize(
    "model, words",
    [
        ({"layers": 3}, "keeps model.layers: it was 2, the config has 3"),
        ({"vocab_size": 128}, "keeps model.vocab_size: it was 64, the config has 128"),
        (
            {"attention_heads": 4},
            r"head: it was 8 \(32 / 4\).*16 \(64 / 4\); model.attention_heads=8 would work",
        ),
        ({"hidden_size": 32, "attention_heads": 4}, "nothing grows: model.hidden_size stays 32"),
        ({"hidden_size": 16, "attention_heads": 2}, "model.hidden_size was 32, the config has 16"),
        ({"hidden_size": 36}, "a model.hidden_size that 8 divides would work"),
    ],
)
def test_what_is_not_growth_of_width_is_refused_in_words(
    narrow: Path, tmp_path: Path, model: dict[str, Any], words: str
) -> None:
    if "hidden_size" in model and "attention_heads" not in model:
        model["attention_heads"] = 4
    with pytest.raises(UserError, match=words):
        plan_widening(narrow, target_of(narrow, 2, **model), tmp_path, Widening())


def test_keys_of_tokens_are_refused_for_a_dense_model_and_the_other_way_round() -> None:
    with pytest.raises(UserError, match=r"growth.tau is for parameter tokens"):
        Growth(tau="keep").widening()
    assert Growth(spread=0.1).widening().spread == 0.1


def test_the_tool_widens_and_tells_the_loss(
    narrow: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wide.yaml").write_text(dump_config(target_of(narrow, 2)))
    words = ["--load", str(narrow), "--config", str(tmp_path / "wide.yaml"), "--save", str(tmp_path / "out")]
    for option, refusal in ((["--link"], "widening writes all anew"), (["--tau", "keep"], "growth.tau")):
        with pytest.raises(UserError, match=refusal):
            main([*words, *option])
    assert main([*words, "--dry-run"]) == 0 and not (tmp_path / "out").exists()
    assert main([*words, "--data", str(narrow.parents[2] / "toy_text_document"), "--max-tokens", "640"]) == 0
    said = capsys.readouterr().out
    assert "hidden size 32 -> 64" in said and "exact: the function is the same" in said
    change = said.split("after (")[1].split(")")[0]
    assert abs(float(change)) < 1e-5
