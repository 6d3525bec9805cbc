"""Published checkpoints: their function is kept, in every form and norm; what is not theirs is refused."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_tokenformer.checkpoint.manifest import read_manifest
from megatron_tokenformer.checkpoint.neox import model_of, read_settings
from megatron_tokenformer.checkpoint.official import official_key, read_official
from megatron_tokenformer.checkpoint.portable import PortableModel, read_native, write_native
from megatron_tokenformer.checkpoint.store import find_checkpoint
from megatron_tokenformer.config.growth import Growth
from megatron_tokenformer.config.load import load_config
from megatron_tokenformer.config.schema import Tokenizer, Tokens
from megatron_tokenformer.config.sizes import parameter_count
from megatron_tokenformer.data.indexed import TokenFile
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.evaluation.load import assemble
from megatron_tokenformer.evaluation.perplexity import evaluate, open_evaluation
from megatron_tokenformer.metrics_file import read_rows
from megatron_tokenformer.model.language_model import full_shapes
from tests.checkpoint.growing import grow
from tests.checkpoint.published import (
    LOGIT,
    VOCABULARY,
    published_shapes,
    random_weights,
    reference_logits,
    settings,
    write_layers,
    write_whole,
    write_yaml,
)
from tests.checkpoint.published_by_deepspeed import save_with_deepspeed
from tests.ranks import run_ranks
from tests.toy import toy_config, train_toy, write_tokens

CPU = torch.device("cpu")
CONFIGS = Path(__file__).parents[2] / "configs"
QUERY = "sequential.2.attention.query.key_param_tokens"
IDS = torch.arange(3 * 21).view(3, 21) % VOCABULARY


def our_logits(portable: PortableModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return assemble(portable, CPU)(ids).transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["l2_norm_gelu", "gelu_l2_norm", "softmax"])
def test_logits_are_those_of_the_published_mathematics(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    told = settings(norm_activation_type=kind)
    weights = random_weights(told, dtype)
    expected = reference_logits(weights, told, IDS)
    assert expected.abs().max().item() == pytest.approx(LOGIT, rel=0.5), "the size that the promise is for"
    published = read_official(write_whole(tmp_path / "in", told, weights))
    imported = read_native(write_native(published, tmp_path / "out"))
    assert (our_logits(imported, IDS) - expected).abs().max().item() < 1e-4


def test_an_epsilon_of_the_norms_and_a_full_rotation_are_taken_over(tmp_path: Path) -> None:
    told = settings(layernorm_epsilon=0.5, rotary_pct=1.0)
    weights = random_weights(told)
    portable = read_official(write_whole(tmp_path, told, weights))
    assert (our_logits(portable, IDS) - reference_logits(weights, told, IDS)).abs().max().item() < 1e-4


def test_the_training_codes_folders_give_the_same_as_one_file(tmp_path: Path) -> None:
    told = settings()
    weights, older = random_weights(told), random_weights(told, seed=1)
    whole = dict(read_official(write_whole(tmp_path / "whole", told, weights)).read())
    layers = write_layers(tmp_path / "layers", told, older, step=90)
    write_layers(layers, told, weights, step=500)
    step = layers / "global_step500"
    module = tmp_path / "module/global_step7"
    write_yaml(module / "configs/model.yml", told)
    torch.save({"module": weights, "iteration": 7}, module / "mp_rank_00_model_states.pt")
    old = write_whole(tmp_path / "old", told, weights)
    parameters = {key: torch.nn.Parameter(tensor) for key, tensor in weights.items()}
    torch.save(
        parameters, old / "pytorch_model.bin", _use_new_zipfile_serialization=False
    )  # before torch 1.6
    for load in (layers, step, module, module.parent, tmp_path / "whole/pytorch_model.bin", old):
        for name, tensor in read_official(load).read():
            assert torch.equal(tensor, whole[name]), (load, name)
    (layers / "latest").write_text("global_step90")
    name = "layers.0.ffn.key_tokens"
    assert torch.equal(read_official(layers).tensors[name](), older[official_key(name, 2)])
    (layers / "latest").unlink()
    assert torch.equal(read_official(layers).tensors[name](), weights[official_key(name, 2)]), "then the last"


def test_what_is_known_of_the_run_is_kept(tmp_path: Path) -> None:
    folder = write_whole(tmp_path, settings(), random_weights(settings()))
    portable = read_official(folder)
    assert portable.taus == {"qkv": math.sqrt(12), "output": math.sqrt(20), "ffn": math.sqrt(48)}
    assert portable.sequence_length == 32
    assert portable.tokenizer == Tokenizer(model="./tokenizer.json")
    (folder / "tokenizer.json").write_text("{}")
    assert read_official(folder).tokenizer == Tokenizer(model=str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a toy's data, and a published checkpoint that has been made native in `imported`."""
    folder = tmp_path_factory.mktemp("imported")
    write_tokens(folder)
    write_tokens(folder, "validation", tokens=16 * 32 + 1, seed=1)
    told = settings()
    published = read_official(write_whole(folder / "published", told, random_weights(told)))
    write_native(published, folder / "imported")
    return folder


def reference_loss(folder: Path) -> float:
    """Of the published mathematics, on all the windows of the validation."""
    told = settings()
    window = TokenFile(str(folder / "validation_text_document")).window(0, 16 * 32 + 1)
    tokens = torch.from_numpy(window.astype("int64"))
    logits = reference_logits(random_weights(told), told, tokens[:-1].view(16, 32))
    return F.cross_entropy(logits.flatten(0, 1), tokens[1:]).item()


def measured_loss(folder: Path, checkpoint: Path) -> float:
    opened = open_evaluation(checkpoint, [str(folder / "validation_text_document")])
    return evaluate(opened, "fp32")[0].val_loss


def test_an_imported_model_is_evaluated_and_grows_exactly(imported: Path) -> None:
    before = measured_loss(imported, imported / "imported")
    assert before == pytest.approx(reference_loss(imported), rel=1e-6)
    tokens = {"qkv": 16, "output": 24, "ffn": 96}
    model = read_native(imported / "imported").model.model_copy(update={"tokens": Tokens(**tokens)})
    target = toy_config(imported, model=model.model_dump())
    path, _ = grow(find_checkpoint(imported / "imported"), target, imported / "grown", Growth())
    assert read_native(path).model.tokens.model_dump() == tokens
    assert [entry["kind"] for entry in read_manifest(path).history] == ["import", "growth"]
    assert measured_loss(imported, path) == pytest.approx(before, rel=1e-6)


def test_an_imported_model_trains_on_split_over_ranks(
    imported: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = read_native(imported / "imported").model
    config = toy_config(
        imported,
        model=model.model_dump(),
        parallel={"tensor": 2},
        data={"validation": str(imported / "validation_text_document")},
        training={"steps": 2},
        checkpoint={"load": str(imported / "imported")},
    )
    run_ranks(2, train_toy, config, tensor=2)
    assert "another order" not in capfd.readouterr().out, "it has seen no samples"
    rows = read_rows(Path(config.run_dir) / "metrics.jsonl")
    start, end = (row["val_loss"] for row in rows if "val_loss" in row)
    assert start == pytest.approx(reference_loss(imported), rel=1e-5)
    assert end < start
    assert read_manifest(find_checkpoint(config.run_dir)).step == 2


class RunsCode:
    """What a pickle of it does when it is loaded carelessly."""

    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.evidence),)


def test_a_file_that_would_run_code_is_refused_and_does_nothing(tmp_path: Path) -> None:
    folder, evidence = write_whole(tmp_path / "in", settings(), random_weights(settings())), tmp_path / "ran"
    torch.save({**random_weights(settings()), "more": RunsCode(evidence)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin asks for posix\.mkdir besides tensors"):
        read_official(folder)
    assert not evidence.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert evidence.exists(), "the file is what it is meant to be"


def edit(folder: Path, **changes: torch.Tensor | None) -> None:
    """Write a checkpoint whose tensors are changed, or with None left out; `__` stands for a dot."""
    weights = {**random_weights(settings()), **{key.replace("__", "."): t for key, t in changes.items()}}
    write_whole(folder, settings(), {key: tensor for key, tensor in weights.items() if tensor is not None})


WRONG_TENSORS = [
    (
        {QUERY: torch.zeros(11, 32)},
        r"sequential\.2\.attention\.query\.key_param_tokens in .*\.bin is of shape "
        r"\[11, 32\], by .*model\.yml it is \[12, 32\] \(.*qkv_slot_num=12",
    ),
    ({QUERY: torch.zeros(12, 32, dtype=torch.int64)}, "is torch.int64, no weights"),
    ({QUERY: None}, r"lacks sequential\.2\.attention\.query\.key_param_tokens"),
    ({"sequential.0.word_embeddings.weight": None}, r"lacks sequential\.0\.word_embeddings"),
    ({"sequential.0.word_embeddings.weight": torch.zeros(64, 16)}, r"of shape \[64, 16\].*\[64, 32\]"),
    ({"sequential.3.attention.query.bias": torch.zeros(32)}, r"query\.bias in .* belongs to no part"),
    ({"sequential.7.attention.query.key_param_tokens": torch.zeros(12, 32)}, "sequential.7.*num_layers=2"),
    ({"sequential.6.final_linear.weight": torch.zeros(64, 32)}, "an untied head"),
    ({"sequential.6.word_embeddings.weight": torch.zeros(64, 32)}, "only tied models"),
]


@pytest.mark.parametrize(("changes", "reason"), WRONG_TENSORS, ids=range(len(WRONG_TENSORS)))
def test_tensors_that_are_not_the_models_are_named(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], reason: str
) -> None:
    edit(tmp_path, **changes)
    with pytest.raises(UserError, match=reason):
        read_official(tmp_path)


def test_a_missing_layer_is_named(tmp_path: Path) -> None:
    folder = write_layers(tmp_path, settings(), random_weights(settings()))
    (folder / "global_step500/layer_03-model_00-model_states.pt").unlink()
    with pytest.raises(UserError, match=r"lacks sequential\.3\.attention\.query\.key_param_tokens"):
        read_official(folder)


def test_a_second_tensor_parallel_rank_is_refused(tmp_path: Path) -> None:
    folder = write_layers(tmp_path, settings(), random_weights(settings()))
    torch.save({"x": torch.zeros(1)}, folder / "global_step500/layer_03-model_01-model_states.pt")
    with pytest.raises(UserError, match=r"model_01-model_states\.pt is of a second tensor-parallel rank"):
        read_official(folder)


def test_buffers_and_the_tied_copy_are_passed_over_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = random_weights(settings())["sequential.0.word_embeddings.weight"]
    edit(
        tmp_path,
        sequential__6__word_embeddings__weight=copy,
        sequential__2__attention__rotary_emb__inv_freq=torch.zeros(2),
        sequential__3__attention__rotary_emb__inv_freq=torch.zeros(2),
    )
    read_official(tmp_path)
    told = "passed over 3 tensors that are no weights: attention.rotary_emb.inv_freq, word_embeddings.weight"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"qkv_slot_num": None}, "does not say qkv_slot_num; it is no config of a Tokenformer"),
        ({"no__weight__tying": True}, "no_weight_tying is True; only models with no_weight_tying=False"),
        ({"norm": None}, r"norm is layernorm \(its value when left out\); only .*norm=layernorm_nonparam"),
        ({"pos__emb": "alibi"}, "pos_emb is alibi"),
        ({"rotary_emb_base": 500000}, "rotary_emb_base is 500000"),
        ({"attention_config": [[["tokenformer", "flash"], 1]]}, "layers of kind flash"),
        ({"norm_activation_type": "relu"}, "score_norm='relu'"),
        ({"rotary_pct": 0.4}, "rotary_pct=0.4 rotates 3 of a head's 8 channels"),
        ({"num__attention__heads": 5}, "attention_heads=5"),
        ({"hidden_size": "wide"}, "hidden_size='wide'"),
        ({"padded_vocab_size": 128}, "has 64 rows; .* says padded_vocab_size=128"),
        ({"seq__length": None}, "does not say seq_length"),
    ],
)
def test_settings_of_another_function_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    write_whole(tmp_path, settings(), random_weights(settings()))
    write_yaml(tmp_path / "model.yml", settings(**changes))
    with pytest.raises(UserError, match=reason):
        read_official(tmp_path)


def test_files_that_are_not_what_they_should_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no published checkpoint at .*no pytorch_model\.bin"):
        read_official(tmp_path)
    write_whole(tmp_path, settings(), random_weights(settings()))
    file = tmp_path / "pytorch_model.bin"
    content = file.read_bytes()
    for damaged in (b"", b"hello", content[:2000], content[:-200], b"\x80\x02" + content[2:]):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"pytorch_model\.bin is damaged"):
            read_official(tmp_path)
    torch.save([1, 2], file)
    with pytest.raises(UserError, match="is not a dict of tensors"):
        read_official(tmp_path)
    torch.save({"iteration": 3}, file)
    with pytest.raises(UserError, match="holds a int under iteration"):
        read_official(tmp_path)


def test_a_number_that_changed_on_the_disk_is_noticed(tmp_path: Path) -> None:
    weights = random_weights(settings())
    file = write_whole(tmp_path, settings(), weights) / "pytorch_model.bin"
    content = bytearray(file.read_bytes())
    numbers = weights["sequential.3.mlp.key_param_tokens"].numpy().tobytes()
    content[content.index(numbers) + 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"pytorch_model\.bin is damaged: pytorch_model/data/\d+$"):
        read_official(tmp_path)


def test_tensors_without_numbers_are_refused(tmp_path: Path) -> None:
    weights = random_weights(settings())
    key = "sequential.3.mlp.key_param_tokens"
    weights[key] = weights[key].to("meta")
    with pytest.raises(UserError, match=rf"{key} in .*pytorch_model\.bin is a meta tensor"):
        read_official(write_whole(tmp_path, settings(), weights))
    weights = random_weights(settings())
    weights["sequential.6.word_embeddings.weight"] = weights["sequential.0.word_embeddings.weight"].to("meta")
    with pytest.raises(UserError, match="only tied models"):
        read_official(write_whole(tmp_path, settings(), weights))


def test_a_config_is_needed_and_two_must_agree(tmp_path: Path) -> None:
    write_whole(tmp_path, settings(), random_weights(settings()))
    other = write_yaml(tmp_path / "other.yaml", {"num_layers": 3, "train_iters": 5})
    with pytest.raises(UserError, match=r"other\.yaml says num_layers=3, .*model\.yml num_layers=2; "):
        read_official(tmp_path)
    right = (tmp_path / "model.yml").rename(tmp_path / "model.txt")
    assert read_official(tmp_path, [right]).model.layers == 2
    other.unlink()
    with pytest.raises(UserError, match=r"no \.yml beside the weights"):
        read_official(tmp_path)


@pytest.mark.parametrize(
    ("size", "layers", "width", "heads", "millions"),
    [
        ("150m", 12, 768, 12, 151.9),
        ("450m", 24, 1024, 16, 454.2),
        ("900m", 32, 1280, 16, 903.3),
        ("1.5b", 40, 1536, 16, 1587.2),
    ],
)
def test_the_published_sizes_are_ours(
    tmp_path: Path, size: str, layers: int, width: int, heads: int, millions: float
) -> None:
    sizes = {"num-layers": layers, "num-attention-heads": heads, "hidden_size": width}
    slots = {"qkv_slot_num": width, "proj_slot_num": width, "ffn_slot_num": 4 * width}
    told = {**settings(rotary_pct=0.25), **sizes, **slots, "seq-length": 2048}
    model = model_of(read_settings([write_yaml(tmp_path / "model.yml", told)]), 50304)
    assert model == load_config(CONFIGS / f"tokenformer-{size}.yaml").model
    stored = published_shapes(told, 50304)
    assert {official_key(name, layers): shape for name, shape in full_shapes(model).items()} == stored
    assert parameter_count(model) == sum(math.prod(shape) for shape in stored.values())
    assert parameter_count(model) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("pipeline", [True, False], ids=["layers", "one-file"])
def test_what_deepspeed_itself_writes_is_read(tmp_path: Path, pipeline: bool) -> None:
    told = settings()
    weights = random_weights(told, torch.bfloat16)
    run_ranks(1, save_with_deepspeed, tmp_path, weights, pipeline, pipeline)
    write_yaml(tmp_path / "global_step500/configs/model.yml", told)
    written = list((tmp_path / "global_step500").glob("*model_states.pt"))
    assert len(written) == (5 if pipeline else 1), "embedding, two layers, norm, and the state of the run"
    for name, tensor in read_official(tmp_path).read():
        stored = weights[official_key(name, 2)].float()
        assert torch.equal(tensor, stored - 1 if name.endswith("gain_minus_one") else stored), name


def test_weights_in_one_file_with_numpys_random_state_are_refused_in_words(tmp_path: Path) -> None:
    run_ranks(1, save_with_deepspeed, tmp_path, random_weights(settings(), torch.bfloat16), False, True)
    rebuild, uint32 = np.zeros(1).__reduce__()[0], type(np.dtype("uint32"))
    with torch.serialization.safe_globals([rebuild, np.ndarray, np.dtype, uint32]):  # as megatron-core adds
        allowed = set(torch.serialization.get_safe_globals())
        with pytest.raises(UserError, match=r"mp_rank_00_model_states\.pt asks for numpy.*save its tensors"):
            read_official(tmp_path)
        assert set(torch.serialization.get_safe_globals()) == allowed
