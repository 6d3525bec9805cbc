"""What a run costs on given GPUs: time of a step by a simple model, memory, traffic; and the best layouts.

The model of time, all of whose assumptions `ASSUMPTIONS` puts in words:

    computing = executed operations / (tensor ranks x efficiency x peak)
    stage     = max(computing, launches of its kernels) + tensor-parallel traffic + borders
    step time = slowest stage x (micro-batches + stages - 1) + sums and gathers at the end of the step
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_args

from megatron_tokenformer.config.memory import fullest_stage
from megatron_tokenformer.config.pipeline_cut import bubble_share, slowest_share, stage_layers, stage_works
from megatron_tokenformer.config.schema import RunConfig, Training, check_world
from megatron_tokenformer.config.sizes import (
    micro_batch_tokens,
    resolved_precision,
    step_flops,
    tokens_per_step,
)
from megatron_tokenformer.config.traffic import (
    ACTIVATIONS,
    GRADIENTS,
    LOSS,
    PIPELINE,
    ROW_TOTALS,
    TIED_EMBEDDING,
    WEIGHTS,
    Traffic,
    sent,
    stage_traffic,
)
from megatron_tokenformer.errors import UserError

POLICIES: tuple[str, ...] = get_args(Training.model_fields["recompute"].annotation)
USABLE = 0.9
"""share of a GPU's memory that is planned for"""
LARGEST_MICRO_BATCH = 16_384
"""tokens; products get no faster beyond"""
LAUNCHES = {"forward": 40, "backward": 80}
"""kernels of a layer and micro-batch; a round guess, not counted"""
AMONG = {
    "tensor": (ACTIVATIONS, ROW_TOTALS, LOSS),
    "pipeline": (PIPELINE, TIED_EMBEDDING),
    "data": (GRADIENTS, WEIGHTS),
}
"""which ranks exchange what, by purpose"""


@dataclass(frozen=True)
class Hardware:
    """GPUs and what connects them; all speeds per GPU and direction."""

    peak: float
    """FLOP/s of dense products in the run's precision"""
    memory: int
    """bytes"""
    per_node: int = 8
    link: float = 200e9
    """bytes/s that a collective reaches between GPUs of a node"""
    network: float = 20e9
    """bytes/s that a collective reaches between nodes"""
    efficiency: float = 0.4
    """share of the peak that everything that is computed reaches, waiting and traffic left out"""
    latency: float = 20e-6
    """seconds of a call, beside its bytes"""
    launch: float = 5e-6
    """seconds that launching one kernel takes"""

    def speed(self, ranks: int, apart: int, gpus: int, pairs: bool = False) -> float:
        """Bytes/s of the slowest group, each of `ranks` GPUs whose numbers are `apart` from each other.

        Between nodes a ring uses the network ports of all its GPUs in a node.

        Args:
            gpus: all that there are, a multiple of `ranks * apart`.
            pairs: whether no ring sends but one GPU to another.
        """
        ports = fewest_in_a_node(ranks, apart, gpus, self.per_node)
        if ports is None:
            return self.link
        return min(self.link, self.network * (1 if pairs else ports))


@lru_cache(maxsize=1024)
def fewest_in_a_node(ranks: int, apart: int, gpus: int, per_node: int) -> int | None:
    """Of the groups that lie on several nodes, the fewest GPUs that one has on a node; None where none does.

    The first group alone would not tell: of groups of 4 on nodes of 6 GPUs, the second is on two nodes.
    """
    fewest = [
        min(nodes.values())
        for first in range(gpus)
        if first // apart % ranks == 0
        and len(nodes := Counter((first + i * apart) // per_node for i in range(ranks))) > 1
    ]
    return min(fewest, default=None)


ASSUMPTIONS = """\
computing reaches {efficiency:.0%} of the peak of {peak:.0f} TFLOP/s, whatever the sizes; recomputing counts
a layer has {forward} kernels forward, {backward} backward; a launch takes {launch:g} us, beside computing
all traffic is waited for, none of it hidden behind computing; a call takes {latency:.0f} us beside its bytes
collectives reach {link:.0f} GB/s per GPU in a node of {per_node}, {network:.0f} GB/s per port between nodes
not counted: data loading, the optimizer's own arithmetic, evaluation, checkpoints, failures
memory: {usable:.0%} of {memory:.0f} GB is planned for; the rest is CUDA's, NCCL's and the allocator's"""


def assumptions(hardware: Hardware) -> list[str]:
    """What the time and the choice of layouts rest on, a line each."""
    return ASSUMPTIONS.format(
        efficiency=hardware.efficiency,
        peak=hardware.peak / 1e12,
        latency=hardware.latency * 1e6,
        launch=hardware.launch * 1e6,
        **LAUNCHES,
        link=hardware.link / 1e9,
        per_node=hardware.per_node,
        network=hardware.network / 1e9,
        usable=USABLE,
        memory=hardware.memory / 1e9,
    ).splitlines()


@dataclass(frozen=True)
class Estimate:
    """A run on a number of GPUs.  Bytes and seconds."""

    config: RunConfig
    gpus: int
    data_ranks: int
    micro_batches: int
    """of a step and rank"""
    memory: dict[str, int]
    """by kind, of a GPU of the stage that holds most"""
    sent: dict[str, float]
    """bytes that a GPU sends in a step to tensor, pipeline and data ranks, where it is most"""
    seconds: dict[str, float]
    """of a step, by what it goes to"""

    @property
    def memory_bytes(self) -> int:
        """All of a GPU's memory."""
        return sum(self.memory.values())

    @property
    def step_time(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    def mfu(self, hardware: Hardware) -> float:
        """Share of all the GPUs' peak that the step's products would be."""
        return step_flops(self.config) / (self.step_time * self.gpus * hardware.peak)

    def figures(self, hardware: Hardware) -> dict[str, Any]:
        """All figures by name, for JSON."""
        config, stages = self.config, self.config.parallel.pipeline
        return {
            "gpus": self.gpus,
            "tensor": config.parallel.tensor,
            "sequence": config.parallel.sequence,
            "pipeline": stages,
            "data": self.data_ranks,
            "micro_batch_size": config.training.micro_batch_size,
            "micro_batches": self.micro_batches,
            "recompute": config.training.recompute,
            "stage_layers": stage_layers(config),
            "slowest_stage": slowest_share(config),
            "bubble": bubble_share(stages, self.micro_batches),
            "memory_bytes": self.memory_bytes,
            "memory_by_kind": self.memory,
            "sent_bytes_per_step": self.sent,
            "step_time_s": self.step_time,
            "step_time_by_kind_s": self.seconds,
            "tokens_per_s": tokens_per_step(config) / self.step_time,
            "mfu": self.mfu(hardware),
            "run_time_s": self.step_time * config.training.steps,
        }


def estimate(config: RunConfig, gpus: int, hardware: Hardware) -> Estimate:
    """The run with its own layout and micro-batch on so many GPUs.

    Raises:
        UserError: the layout or the batch cannot be divided over them.
    """
    micro_batches = check_world(config, gpus)
    tensor, stages = config.parallel.tensor, config.parallel.pipeline
    data_ranks = gpus // (tensor * stages)
    speeds = {
        "tensor": hardware.speed(tensor, 1, gpus),
        "data": hardware.speed(data_ranks, tensor, gpus),
        "pipeline": hardware.speed(stages, tensor * data_ranks, gpus, pairs=True),
    }
    most = {ranks: 0.0 for ranks in AMONG}
    slowest = {"computing": 0.0, "launching": 0.0, "tensor": 0.0, "pipeline": 0.0}
    at_the_end = 0.0
    tokens = micro_batch_tokens(config)
    layers = stage_layers(config)
    for stage, work in enumerate(stage_works(config)):
        each, once = stage_traffic(config, resolved_precision(config), data_ranks, stage)
        waits = {ranks: _wait(among(ranks, each), speeds[ranks], hardware.latency) for ranks in AMONG}
        computing = work * tokens / (tensor * hardware.efficiency * hardware.peak)
        launches = layers[stage] * layer_launches(config) * hardware.launch
        here = {
            "computing": computing,
            "launching": max(launches - computing, 0.0),  # the rest is hidden behind computing
            "tensor": waits["tensor"],
            "pipeline": waits["pipeline"],
        }
        slowest = max(slowest, here, key=lambda parts: sum(parts.values()))
        end = sum(_wait(among(ranks, once), speeds[ranks], hardware.latency) for ranks in AMONG)
        at_the_end = max(at_the_end, end)
        for ranks in AMONG:
            here_sent = micro_batches * sent(among(ranks, each)) + sent(among(ranks, once))
            most[ranks] = max(most[ranks], here_sent)
    seconds = {kind: part * micro_batches for kind, part in slowest.items()}
    seconds |= {"bubble": sum(slowest.values()) * (stages - 1), "end of step": at_the_end}
    _, memory = fullest_stage(config, data_ranks, micro_batches)
    return Estimate(config, gpus, data_ranks, micro_batches, memory, most, seconds)


def layer_launches(config: RunConfig) -> int:
    """Kernels of a layer and micro-batch, those of a forward pass that is made again included."""
    again = LAUNCHES["forward"] if config.training.recompute == "layer" else 0
    return sum(LAUNCHES.values()) + again


def among(ranks: str, traffic: Iterable[Traffic]) -> list[Traffic]:
    """That part of the traffic that is among `tensor`, `pipeline` or `data` ranks."""
    return [one for one in traffic if one.purpose in AMONG[ranks] and one.ranks > 1]


def _wait(traffic: Iterable[Traffic], speed: float, latency: float) -> float:
    """Seconds that a rank sends; what it receives comes while another sends."""
    return sum(one.sent / speed + one.calls * latency for one in traffic if one.kind != "receive")


def best_layouts(config: RunConfig, gpus: int, hardware: Hardware, count: int = 3) -> list[Estimate]:
    """The fastest layouts of this many GPUs that fit into their memory, at most `count`, the fastest first.

    Each with its best micro-batch size and recomputation; of equally fast ones with the largest micro-batch.
    Tensor-parallel ranks stay within a node, and split the sequence as well.
    """
    fitting = [
        min(fits, key=lambda found: (round(found.step_time, 6), -found.config.training.micro_batch_size))
        for layout in layouts(config, gpus, hardware)
        if (fits := [found for found in settings(layout, gpus, hardware) if fits_into(found, hardware)])
    ]
    return sorted(fitting, key=lambda found: found.step_time)[:count]


def fits_into(found: Estimate, hardware: Hardware) -> bool:
    """Whether the estimate's memory is what is planned for, or less."""
    return found.memory_bytes <= USABLE * hardware.memory


def layouts(config: RunConfig, gpus: int, hardware: Hardware) -> Iterator[RunConfig]:
    """The config under every layout that the schema allows on so many GPUs, no tensor ranks on two nodes."""
    for tensor in _divisors(gpus, most=hardware.per_node):
        if hardware.per_node % tensor and gpus > hardware.per_node:
            continue  # some of these groups would lie on two nodes
        for pipeline in _divisors(gpus // tensor, most=config.model.layers):
            split = {"tensor": tensor, "pipeline": pipeline, "sequence": tensor > 1}
            parallel = config.parallel.model_copy(update=split)
            try:
                yield RunConfig.model_validate(config.model_dump() | {"parallel": parallel.model_dump()})
            except ValueError:
                continue


def settings(config: RunConfig, gpus: int, hardware: Hardware) -> Iterator[Estimate]:
    """Estimates of a layout with every micro-batch size that divides the batch, and every recomputation."""
    data_ranks = gpus // (config.parallel.tensor * config.parallel.pipeline)
    sequences, rest = divmod(config.training.global_batch_size, data_ranks)
    if rest:
        return
    for size in _divisors(sequences, most=max(1, LARGEST_MICRO_BATCH // config.data.sequence_length)):
        for recompute in POLICIES:
            if recompute == "scores" and config.model.is_dense:
                continue  # it has none
            training = config.training.model_copy(update={"micro_batch_size": size, "recompute": recompute})
            yield estimate(config.model_copy(update={"training": training}), gpus, hardware)


def parse_bytes(text: str) -> int:
    """`80GB`, `141e9` or `80GiB` in bytes.

    Raises:
        UserError: it is none of these.
    """
    for unit, factor in (("GiB", 2**30), ("GB", 10**9), ("", 1)):
        if text.endswith(unit):
            try:
                size = int(float(text.removesuffix(unit)) * factor)
            except (ValueError, OverflowError):
                break
            if size > 0:
                return size
            break
    raise UserError(f"--gpu-memory {text} is not a size; write one such as 80GB or 80GiB")


def _divisors(number: int, most: int) -> list[int]:
    return [divisor for divisor in range(1, min(number, most) + 1) if number % divisor == 0]
