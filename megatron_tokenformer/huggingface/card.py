"""The model card: the README.md of an exported folder."""

from __future__ import annotations

from tqdm import tqdm

from megatron_tokenformer.checkpoint.portable import PortableModel
from megatron_tokenformer.config.schema import Model
from megatron_tokenformer.config.sizes import parameter_count

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- {architecture}
- megatron-tokenformer
---

# {title}

{what}

| | |
|---|---|
| parameters | {parameters:,} |
| layers, width, heads | {model.layers}, {model.hidden_size}, {model.attention_heads} |
{rows}| vocabulary | {model.vocab_size:,} |
| trained on sequences of | {length:,} tokens |
| weights | {dtype} |

The code of the model is in this folder and needs torch and transformers (5.24 or later) alone:

```python
{code}
```

Written by megatron-tokenformer, which reads this folder back with
`tokenformer convert_checkpoint --from hf --to native --load FOLDER --save CHECKPOINTS`.
"""
TOKENFORMER = """\
A language model whose linear projections are attention to learned key and value tokens (arXiv 2410.23168), so
that it can grow by appending tokens."""
TRANSFORMER = "A dense GPT (pre-norm, rotary, no biases), trained to be compared with Tokenformers."
LOAD = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
"""
WITH_TOKENIZER = """\
tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))"""
WITHOUT_TOKENIZER = """\
# This folder has no tokenizer: give ids of the one that the model was trained with.
model.generate(ids, max_new_tokens=50)  # ids: [batch, length]"""


def model_card(portable: PortableModel, dtype: str, has_tokenizer: bool) -> str:
    """What the model is, and how it is loaded."""
    model = portable.model
    load = LOAD if has_tokenizer else LOAD.replace(", AutoTokenizer", "")
    return CARD.format(
        architecture=model.architecture,
        title=f"{model.architecture.capitalize()} of {tqdm.format_sizeof(parameter_count(model))} parameters",
        what=TRANSFORMER if model.is_dense else TOKENFORMER,
        parameters=parameter_count(model),
        model=model,
        rows="" if model.is_dense else _token_rows(model, portable.taus),
        length=portable.sequence_length,
        dtype=dtype,
        code=load + (WITH_TOKENIZER if has_tokenizer else WITHOUT_TOKENIZER),
    )


def _token_rows(model: Model, taus: dict[str, float]) -> str:
    counts = ", ".join(f"{role} {count:,}" for role, count in model.tokens.model_dump().items())
    scales = ", ".join(f"{role} {tau:g}" for role, tau in taus.items())
    return f"| parameter tokens | {counts} |\n| score norm, tau | `{model.score_norm}`, {scales} |\n"
