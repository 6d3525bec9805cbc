"""What a model costs: parameters and floating-point operations, from the configuration alone.

Only matrix products are counted (a product of [a, b] by [b, c] is 2abc operations), the backward pass as
twice the forward, attention as causal (half of the square), recomputation not at all.
"""

from __future__ import annotations

import re

from megatron_tokenformer.config.schema import Model, Precision, RunConfig, resolve_precision

# Dense peaks in TFLOP/s of 16-bit products summed in fp32, from the makers' data sheets, by the whole name
# that torch.cuda.get_device_name() prints.  A device whose figure is not certain is left out, and so are
# parts of devices (MIG): no MFU rather than a wrong one.
_PEAKS = {
    r"NVIDIA B200": 2250,
    r"NVIDIA H200|NVIDIA GH200 \w+( HBM3e)?|NVIDIA H100 80GB HBM3": 989,
    r"NVIDIA H(200|100) NVL": 835,
    r"NVIDIA H100 PCIe": 756,
    r"(NVIDIA )?A100-(SXM4|PCIE)-[48]0GB|NVIDIA A100 80GB PCIe": 312,
    r"NVIDIA L40S": 362,
    r"NVIDIA L4": 121,
    r"NVIDIA A10": 125,
    r"(NVIDIA )?RTX A6000": 154.8,
    r"NVIDIA GeForce RTX 4090": 165.2,
    r"AMD Instinct MI300X( OAM)?": 1307.4,
    r"AMD Instinct MI250X": 191.5,  # one of the two dies of a card, which is what torch calls a device
}
# Without bf16 in hardware.
_FP16_PEAKS = {r"Tesla V100-SXM2-\d\dGB": 125, r"Tesla V100-PCIE-\d\dGB": 112}

CHUNK_SCORES = 1 << 25
"""Scores of one projection in a chunk, with training.recompute=scores (`model/pattend.py`): 64 MiB of each
tensor in bf16, and still large products."""

FORMULAS = {
    "tokenformer": "3 x (layers x (4 d (3 n_qkv + n_output + n_ffn) + 2 s d) + 2 d v)",
    "transformer": "3 x (layers x (24 d^2 + 2 s d) + 2 d v)",
}
"""operations per token: width d, n tokens of each Pattention, sequence length s, vocabulary v"""


def resolved_precision(config: RunConfig) -> Precision:
    """The precision on a GPU: `auto` is bf16 there."""
    return resolve_precision(config.training.precision, "cuda")


def pattention_tokens(model: Model) -> int:
    """Parameter tokens of one layer, each counted once per projection that has it."""
    return 3 * model.tokens.qkv + model.tokens.output + model.tokens.ffn


def micro_batch_tokens(config: RunConfig) -> int:
    """Tokens of a micro-batch."""
    return config.training.micro_batch_size * config.data.sequence_length


def tokens_per_step(config: RunConfig) -> int:
    """Tokens of one optimizer step, over all ranks."""
    return config.training.global_batch_size * config.data.sequence_length


def chunk_rows(tokens: int, chunk_scores: int = CHUNK_SCORES) -> int:
    """Rows of a chunk with so many scores each, with training.recompute=scores.

    A multiple of 128, which products like.
    """
    return max(chunk_scores // tokens // 128, 1) * 128


def product_weights(model: Model) -> int:
    """Numbers of one layer's matrices: K and V of its Pattentions, or a dense layer's 12 d^2."""
    d = model.hidden_size
    return 12 * d**2 if model.is_dense else 2 * d * pattention_tokens(model)


def norm_weights(model: Model) -> int:
    """Gains and biases of one layer: a dense layer's two norms have them, a Tokenformer's have none."""
    return 4 * model.hidden_size if model.is_dense else 0


def parameter_count(model: Model) -> int:
    """Trained numbers of the model: tied embedding, layers, final norm."""
    layer = product_weights(model) + norm_weights(model)
    return model.vocab_size * model.hidden_size + model.layers * layer + 2 * model.hidden_size


def layer_forward_flops(model: Model, sequence_length: int) -> int:
    """Operations of one layer for one token, forward: 2 per weight (so 4 d per parameter token, 24 d^2 if
    dense), and 2 s d for causal attention's two products with on average s/2 positions."""
    return 2 * product_weights(model) + 2 * sequence_length * model.hidden_size


def head_forward_flops(model: Model) -> int:
    """Operations of the output head for one token, forward."""
    return 2 * model.hidden_size * model.vocab_size


def flops_per_token(model: Model, sequence_length: int) -> int:
    """Training operations (forward and backward) for one token of a sequence of this length: `FORMULAS`."""
    layers = model.layers * layer_forward_flops(model, sequence_length)
    return 3 * (layers + head_forward_flops(model))


def step_flops(config: RunConfig) -> int:
    """Training operations of one optimizer step, over all ranks."""
    return tokens_per_step(config) * flops_per_token(config.model, config.data.sequence_length)


def device_peak(device_name: str, precision: str = "bf16") -> float | None:
    """A device's dense peak in FLOP/s in bf16 or fp16, or None when it is not known, as of any in fp32.

    Args:
        device_name: as torch.cuda.get_device_name() prints it.
    """
    peaks = {"bf16": _PEAKS, "fp16": _PEAKS | _FP16_PEAKS}.get(precision, {})
    known = (peak for names, peak in peaks.items() if re.fullmatch(names, device_name))
    peak = next(known, None)
    return None if peak is None else peak * 1e12
