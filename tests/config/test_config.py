"""Configuration: what is refused and in which words, and that what is written is read back."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from megatron_tokenformer.config.load import dump_config, load_config
from megatron_tokenformer.config.schema import RunConfig, Tokenizer, check_world
from megatron_tokenformer.config.sizes import flops_per_token
from megatron_tokenformer.data.tiktoken_tokenizer import PATTERNS
from megatron_tokenformer.data.tokenizers import TOKENIZER_TYPES
from megatron_tokenformer.errors import UserError


def load(tmp_path: Path, text: str = "", *overrides: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_config(path, list(overrides))


def test_defaults_are_a_complete_run(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert (config.model.layers, config.training.precision, config.parallel.tensor) == (12, "auto", 1)


def test_overrides_win_and_numbers_like_6e_4_are_numbers(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "optimizer: {lr: 6e-4}\ndata: {train: a}",
        "optimizer.lr=1e-3",
        "data.train=[[2, b], [1, c]]",
    )
    assert config.optimizer.lr == 1e-3
    assert config.data.train == [(2.0, "b"), (1.0, "c")]


def test_later_bases_win_over_earlier_ones_and_the_file_over_all(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("model: {layers: 3, hidden_size: 48}\ntraining: {steps: 7}")
    (tmp_path / "two.yaml").write_text("model: {layers: 4}\ndata: {train: [[2, a], [1, b]]}")
    config = load(tmp_path, "base: [one.yaml, two.yaml]\ntraining: {steps: 9}")
    assert (config.model.layers, config.model.hidden_size, config.training.steps) == (4, 48, 9)
    assert config.data.train == [(2.0, "a"), (1.0, "b")]


def test_a_base_file_is_merged_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("model: {layers: 3}\ntraining: {steps: 7}")
    config = load(tmp_path, "base: base.yaml\nmodel: {hidden_size: 96}")
    assert (config.model.layers, config.model.hidden_size, config.training.steps) == (3, 96, 7)


def test_every_tokenizer_that_data_can_be_made_with_can_be_named() -> None:
    fields = Tokenizer.model_fields
    assert get_args(fields["type"].annotation) == TOKENIZER_TYPES
    assert set(get_args(get_args(fields["pattern"].annotation)[0])) == set(PATTERNS)


def test_what_is_dumped_is_read_back_equal(tmp_path: Path) -> None:
    config = load(tmp_path, "data: {train: [[1, a]], tokenizer: {type: ByteTokenizer}}")
    assert load(tmp_path, dump_config(config)) == config


def test_a_dense_model_is_dumped_without_the_keys_that_it_does_not_have(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("model: {tokens: {qkv: 96}, score_norm: softmax, layers: 3}")
    null = ("model.architecture=transformer", "model.tokens=null", "model.score_norm=null")
    config = load(tmp_path, "base: base.yaml", *null)
    assert config.model.layers == 3
    assert not {"tokens", "score_norm"} & config.model_dump()["model"].keys()
    assert load(tmp_path, dump_config(config)) == config
    # What tensor parallelism would split is not there.
    assert load(tmp_path, "model: {architecture: transformer}\nparallel: {tensor: 12}").parallel.tensor == 12


@pytest.mark.parametrize(
    "text, words",
    [
        ("model: {layer: 3}", "unknown key 'model.layer'; did you mean 'model.layers'?"),
        ("model: {tokens: {qvk: 3}}", "did you mean 'model.tokens.qkv'?"),
        ("training: {learning_rate_: 1}", "unknown key 'training.learning_rate_'; valid here: steps,"),
        ("optimizer: {seed: 1}", "unknown key 'optimizer.seed'; did you mean 'training.seed'?"),
        ("optimiser: {lr: 1}", "unknown key 'optimiser'; did you mean 'optimizer'?"),
        ("model: {layers: two}", "model.layers='two': input should be a valid integer"),
        (f"model: {{tokens: {{qkv: 1{'0' * 20}}}}}", "tokens.qkv=1" + "0" * 20 + ": input should be less"),
        (f"model: {{layers: 1{'0' * 20}}}", "input should be less than or equal to 10000"),
        (f"training: {{steps: 1{'0' * 400}}}", "input should be less than or equal to 1000000000000"),
        (f"training: {{steps: {'9' * 5000}}}", "is not valid YAML"),
        ("model: {score_norm: relu}", "model.score_norm='relu': input should be 'l2_norm_gelu'"),
        (
            "model: {tokens: {qkv: 30}}\nparallel: {tensor: 4}",
            "model.tokens.qkv=30 is not divisible by parallel.tensor=4; model.tokens.qkv=32 would work",
        ),
        (
            "model: {attention_heads: 6}\nparallel: {tensor: 4}",
            "model.attention_heads=6 is not divisible by parallel.tensor=4; model.attention_heads=4 would",
        ),
        (
            "model: {attention_heads: 10}",
            "model.hidden_size=768 is not divisible by model.attention_heads=10; attention_heads=8 would",
        ),
        (
            "data: {sequence_length: 33}\nparallel: {tensor: 2, sequence: true}",
            "data.sequence_length=33 is not divisible by parallel.tensor=2",
        ),
        (
            "data: {eod_id: 50304}",
            "data.eod_id=50304 is not below model.vocab_size=50304; data.eod_id=50303 is",
        ),
        ("parallel: {pipeline: 13}", "parallel.pipeline=13 is more than model.layers=12"),
        ("optimizer: {min_lr: 1}", "optimizer.min_lr=1 is above optimizer.lr=0.0006"),
        ("optimizer: {warmup_steps: 2000}", "optimizer.warmup_steps=2000 is more than training.steps=1000"),
        ("optimizer: {betas: [0.9, 1.0]}", "optimizer.betas.1=1.0: input should be less than 1"),
        (
            "model: {architecture: transformer, tokens: {qkv: 576}}",
            "model.tokens is for tokenformers, not for model.architecture=transformer; leave it out, "
            "or write model.tokens=null where a base has it",
        ),
        (
            "model: {architecture: transformer, score_norm: l2_norm_gelu}",
            "model.score_norm is for tokenformers, not for model.architecture=transformer",
        ),
        ("model: {tokens: null}", "model.tokens=None: input should be a valid dictionary"),
        (
            "model: {architecture: transformer}\ntraining: {recompute: scores}",
            "training.recompute=scores is for tokenformers, not for model.architecture=transformer; none",
        ),
        (
            "model: {architecture: transformer}\noptimizer: {old_token_lr_scale: 0.5}",
            "optimizer.old_token_lr_scale=0.5 is for tokenformers that have grown, not for",
        ),
        (
            "model: {architecture: transformer, attention_heads: 6}\nparallel: {tensor: 4}",
            "model.attention_heads=6 is not divisible by parallel.tensor=4; model.attention_heads=4 would",
        ),
        ("base: 5", "base=5 is not the name of a file"),
        ("base: [run.yaml]", "is its own base"),
        ("base: [5]", "base=5 is not the name of a file"),
        ("base: run.yaml", "is its own base"),
        ("[1, 2]", "holds list, not a mapping"),
        ("model: {", "is not valid YAML"),
    ],
)
def test_mistakes_are_told_in_words(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError) as refused:
        load(tmp_path, text)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 2


def test_a_value_that_is_said_to_work_works(tmp_path: Path) -> None:
    config = load(
        tmp_path, "model: {attention_heads: 8, tokens: {qkv: 32}, hidden_size: 64}\nparallel: {tensor: 4}"
    )
    assert config.parallel.tensor == 4


@pytest.mark.parametrize(
    "override", ["training.steps", "=3", "training.steps=[1", "training.steps=" + "9" * 5000]
)
def test_overrides_that_are_not(tmp_path: Path, override: str) -> None:
    with pytest.raises(UserError, match="override"):
        load(tmp_path, "", override)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"model: \xff")
    with pytest.raises(UserError, match="is not valid YAML"):
        load_config(tmp_path / "run.yaml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the config .*nowhere\.yaml: No such file"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    "world_size, words",
    [
        (3, "does not divide the 3 processes of this run; start a multiple of 2 processes"),
        (
            6,
            "training.global_batch_size=8 is not a multiple of training.micro_batch_size=4 x 3 data-parallel "
            "ranks; training.global_batch_size=12 would work",
        ),
    ],
)
def test_processes_that_do_not_fit(tmp_path: Path, world_size: int, words: str) -> None:
    config = load(tmp_path, "parallel: {tensor: 2}\ntraining: {global_batch_size: 8, micro_batch_size: 4}")
    with pytest.raises(UserError) as refused:
        check_world(config, world_size)
    assert words in str(refused.value)
    assert check_world(config, 4) == 1
    assert check_world(config, 2) == 2


def test_flops_are_six_per_parameter_and_token_plus_attention(tmp_path: Path) -> None:
    model = load(tmp_path).model
    products = 12 * 2 * 768 * (3 * 576 + 576 + 2304) + 50304 * 768
    attention = 12 * 2 * 2 * (1024 / 2) * 768  # two products, causal: half of the positions on average
    assert flops_per_token(model, 1024) == 6 * products + 3 * attention
