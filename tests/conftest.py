"""Before any test module is imported: where there is no GPU, Triton's kernels run under its interpreter.

Triton reads the variable when a kernel is defined, its own functions included, and DeepSpeed imports Triton.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with files that have a `long` test."""
    long = {item.path for item in items if item.get_closest_marker("long")}
    items.sort(key=lambda item: item.path not in long)
