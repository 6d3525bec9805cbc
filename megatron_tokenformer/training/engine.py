"""The engine: a Tokenformer as a DeepSpeed pipeline with ZeRO-1, the same for one process and for many.

Everything that DeepSpeed needs to be told for this to be right is told here, with the reason.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.utils.timer import NoopTimer

from megatron_tokenformer.config.memory import REDUCE_BUCKET
from megatron_tokenformer.config.pipeline_cut import stage_bounds
from megatron_tokenformer.config.schema import Precision, RunConfig, resolve_precision
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.model.language_model import canonical_parameters, full_shapes, initialize
from megatron_tokenformer.model.pipeline import PipelineLayer, language_model_loss, pipeline_layers
from megatron_tokenformer.parallel.layout import Layout, limit_timeouts
from megatron_tokenformer.quiet import quiet_start
from megatron_tokenformer.training.micro_losses import MicroBatchLosses
from megatron_tokenformer.training.optimizer import build_adamw
from megatron_tokenformer.training.staged_pipeline import StagedPipeline

COMPILE_BACKEND = "inductor"


@dataclass(frozen=True)
class Engine:
    """DeepSpeed's engine, with what the rest of the run needs to know about it."""

    deepspeed: PipelineEngine
    precision: Precision
    losses: MicroBatchLosses
    """of the last step's micro-batches, on the last stage"""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The AdamW inside ZeRO's optimizer, over this rank's flat fp32 partition."""
        return self.deepspeed.optimizer.optimizer

    @property
    def grad_norm(self) -> float:
        """Global gradient norm of the last step, before clipping."""
        return float(self.deepspeed.get_global_grad_norm() or 0.0)


def build_engine(config: RunConfig, layout: Layout, accumulation: int) -> Engine:
    """Build this rank's stage with its initial weights and hand it to DeepSpeed."""
    precision = device_precision(config, layout)
    if config.training.compile:
        check_can_compile(layout.device)
    losses = MicroBatchLosses(language_model_loss, accumulation)
    with quiet_start():
        # Without gradients: it broadcasts tied weights, which autograd would take for part of the model.
        with torch.no_grad():
            module = StagedPipeline(
                layers=pipeline_layers(config.model, layout.tensor, config.training.recompute == "scores"),
                topology=layout.topology,
                loss_fn=losses,
                partition_method=stage_bounds(config),
                activation_checkpoint_interval=1 if config.training.recompute == "layer" else 0,
                checkpointable_layers=["PipelineLayer"],
            )
        mark_tensor_parallel(module, config)
        initialize(module, config.model, config.training.seed, layout.tensor)
        if config.training.compile:
            compile_layers(module)
        engine, *_ = deepspeed.initialize(
            model=module,
            # One group: a group that exists on one pipeline stage alone hangs the norm's collective.
            optimizer=build_adamw(list(module.parameters()), config.optimizer),
            config=deepspeed_config(config, precision, accumulation),
            dist_init_required=False,
        )
    # One that is never read keeps two events of every step.
    engine.timers = NoopTimer()
    limit_timeouts(layout.timeout)
    return Engine(engine, precision, losses)


def check_can_compile(device: torch.device) -> None:
    """Refuse training.compile where torch could not build what it makes.

    Raises:
        UserError: names what is missing.
    """
    if device.type == "cuda":
        compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]  # as Triton looks for one
        missing = None if importlib.util.find_spec("triton") else "Triton"
    else:
        compilers, missing = [os.environ.get("CXX", "g++")], None  # as torch's inductor does
    if not any(map(shutil.which, compilers)):
        missing = f"a compiler ({' or '.join(compilers)})"
    if missing:
        raise UserError(
            f"training.compile=true needs {missing}, which is not here; training.compile=false would work"
        )


def compile_layers(module: torch.nn.Module) -> None:
    """torch.compile each layer by itself, in place: names and parameters stay, alike layers share code."""
    for part in module.modules():
        if isinstance(part, PipelineLayer):
            part.layer.compile(backend=COMPILE_BACKEND)


def device_precision(config: RunConfig, layout: Layout) -> Precision:
    """The run's precision on this device.

    Raises:
        UserError: one that the processor cannot compute in, or only in software.
    """
    precision, device = resolve_precision(config.training.precision, layout.device.type), layout.device
    if precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise UserError("training.precision=fp16 is not supported on this device; bf16 or fp32 would work")
    if precision == "bf16" and device.type == "cuda":
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError(
                f"training.precision={config.training.precision} is bf16, which this GPU only emulates; "
                "fp16 or fp32 would work"
            )
    return precision


def mark_tensor_parallel(module: torch.nn.Module, config: RunConfig) -> None:
    """Mark the parameters that are split over tensor-parallel ranks.

    DeepSpeed counts an unmarked one on the first rank only: the gradient norm is wrong and nothing complains.
    All parameters of two dimensions are split on their rows; the final norm is whole on every rank.
    """
    shapes = full_shapes(config.model)
    for name, parameter in canonical_parameters(module):
        parameter.tensor_model_parallel = len(shapes[name]) == 2  # type: ignore[attr-defined]


def deepspeed_config(config: RunConfig, precision: Precision, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's own configuration for this run."""
    settings: dict[str, Any] = {
        "train_batch_size": config.training.global_batch_size,
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        # 0 for no clipping must be said: left out it means 1.
        "gradient_clipping": config.optimizer.clip_grad,
        "steps_per_print": None,
        "zero_optimization": {
            # Stage 0 with a pipeline clips by a wrong norm and lets a NaN reach the weights.
            "stage": 1,
            # The default of 5e8 elements is allocated at every step.
            "reduce_bucket_size": REDUCE_BUCKET,
        },
        # Its list of tested optimizers knows AdamW, but no subclass of it.
        "zero_allow_untested_optimizer": True,
        # The default scatters stage boundaries over tensor ranks, wrong under sequence parallelism.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False, "use_reentrant": False},
    }
    if precision == "bf16":
        settings["bf16"] = {"enabled": True}
        # Otherwise micro-batches accumulate in bf16, and the sum over data ranks is one of bf16 numbers.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"
    elif precision == "fp16":
        settings["fp16"] = {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 1000}
    return settings
