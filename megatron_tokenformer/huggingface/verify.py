"""Whether an exported folder computes what the model computes: logits of both, on fixed prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_tokenformer.checkpoint.portable import PortableModel
from megatron_tokenformer.huggingface.modeling_tokenformer import TokenformerForCausalLM
from megatron_tokenformer.model.language_model import LanguageModel
from megatron_tokenformer.model.tau import constant_tau, set_taus

LENGTHS = (1, 13, 64, 200)
SEED = 20_240_823


@dataclass(frozen=True)
class Difference:
    """Between the logits of two models."""

    largest: float
    of: float
    """the largest logit"""

    @property
    def relative(self) -> float:
        """To the largest logit, or to 1 if that is smaller."""
        return self.largest / max(1.0, self.of)


@torch.no_grad()
def compare(portable: PortableModel, folder: Path, dtype: torch.dtype) -> Difference:
    """Run the model and the exported folder in fp32 on the same prompts, one after the other.

    Args:
        dtype: in which the folder's weights are stored; the model's are rounded to it too.
    """
    generator = torch.Generator().manual_seed(SEED)
    prompts = [torch.randint(portable.model.vocab_size, (1, n), generator=generator) for n in LENGTHS]
    ours = _native_logits(portable, dtype, prompts)
    theirs = TokenformerForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    pairs = [(theirs(ids).logits, expected) for ids, expected in zip(prompts, ours)]
    differences = [(got - expected).abs().max().item() for got, expected in pairs]
    # max() of Python would pass over a NaN.
    return Difference(torch.tensor(differences).max().item(), max(own.abs().max().item() for own in ours))


def _native_logits(portable: PortableModel, dtype: torch.dtype, prompts: list[Tensor]) -> list[Tensor]:
    with torch.device("meta"):
        model = LanguageModel(portable.model)
    model = model.to_empty(device="cpu").eval()
    parameters = dict(model.named_parameters())
    for name, tensor in portable.read():
        parameters[name].copy_(tensor.to(dtype))
    set_taus(model, {role: constant_tau(tau) for role, tau in portable.taus.items()}, 0)
    return [model(ids).transpose(0, 1) for ids in prompts]
