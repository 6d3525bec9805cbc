"""What people do with a model in transformers: train, save, place, cast, resize."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from megatron_tokenformer.huggingface.export import CODE
from megatron_tokenformer.huggingface.read import read_hf
from tests.huggingface.models import Pair, assert_same, load_hf, native_model, random_ids


def rows(count: int) -> list[dict[str, Tensor]]:
    """Rows that go up by one, from anywhere around a circle: soon learned."""
    starts = random_ids(count, 1)
    return [{"input_ids": row, "labels": row} for row in (starts + torch.arange(16)) % 64]


def test_a_trainer_lowers_the_loss_and_what_it_saves_comes_back(pair: Pair, tmp_path: Path) -> None:
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=12,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=pair.load(), args=arguments, train_dataset=rows(96))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12
    assert losses[-1] < 0.8 * losses[0]

    saved = tmp_path / "saved"
    trainer.save_model(str(saved))
    ids = random_ids(2, 9)
    logits = trainer.model.eval()(ids).logits
    assert torch.equal(load_hf(saved)(ids).logits, logits)
    for module in CODE:
        source = Path(str(module.__file__))
        assert (saved / source.name).read_bytes() == source.read_bytes()
    native = native_model(read_hf(saved), tmp_path / "native")
    assert_same(native(ids).transpose(0, 1), logits)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(pair: Pair, reentrant: bool) -> None:
    ids, gradients = random_ids(2, 12), []
    for checkpointing in (False, True):
        model = pair.load().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(*both) for both in zip(*gradients))


@pytest.mark.parametrize("where", ["auto", {"": "cpu"}], ids=["auto", "cpu"])
def test_a_model_is_placed_by_a_device_map(pair: Pair, where: str | dict[str, str]) -> None:
    ids = random_ids(2, 12)
    model = pair.load(device_map=where)
    assert_same(model(ids).logits, pair.logits(ids))


def test_what_does_not_fit_is_offloaded_by_whole_layers(pair: Pair, tmp_path: Path) -> None:
    ids, whole = random_ids(2, 12), pair.load()
    layer = sum(p.nbytes for p in whole.model.layers[0].parameters())
    room = {"cpu": whole.lm_head.weight.nbytes + 2 * layer}
    model = pair.load(device_map="auto", max_memory=room, offload_folder=tmp_path)
    places = model.hf_device_map
    assert (places["model.layers.0"], places["model.layers.1"]) == ("cpu", "disk")
    assert_same(model(ids).logits, pair.logits(ids))
    text = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(text, whole.generate(ids, max_new_tokens=5, do_sample=False))


def test_bf16_is_the_model_up_to_rounding(pair: Pair) -> None:
    model, ids = pair.load(dtype=torch.bfloat16), random_ids(2, 48)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    logits, expected = model(ids).logits, pair.logits(ids)
    assert logits.dtype == torch.bfloat16
    error = (logits.float() - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.1


def test_the_vocabulary_can_be_resized(pair: Pair) -> None:
    model, ids = pair.load(), random_ids(2, 12)
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    logits = model(ids).logits
    assert logits.shape == (2, 12, 70)
    assert_same(logits[..., :64], pair.logits(ids))
