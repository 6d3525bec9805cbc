"""What the fork server of `tests/ranks.py` imports once, for all the ranks that it will fork."""

from megatron_tokenformer.quiet import quiet_imports

with quiet_imports():
    import megatron_tokenformer.training.loop  # noqa: F401
