"""A checkpoint folder that DeepSpeed itself writes, of a pipeline like the published training code's."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from megatron_tokenformer.parallel.layout import Layout
from tests.checkpoint.published import Weights


class Tensors(nn.Module):
    """A module with parameters of these dotted names, that computes nothing."""

    def __init__(self, tensors: Weights) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *path, leaf = name.split(".")
            place: nn.Module = self
            for part in path:
                if part not in dict(place.named_children()):
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            place.register_parameter(leaf, nn.Parameter(tensor))

    @property
    def tied(self) -> nn.Parameter:
        """Of the embedding, the weight that the head has too."""
        return self.get_parameter("word_embeddings.weight")


def save_with_deepspeed(
    layout: Layout, folder: Path, weights: Weights, pipeline: bool, random_states: bool
) -> None:
    """Save weights by their published keys; without a pipeline all of them are in one file.

    Args:
        random_states: save those of Python and numpy too, as the published code does unless told not to.
    """
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    def module(index: int) -> Weights:
        start = f"sequential.{index}."
        return {key.removeprefix(start): t for key, t in weights.items() if key.startswith(start)}

    def reshape(x: Any) -> Any:
        return x

    def head(embedding: nn.Module, x: Any) -> Any:
        return x

    last = max(int(key.split(".")[1]) for key in weights)
    if pipeline:
        tied: dict[str, Any] = {"tied_weight_attr": "tied"}
        embed = TiedLayerSpec("embed", Tensors, module(0), **tied)
        layers = [LayerSpec(Tensors, module(index)) for index in range(2, last - 1)]
        norm = LayerSpec(Tensors, module(last))
        again = TiedLayerSpec("embed", Tensors, module(0), forward_fn=head, **tied)
        specs = [embed, reshape, *layers, reshape, norm, again]
        with torch.no_grad():
            model = PipelineModule(specs, topology=layout.topology, loss_fn=lambda *_: torch.zeros(()))
    else:
        model = Tensors(weights)
    settings = {"train_batch_size": 1, "zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
    optimizer = torch.optim.AdamW(model.parameters())
    parts = {"model": model, "optimizer": optimizer, "config": settings}
    engine, *_ = deepspeed.initialize(**parts, dist_init_required=False)
    state: dict[str, Any] = {"iteration": 500, "torch_rng_state": torch.get_rng_state()}
    if random_states:
        state |= {"random_rng_state": random.getstate(), "np_rng_state": np.random.get_state()}
    engine.save_checkpoint(str(folder), tag="global_step500", client_state=state)
