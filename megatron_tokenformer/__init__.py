"""Distributed, progressive pretraining of Tokenformers (arXiv 2410.23168) on DeepSpeed and megatron-core."""

from __future__ import annotations


def __getattr__(name: str) -> str:
    """`__version__`, as installed; looked up when asked for, so that importing this costs nothing."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("megatron-tokenformer")
    except PackageNotFoundError:  # a checkout on the path, and not installed
        return "0+not.installed"
