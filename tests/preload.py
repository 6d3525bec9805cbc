"""What the fork server of `tests/ranks.py` imports once, for all the ranks that it will fork.

The ranks are gloo's, on the CPU, whatever the machine has: torch sees no GPU, and DeepSpeed does not look.
"""

import os

os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")

from megatron_tokenformer.quiet import quiet_imports

with quiet_imports():
    import megatron_tokenformer.training.loop  # noqa: F401
