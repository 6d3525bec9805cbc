"""What a model costs: parameters and floating-point operations, from the configuration alone.

Only matrix products are counted (a product of [a, b] by [b, c] is 2abc operations), the backward pass as
twice the forward, attention as causal (half of the square), recomputation not at all.
"""

from __future__ import annotations

from megatron_tokenformer.config.schema import Model

# Dense bf16 peaks in FLOP/s from the makers' data sheets, by a part of the device's name.
DEVICE_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "V100": 125e12,
}


def pattention_tokens(model: Model) -> int:
    """Parameter tokens of one layer, each counted once per projection that has it."""
    return 3 * model.tokens.qkv + model.tokens.output + model.tokens.ffn


def product_weights(model: Model) -> int:
    """Numbers of one layer's matrices: K and V of its Pattentions, or a dense layer's 12 d^2."""
    d = model.hidden_size
    return 12 * d**2 if model.architecture == "transformer" else 2 * d * pattention_tokens(model)


def norm_weights(model: Model) -> int:
    """Gains and biases of one layer: a dense layer's two norms have them, a Tokenformer's have none."""
    return 4 * model.hidden_size if model.architecture == "transformer" else 0


def parameter_count(model: Model) -> int:
    """Trained numbers of the model: tied embedding, layers, final norm."""
    layer = product_weights(model) + norm_weights(model)
    return model.vocab_size * model.hidden_size + model.layers * layer + 2 * model.hidden_size


def flops_per_token(model: Model, sequence_length: int) -> int:
    """Training operations (forward and backward) for one token of a sequence of this length.

    3 x (per layer: 2 per weight, so 4 d per parameter token or 24 d^2 if dense, and 2 s d for causal
    attention's two products over on average s/2 positions; then 2 d v for the head).
    """
    d = model.hidden_size
    layer = 2 * product_weights(model) + 2 * sequence_length * d
    return 3 * (model.layers * layer + 2 * d * model.vocab_size)


def device_peak(device_name: str) -> float | None:
    """The device's dense bf16 peak in FLOP/s, or None when it is not known."""
    return next((peak for part, peak in DEVICE_PEAKS.items() if part in device_name), None)
