"""Before any test module is imported: where there is no GPU, Triton's kernels run under its interpreter.

Triton reads the variable when a kernel is defined, its own functions included, and DeepSpeed imports Triton.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
