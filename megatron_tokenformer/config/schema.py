"""The schema of a run: every key that a config file may hold, its default and what it means.

The objects are frozen: configuration is read in one place (`load.py`) and handed down.  Checks that need
two keys of one config are made here and name both; those that need the number of processes are made by
`check_world`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from megatron_tokenformer.errors import UserError

ScoreNorm = Literal["l2_norm_gelu", "gelu_l2_norm", "softmax"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]

# Bounds far above what anyone trains, so that rows x channels, and steps x samples, stay within 64 bits.
TokenCount = Annotated[int, Field(ge=1, le=2**40)]
Channels = Annotated[int, Field(ge=1, le=2**20)]
Layers = Annotated[int, Field(ge=1, le=10_000)]
Ranks = Annotated[int, Field(ge=1, le=2**20)]
Length = Annotated[int, Field(ge=1, le=2**31 - 1)]
"""of what Megatron's index, too, counts in 32 bits"""
Steps = Annotated[int, Field(ge=1, le=10**12)]
StepsOrZero = Annotated[int, Field(ge=0, le=10**12)]


TOKENFORMER_KEYS = ("tokens", "score_norm")
"""keys of Model that are of its Pattentions, so that a dense model has neither"""


class Section(BaseModel):
    """A frozen group of keys that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Tokens(Section):
    """Parameter tokens (rows of K and of V) of each Pattention in a layer."""

    qkv: TokenCount = 576
    """tokens of each of the query, key and value projections"""
    output: TokenCount = 576
    """tokens of the attention's output projection"""
    ffn: TokenCount = 2304
    """tokens of the feed-forward Pattention, by custom four times the others"""


class Model(Section):
    """The network.  The defaults are the 124M model of the paper's ladder."""

    architecture: Literal["tokenformer", "transformer"] = "tokenformer"
    """transformer: a dense GPT in the same engine, for comparisons; it has no tokens and no score_norm"""
    layers: Layers = 12
    """Tokenformer layers, each an attention and a feed-forward part"""
    hidden_size: Channels = 768
    """channels of the activations between layers; attention_heads divides it"""
    attention_heads: Channels = 12
    """heads of each layer; parallel.tensor divides them"""
    tokens: Tokens = Tokens()
    score_norm: ScoreNorm = "l2_norm_gelu"
    """how scores become weights over parameter tokens (paper, equation 6 and table 5)"""
    vocab_size: Length = 50304
    """rows of the embedding; at least the tokenizer's vocabulary, padded so that ranks divide it"""
    rotary_fraction: Fraction = 0.25
    """share of each head's channels that is rotated"""
    layer_norm_eps: float = Field(1e-5, gt=0.0)
    """what every LayerNorm adds to the variance"""

    @property
    def is_dense(self) -> bool:
        """Whether its layers are a dense Transformer's."""
        return self.architecture == "transformer"

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.attention_heads

    @property
    def rotary_size(self) -> int:
        """Rotated channels of one head: even, at least 2 unless the fraction is 0."""
        return 2 * max(int(self.head_size * self.rotary_fraction) // 2, self.rotary_fraction > 0)

    @model_validator(mode="before")
    @classmethod
    def _a_transformer_has_no_tokens(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("architecture") != "transformer":
            return given
        for key in TOKENFORMER_KEYS:
            if given.get(key) is not None:
                raise ValueError(
                    f"model.{key} is for tokenformers, not for model.architecture=transformer; leave it out, "
                    f"or write model.{key}=null where a base has it"
                )
        return {key: value for key, value in given.items() if key not in TOKENFORMER_KEYS}

    @model_serializer(mode="wrap")
    def _without_what_it_has_not(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        tree: dict[str, Any] = dump(self)
        if self.is_dense:
            tree = {key: value for key, value in tree.items() if key not in TOKENFORMER_KEYS}
        return tree

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Model:
        if self.hidden_size % self.attention_heads:
            fits = nearest_divisor(self.hidden_size, self.attention_heads)
            raise ValueError(
                f"model.hidden_size={self.hidden_size} is not divisible by "
                f"model.attention_heads={self.attention_heads}; attention_heads={fits} would work"
            )
        return self


class Parallel(Section):
    """How the model is split.  The data-parallel size is what remains of the processes."""

    tensor: Ranks = 1
    """ranks over which parameter tokens, attention heads and the vocabulary are split"""
    pipeline: Ranks = 1
    """stages over which layers are split"""
    sequence: bool = False
    """also split the sequence over the tensor-parallel ranks between Pattentions"""
    timeout_minutes: float = Field(30.0, gt=0.0)
    """how long a collective may wait for another rank before the run fails"""
    join_minutes: float = Field(10.0, gt=0.0)
    """how long the processes wait for one another at the start"""


class Tokenizer(Section):
    """The tokenizer that made the data; kept in checkpoints, for tools that need text."""

    type: Literal[
        "HFTokenizer", "GPT2BPETokenizer", "TikTokenizer", "SentencePieceTokenizer", "ByteTokenizer"
    ] = "HFTokenizer"
    """as `--tokenizer-type` of preprocess_data has it"""
    model: str | None = None
    """tokenizer.json, vocab.json, .tiktoken or .model file; where it is there, it must be that of the data"""
    merges: str | None = None
    """merges.txt, for GPT2BPETokenizer"""
    pattern: Literal["gpt2", "cl100k", "o200k"] | None = None
    """how TikTokenizer cuts texts; by default that of OpenAI's files for these, else cl100k"""


class Data(Section):
    """What is read: prefixes of indexed files, or a blend of them by weight."""

    train: list[tuple[float, str]] = []
    """a prefix, or a list of [weight, prefix]; weights need not sum to 1"""
    validation: list[tuple[float, str]] = []
    """likewise, for the loss that is reported; may be empty"""
    sequence_length: Length = 1024
    """tokens of a training sample; its labels are the same tokens one further"""
    isolate_documents: bool = False
    """a position attends to its own document only, and rotary positions start at 0 in each document
    (Megatron's --reset-attention-mask and --reset-position-ids together)"""
    eod_mask_loss: bool = False
    """positions whose input is the end-of-document id do not count in the loss (Megatron's name)"""
    eod_id: int | None = Field(None, ge=0, lt=2**31)
    """the end-of-document id that the two keys above go by; by default the one in the data's PREFIX.json"""
    tokenizer: Tokenizer | None = None
    """by default what the descriptions of the data say; if given, they must say the same"""

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _one_prefix_is_a_blend_of_one(cls, value: object) -> object:
        return [(1.0, value)] if isinstance(value, str) else value


class Optimizer(Section):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(6e-4, gt=0.0)
    """the highest learning rate, reached after the warm-up"""
    min_lr: float = Field(6e-5, ge=0.0)
    """where the schedule ends"""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """decay of Adam's first and second moment"""
    eps: float = Field(1e-8, gt=0.0)
    """what Adam adds to the root of the second moment"""
    weight_decay: float = Field(0.1, ge=0.0)
    """AdamW's: a step takes lr times this share from every parameter"""
    clip_grad: float = Field(1.0, ge=0.0)
    """largest global gradient norm; 0 does not clip"""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """how the learning rate goes from lr to min_lr after the warm-up: all the way; or, with wsd, in the last
    steps alone; or, with constant, not at all"""
    warmup_steps: StepsOrZero = 0
    """steps of linear warm-up to lr"""
    wsd_decay_fraction: Fraction = 0.2
    """with schedule wsd (warm-up, stable, decay): the last share of the steps, in which lr falls"""
    old_token_lr_scale: Fraction = 1.0
    """learning rate of parameter tokens from before the last growth, as a share of lr; 0 freezes them"""

    @model_validator(mode="after")
    def _min_below_max(self) -> Optimizer:
        if self.min_lr > self.lr:
            raise ValueError(
                f"optimizer.min_lr={self.min_lr:g} is above optimizer.lr={self.lr:g}; "
                f"min_lr={self.lr / 10:g} would work"
            )
        return self


class Training(Section):
    """The length, batch and precision of a run."""

    steps: Steps = 1000
    """optimizer steps of the whole run, resumed parts included"""
    global_batch_size: Length = 512
    """sequences per optimizer step, over all ranks"""
    micro_batch_size: Length = 8
    """sequences that pass through a rank at once"""
    precision: Precision = "auto"
    """auto: bf16 on a GPU, fp32 without one"""
    seed: int = Field(1234, ge=0, lt=2**63)
    """of the initial weights and of the order of the samples"""
    recompute: Literal["none", "scores", "layer"] = "none"
    """what the backward pass computes again instead of keeping it: scores, the widest tensors, for one matrix
    product of six more, after which nothing that a layer keeps grows with its tokens; or whole layers"""
    compile: bool = False
    """torch.compile each layer by itself, around its Pattentions and collectives, which are fused or opaque
    already; needs Triton on a GPU, a C++ compiler without one, and minutes at the first step"""
    eval_interval: StepsOrZero = 1000
    """steps between evaluations; 0: only at the start and the end"""
    eval_steps: StepsOrZero = 10
    """global batches of one evaluation; 0 never evaluates"""
    log_interval: Steps = 10
    """steps between rows of metrics.jsonl, and lines on the terminal"""
    max_minutes: float | None = Field(None, gt=0.0)
    """so long after its start a call saves and leaves with exit code 85, as after SIGTERM or SIGUSR1; give
    less than the job's time limit, by a step and a save; null: never"""
    on_nonfinite: Literal["skip", "stop"] = "skip"
    """a step whose loss or gradient is not finite never changes the weights: go on with the next batch, or
    end the run"""
    max_skipped_steps: Steps = 10
    """so many steps in a row that changed nothing end the run"""
    on_spike: Literal["log", "skip", "rollback"] = "log"
    """a loss above spike_factor times the running median: say so; leave the batch out; or go back to the
    newest checkpoint and leave out all data from there to the end of the batch"""
    spike_factor: float = Field(1.5, gt=1.0)
    """what on_spike goes by"""
    spike_window: int = Field(32, ge=4, le=10_000)
    """steps that the median is of; before half of them are done nothing is a spike"""
    max_rollbacks: StepsOrZero = 3
    """of a run; the next spike ends it"""
    step_timeout_minutes: float = Field(20.0, ge=0.0)
    """a step that takes longer ends the run with exit code 86 and the stacks of all ranks; 0: never.  Less
    than parallel.timeout_minutes, which tells no stacks"""
    slow_timeout_minutes: float = Field(25.0, ge=0.0)
    """the same for the first step of a call, an evaluation and a save"""
    straggler_factor: float = Field(2.0, gt=1.0)
    """a rank whose own work takes so many times the median of its peers' is named when a step is logged"""


class Checkpoint(Section):
    """When checkpoints are written, how many are kept, and what a run starts from."""

    interval: StepsOrZero = 1000
    """steps between checkpoints; 0: only at the end"""
    keep_last: Steps = 2
    """so many of the newest stay; older ones are deleted when a new one is durable"""
    keep_every: StepsOrZero = 0
    """checkpoints at multiples of so many steps stay for ever, besides; 0: none"""
    asynchronous: bool = True
    """training stops only until its state is copied to host memory, and goes on while files are written;
    takes host memory for one copy of each rank's own part"""
    max_failures: Steps = 3
    """so many failed saves in a row end the run; the last save of a run must not fail"""
    verify: bool = False
    """read all of a checkpoint and compare its hashes before loading; by default sizes and structure alone"""
    check_loss: bool = True
    """stop if the first loss after a load is not what it was for the run that saved, on the same samples"""
    load: str | None = None
    """a checkpoint, or a folder of them, to start from when run_dir holds none of its own"""


class Evaluation(Section):
    """Tasks of lm-evaluation-harness, run on checkpoints of the run while it trains."""

    tasks: list[str] = []
    """names of tasks, groups or tags; none by default"""
    interval: StepsOrZero = 0
    """steps between evaluations on them, a multiple of checkpoint.interval; 0: only at the end"""
    include_path: str | None = None
    """a folder of more tasks, as the harness's YAML files"""
    num_fewshot: int | None = Field(None, ge=0)
    """examples before each question; by default the task's own, or none"""
    limit: Steps | None = None
    """only so many documents of each task"""


class Wandb(Section):
    """Weights & Biases; `offline` needs no account and no network, and `online` without them is offline."""

    mode: Literal["online", "offline", "disabled"] = "disabled"
    """online sends as it goes, offline writes files for `wandb sync`"""
    project: str = "megatron_tokenformer"
    """the project that runs appear in"""
    group: str | None = None
    """of runs that belong together; the stages of a schedule get its folder's name"""


class Logging(Section):
    """Where the numbers go besides the terminal and RUN/metrics.jsonl."""

    wandb: Wandb = Wandb()
    tensorboard: bool = False
    """also write event files into RUN_DIR/tensorboard"""


class RunConfig(Section):
    """One training run."""

    run_dir: str = "runs/default"
    """folder of the run: checkpoints, metrics.jsonl, config.yaml"""
    model: Model = Model()
    parallel: Parallel = Parallel()
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation = Evaluation()
    logging: Logging = Logging()

    @model_validator(mode="after")
    def _tensor_parallel_divides(self) -> RunConfig:
        tensor = self.parallel.tensor
        divided = {
            "model.attention_heads": self.model.attention_heads,
            "model.vocab_size": self.model.vocab_size,
        }
        if self.model.architecture == "tokenformer":
            tokens = self.model.tokens
            divided = {f"model.tokens.{key}": getattr(tokens, key) for key in Tokens.model_fields} | divided
        if self.parallel.sequence:
            divided["data.sequence_length"] = self.data.sequence_length
        for key, value in divided.items():
            if value % tensor:
                fits = f"{key}={math.ceil(value / tensor) * tensor}"
                if key == "model.attention_heads":
                    heads = nearest_divisor(self.model.hidden_size, value, multiple_of=tensor)
                    fits = f"{key}={heads}" if heads else "parallel.tensor=1"
                raise ValueError(
                    f"{key}={value} is not divisible by parallel.tensor={tensor}; {fits} would work"
                )
        return self

    @model_validator(mode="after")
    def _eod_id_is_in_the_vocabulary(self) -> RunConfig:
        if self.data.eod_id is not None and self.data.eod_id >= self.model.vocab_size:
            raise ValueError(
                f"data.eod_id={self.data.eod_id} is not below model.vocab_size={self.model.vocab_size}; "
                f"data.eod_id={self.model.vocab_size - 1} is the largest id"
            )
        return self

    @model_validator(mode="after")
    def _stages_have_layers(self) -> RunConfig:
        if self.model.layers < self.parallel.pipeline:
            raise ValueError(
                f"parallel.pipeline={self.parallel.pipeline} is more than model.layers={self.model.layers}; "
                f"parallel.pipeline={self.model.layers} would work"
            )
        return self

    @model_validator(mode="after")
    def _a_transformer_has_neither_scores_nor_old_tokens(self) -> RunConfig:
        if self.model.is_dense:
            if self.training.recompute == "scores":
                raise ValueError(
                    "training.recompute=scores is for tokenformers, not for model.architecture=transformer; "
                    "none or layer would work"
                )
            if self.optimizer.old_token_lr_scale < 1.0:
                raise ValueError(
                    f"optimizer.old_token_lr_scale={self.optimizer.old_token_lr_scale:g} is for "
                    f"tokenformers that have grown, not for model.architecture=transformer; leave it out"
                )
        return self

    @model_validator(mode="after")
    def _tasks_have_checkpoints(self) -> RunConfig:
        interval, saved = self.evaluation.interval, self.checkpoint.interval
        if self.evaluation.tasks and interval and (not saved or interval % saved):
            fits = math.ceil(interval / saved) * saved if saved else 0
            raise ValueError(
                f"evaluation.interval={interval} is not a multiple of checkpoint.interval={saved}, and tasks "
                f"are run on checkpoints; evaluation.interval={fits} would work"
            )
        return self

    @model_validator(mode="after")
    def _warmup_ends(self) -> RunConfig:
        if self.optimizer.warmup_steps > self.training.steps:
            raise ValueError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} is more than "
                f"training.steps={self.training.steps}; "
                f"optimizer.warmup_steps={self.training.steps // 100} would work"
            )
        return self


def nearest_divisor(number: int, wish: int, multiple_of: int = 1) -> int | None:
    """The divisor of `number` closest to `wish` among the multiples of `multiple_of`, or None."""
    divisors = [d for d in range(multiple_of, number + 1, multiple_of) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - wish), d), default=None)


def resolve_precision(precision: Precision, device_type: str) -> Precision:
    """What `auto` means on a device: fp32 on a CPU, bf16 elsewhere."""
    if precision != "auto":
        return precision
    return "fp32" if device_type == "cpu" else "bf16"


def check_world(config: RunConfig, world_size: int) -> int:
    """Check the layout against the number of processes.

    Returns the number of micro-batches that a rank accumulates per step, so that
    global_batch_size = micro_batch_size x accumulation x data-parallel size.

    Raises:
        UserError: the processes, or the batch, cannot be divided so.
    """
    model_ranks = config.parallel.tensor * config.parallel.pipeline
    if world_size % model_ranks:
        raise UserError(
            f"parallel.tensor={config.parallel.tensor} x parallel.pipeline={config.parallel.pipeline} "
            f"does not divide the {world_size} processes of this run; "
            f"start a multiple of {model_ranks} processes"
        )
    data_ranks = world_size // model_ranks
    training = config.training
    at_once = training.micro_batch_size * data_ranks
    if training.global_batch_size % at_once:
        fits = math.ceil(training.global_batch_size / at_once) * at_once
        raise UserError(
            f"training.global_batch_size={training.global_batch_size} is not a multiple of "
            f"training.micro_batch_size={training.micro_batch_size} x {data_ranks} data-parallel ranks; "
            f"training.global_batch_size={fits} would work"
        )
    return training.global_batch_size // at_once
