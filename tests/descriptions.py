"""Write the description (`PREFIX.json`) of a dataset that a test made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_tokenformer.data.indexed import TokenFile


def describe(prefix: str, fingerprint: str = "a" * 64, model: str | None = None, **changes: Any) -> str:
    """Describe `prefix` as made with the tokenizer of this fingerprint, with changes; return the prefix."""
    Path(f"{prefix}.json").unlink(missing_ok=True)
    file = TokenFile(prefix)
    tokenizer = {
        "type": "HFTokenizer",
        "model": model or f"{fingerprint[0]}.json",
        "fingerprint": fingerprint,
    }
    content = {
        "documents": file.documents,
        "tokens": file.tokens,
        "dtype": str(file.dtype),
        "tokenizer": {**tokenizer, "vocab_size": 64, "eod_id": 0, **changes.pop("tokenizer", {})},
        **changes,
    }
    Path(f"{prefix}.json").write_text(json.dumps(content))
    return prefix
