"""The sizes that benchmarks compare: tokens of each, and the Tokenformer's config beside its dense twin's."""

from __future__ import annotations

from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TOKENS = (576, 2144, 4864, 9216)
"""s of 124M to 1.4B, 12 layers x 768"""
TWINS = {"124m": "124m", "354m": "354m", "757m": "757m", "1.4b": "1.3b"}
"""each size of the ladder, and that of the GPT of arXiv 2005.14165, table 2.1, nearest in parameters"""
SIZES = (*TWINS, "150m", "450m", "900m", "1.5b")
"""those, and the other Tokenformers of configs/, which have no twin"""


def twin_configs(size: str) -> dict[str, Path]:
    """By name, the config of the Tokenformer of this size, and that of its dense twin if it has one."""
    configs = {f"Tokenformer {size}": CONFIGS / f"tokenformer-{size}.yaml"}
    if size in TWINS:
        configs[f"GPT {TWINS[size]}"] = CONFIGS / f"transformer-{TWINS[size]}.yaml"
    return configs
