"""A Tokenformer (arXiv 2410.23168), or its dense twin, as a causal language model for transformers.

This file and `configuration_tokenformer.py` lie in the model's folder and need nothing but torch and
transformers.  Every linear projection of a Transformer is here attention between the input and learned key
and value tokens: see `normalised_scores` and `Pattention`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_tokenformer import TokenformerConfig

Tables = tuple[Tensor, Tensor]
"""cos and sin of the rotary embedding, [b, 1, s, rotary_size] each, fp32"""
ROTARY_BASE = 10_000.0


def normalised_scores(scores: Tensor, tau: float, kind: str) -> Tensor:
    """Scores A, [..., n], as weights S over the n parameter tokens, of the same shape.

    | kind           | S                               |
    |----------------|---------------------------------|
    | `l2_norm_gelu` | gelu(tau * A / norm(A))         |
    | `gelu_l2_norm` | tau * gelu(A) / norm(gelu(A))   |
    | `softmax`      | tau^2 * softmax(A)              |

    GELU is the exact one, norms are over tokens, in fp32; a row of zeros has weights 0 and gradients 0.
    """
    if kind == "softmax":
        return tau**2 * scores.softmax(dim=-1)
    numerators = F.gelu(scores) if kind == "gelu_l2_norm" else scores
    wide = torch.promote_types(scores.dtype, torch.float32)
    norms = torch.linalg.vector_norm(numerators, dim=-1, keepdim=True, dtype=wide)
    weights = numerators * (tau / norms.masked_fill(norms == 0, torch.inf)).to(scores.dtype)
    return F.gelu(weights) if kind == "l2_norm_gelu" else weights


class Pattention(nn.Module):
    """A projection through parameter tokens: normalised_scores(X K^T) V, with a row of K and V for each."""

    def __init__(self, config: TokenformerConfig, role: str) -> None:
        super().__init__()
        assert config.tokens and config.tau and config.score_norm  # the dense twin alone has none
        tokens, width = config.tokens[role], config.hidden_size
        self.tau, self.kind = float(config.tau[role]), config.score_norm
        self.key_tokens = nn.Parameter(torch.empty(tokens, width))
        self.value_tokens = nn.Parameter(torch.empty(tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] to [..., d]."""
        return normalised_scores(F.linear(x, self.key_tokens), self.tau, self.kind) @ self.value_tokens

    def extra_repr(self) -> str:
        return f"tokens={len(self.key_tokens)}, score_norm={self.kind}, tau={self.tau:g}"


class LayerNorm(nn.Module):
    """LayerNorm, whose gain, where it has one, is stored minus one, as it was trained."""

    gain_minus_one: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, config: TokenformerConfig, has_parameters: bool = True) -> None:
        super().__init__()
        self.width, self.eps = (config.hidden_size,), config.layer_norm_eps
        for name in ("gain_minus_one", "bias"):
            self.register_parameter(
                name, nn.Parameter(torch.zeros(config.hidden_size)) if has_parameters else None
            )

    def forward(self, x: Tensor) -> Tensor:
        gain = None if self.gain_minus_one is None else 1.0 + self.gain_minus_one
        return F.layer_norm(x, self.width, gain, self.bias, self.eps)


class Mlp(nn.Module):
    """The feed-forward part of the dense twin."""

    def __init__(self, config: TokenformerConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, 4 * config.hidden_size, bias=False)
        self.down = nn.Linear(4 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Attention(nn.Module):
    """Multi-head causal attention whose four projections are Pattentions, or products in the dense twin."""

    is_causal = True

    def __init__(self, config: TokenformerConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.scaling = config.head_size**-0.5

        def projection(role: str) -> nn.Module:
            if config.is_dense:
                return nn.Linear(config.hidden_size, config.hidden_size, bias=False)
            return Pattention(config, role)

        self.query, self.key, self.value = (projection("qkv") for _ in range(3))
        self.output = projection("output")

    def forward(
        self, x: Tensor, tables: Tables, mask: Any, layer_past: Cache | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[b, s, d] to [b, s, d], and the weights [b, h, s, keys] where the implementation has them."""
        query, key, value = (
            project(x).unflatten(-1, (-1, self.config.head_size)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        query, key = rotate(query, tables), rotate(key, tables)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, attend_eagerly)
        context, weights = attend(self, query, key, value, mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.output(context.flatten(start_dim=2)), weights


def attend_eagerly(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain torch: [b, h, s, c] to [b, s, h, c], and its weights."""
    scores = scaling * query @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def rotary_tables(positions: Tensor, size: int) -> Tables:
    """Positions [b, s] as the tables of a rotary embedding of `size` channels.

    Made where they are used, in fp32: a buffer would be cast with the module, and lose positions.
    """
    exponents = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size
    angles = positions[:, None, :, None].float() * ROTARY_BASE**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: Tables) -> Tensor:
    """Rotary embedding of the first channels of x, [b, h, s, c], in halves (arXiv 2104.09864)."""
    cos, sin = tables
    size = cos.shape[-1]
    turned, kept = x[..., :size].float(), x[..., size:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned.to(x.dtype), kept), dim=-1)


class TokenformerLayer(GradientCheckpointingLayer):
    """x + Attention(LN(x)), then x + FFN(LN(x)).

    A Tokenformer's FFN is one Pattention, and its norms have no parameters; the dense twin's is an MLP, and
    its norms have.
    """

    def __init__(self, config: TokenformerConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config, has_parameters=config.is_dense)
        self.attention = Attention(config, index)
        self.ffn_norm = LayerNorm(config, has_parameters=config.is_dense)
        self.ffn = Mlp(config) if config.is_dense else Pattention(config, "ffn")

    def forward(
        self, x: Tensor, tables: Tables, mask: Any, layer_past: Cache | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[b, s, d] to [b, s, d], and the attention's weights where the implementation has them."""
        attended, weights = self.attention(self.attention_norm(x), tables, mask, layer_past, **kwargs)
        x = x + attended
        return x + self.ffn(self.ffn_norm(x)), weights


class TokenformerPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the model."""

    config_class = TokenformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TokenformerLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache", "layer_past"]
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        """Initial values of a model that starts anew, or of what a folder does not have."""
        config, std = self.config, self.config.initializer_range
        if isinstance(module, Pattention):
            nn.init.normal_(module.key_tokens, std=std)
            nn.init.normal_(
                module.value_tokens, std=2.0 / (config.num_hidden_layers * math.sqrt(config.hidden_size))
            )
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, LayerNorm):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)


class TokenformerModel(TokenformerPreTrainedModel):
    """Ids [b, s] to what the head takes, [b, s, d]."""

    def __init__(self, config: TokenformerConfig) -> None:
        super().__init__(config)
        self.embedding: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TokenformerLayer(config, i) for i in range(config.num_hidden_layers))
        self.final_norm = LayerNorm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """As any decoder of transformers; `past_key_values` is what was the name of `cache` before 5.24.

        Args:
            attention_mask: [b, keys], 0 where a row is padded, on the left or on the right.
            position_ids: [b, s], by default 0 at the first position of a row that is not padded.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False  # a layer that is computed again would write its keys twice
        past = past_key_values if cache is None else cache
        if use_cache and past is None:
            past = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = positions_of(x, attention_mask, 0 if past is None else past.get_seq_length())
        mask = create_causal_mask(self.config, x, attention_mask, past, position_ids)
        tables = rotary_tables(position_ids, self.config.rotary_size)

        states = list[Tensor]() if wanted(output_hidden_states, self.config.output_hidden_states) else None
        attentions = list[Tensor]() if wanted(output_attentions, self.config.output_attentions) else None
        for layer in self.layers:
            if states is not None:
                states.append(x)
            x, weights = layer(x, tables, mask, layer_past=past, **kwargs)
            if attentions is not None:
                attentions.append(weights)
        x = self.final_norm(x)
        outputs = BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=None if states is None else (*states, x),
            attentions=None if attentions is None else tuple(attentions),
            cache=past if use_cache else None,
        )
        return outputs if wanted(return_dict, self.config.return_dict) else outputs.to_tuple()


def positions_of(x: Tensor, attention_mask: Tensor | None, seen: int) -> Tensor:
    """The places of a row's tokens, [b or 1, s], after so many that it has seen, padding not counted."""
    if attention_mask is None or attention_mask.ndim != 2:
        return torch.arange(seen, seen + x.shape[1], device=x.device).unsqueeze(0)
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -x.shape[1] :]


def wanted(given: bool | None, default: bool | None) -> bool:
    """What a call says, or else the configuration."""
    return bool(default if given is None else given)


class TokenformerForCausalLM(TokenformerPreTrainedModel, GenerationMixin):
    """Ids [b, s] to logits [b, s, v]; the head's weight is the embedding's."""

    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}

    def __init__(self, config: TokenformerConfig) -> None:
        super().__init__(config)
        self.model = TokenformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """As `TokenformerModel.forward`.

        Args:
            labels: [b, s], the inputs themselves: they are shifted here; -100 does not count.
            logits_to_keep: so many last positions, or these positions; 0: all.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            cache=cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        answer = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cache=outputs.cache,
        )
        return answer if wanted(return_dict, self.config.return_dict) else answer.to_tuple()
