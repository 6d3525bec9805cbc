"""Distributed, progressive pretraining of Tokenformers (arXiv 2410.23168) on DeepSpeed and megatron-core."""

__version__ = "0.1.0"
