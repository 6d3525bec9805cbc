"""Tasks of lm-evaluation-harness (version 0.4.13), answered by a checkpoint's model.

The harness makes requests of a task's documents and figures of the answers; what is here answers them.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_tokenformer.errors import UserError
from megatron_tokenformer.evaluation.generation import Prompt, PromptEncoder
from megatron_tokenformer.evaluation.sampling import Sampling
from megatron_tokenformer.evaluation.scoring import Window, Writing
from megatron_tokenformer.evaluation.sharing import RankPool, in_short

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""texts of context and continuation, and the ids of both"""

PAPER_FOLDERS = ("lambada", "hellaswag", "piqa", "arc", "winogrande")
"""of the harness's tasks; to read all of its thousands of files takes half a minute"""
SEEDS = {"python": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
"""the harness's own, so that its few-shot examples are"""
SAMPLED_TOKENS = 256
"""of a text whose task does not say, as in the harness"""
WORDS_OF_SAMPLING = {"temperature", "top_k", "top_p", "repetition_penalty"}


class HarnessModel(TemplateLM):
    """What the harness asks, answered by a pool of scorers.

    Args:
        max_length: tokens of context that the model sees; what is longer loses its beginning.
    """

    def __init__(self, pool: RankPool, max_length: int, seed: int = 1234) -> None:
        super().__init__()
        self.pool, self.max_length, self.seed = pool, max_length, seed
        self._encode = PromptEncoder(pool.scorer.tokenizer)

    @property
    def eot_token_id(self) -> int:
        """What ends a document."""
        return self.pool.scorer.tokenizer.eod_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without context follows: what its template begins with, else the end of a document."""
        return self._encode.before[-1] if self._encode.before else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text, by default with what the tokenizer's template puts before it."""
        ids = self._encode.continuing(string)
        return ids[len(self._encode.before) :] if add_special_tokens is False else ids

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """For each request: the continuation's log-probability, and whether it is what greedy would write."""
        grouped: dict[tuple[int, ...], list[int]] = {}
        for number, (_texts, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation has {len(continuation)} tokens, and the model sees {self.max_length}; "
                    "--sequence-length N changes that",
                    exit_code=1,
                )
            if not continuation:
                continue  # certain
            inputs = tuple((context + continuation)[-(self.max_length + 1) :][:-1])
            grouped.setdefault(inputs, []).append(number)
        order = sorted(grouped, key=lambda inputs: (-len(inputs), inputs))
        windows = [Window(list(inputs), [requests[n][2] for n in grouped[inputs]]) for inputs in order]
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for inputs, found in zip(order, self.pool.ask("score", windows)):
            for number, answer in zip(grouped[inputs], found):
                answers[number] = answer
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in windows that predict each token once."""
        windows: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            pairs = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            pieces = [(None, *make_disjoint_window(pair)) for pair in pairs]
            windows += pieces
            owners += [number] * len(pieces)
        sums = [0.0] * len(requests)
        for owner, (likelihood, _) in zip(owners, self._loglikelihood_tokens(windows)):
            sums[owner] += likelihood
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, until one of the task's stop texts or the document's end."""
        work = [self._writing(number, *request.args) for number, request in enumerate(requests)]
        order = sorted(range(len(work)), key=lambda n: (repr(work[n].manner), -work[n].length))
        texts = [""] * len(work)
        for number, text in zip(order, self.pool.ask("write", [work[n] for n in order])):
            texts[number] = text
        return texts

    def _writing(self, number: int, context: str, words: dict[str, Any]) -> Writing:
        asked = dict(normalize_gen_kwargs(words, SAMPLED_TOKENS))
        stops, limit = handle_stop_sequences(asked.pop("until", None), eos=None), asked["max_gen_toks"]
        if limit >= self.max_length:
            raise UserError(
                f"a task asks for up to {limit} tokens, and the model sees {self.max_length}; "
                "--sequence-length N changes that",
                exit_code=1,
            )
        sampling = {key: asked[key] for key in WORDS_OF_SAMPLING if asked.get(key) is not None}
        ids = self._encode(context)[-(self.max_length - limit) :]
        return Writing(Prompt(ids, (self.seed, number)), Sampling(**sampling), limit, tuple(stops))


def load_tasks(names: Sequence[str], include_path: str | None, num_fewshot: int | None) -> dict[str, Any]:
    """Tasks by name, group or tag, with their documents, as the harness takes them.

    Args:
        include_path: a folder of more tasks; its names come before the harness's own.
        num_fewshot: examples before each question; None: as the task says, else 0.

    Raises:
        UserError: no such task or folder (2), or documents that cannot be had (1).
    """
    manager = _manager(names, include_path)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        try:
            found = manager.load([name])
        except Exception as error:  # whatever datasets and a task's own code raise
            raise UserError(f"task {name} cannot be loaded: {in_short(error)}", exit_code=1) from error
        for part in loaded:
            loaded[part].update(found[part])
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
    return loaded


def _manager(names: Sequence[str], include_path: str | None) -> TaskManager:
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"{include_path} is no folder of tasks")
    builtin = Path(lm_eval.tasks.__file__).parent
    own = [include_path] if include_path is not None else []
    first = [builtin / name for name in PAPER_FOLDERS] + own
    manager = TaskManager(include_path=first, include_defaults=False)
    unknown = [name for name in names if name not in manager.all_tasks]
    gone = _unmentioned(unknown, builtin)
    if unknown and not gone:
        manager = TaskManager(include_path=own)
        gone = set(unknown) - set(manager.all_tasks)
    unknown = [name for name in unknown if name in gone]
    if unknown:
        where = " or ".join(["lm-evaluation-harness", *own])
        raise UserError(f"no task {', '.join(unknown)} in {where}")
    return manager


def _unmentioned(names: Sequence[str], folder: Path) -> set[str]:
    """Those of the names that no task's file there mentions: to search a file is quicker than to parse it."""
    left = set(names)
    for path in folder.glob("**/*.yaml") if left else ():
        text = path.read_text(encoding="utf-8", errors="replace")
        left -= {name for name in left if name in text}
        if not left:
            break
    return left


def run_tasks(
    loaded: dict[str, Any], model: HarnessModel, limit: int | None, bootstrap: int = 0
) -> dict[str, Any]:
    """The harness's results; the same tasks may be run again.

    Args:
        limit: so many documents of each task, for trials.
        bootstrap: draws for the standard errors of metrics that have no formula for it; 0: no errors at all.
    """
    random.seed(SEEDS["python"])
    np.random.seed(SEEDS["numpy"])
    torch.manual_seed(SEEDS["torch"])
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=SEEDS["fewshot"])
    # The harness shares work out between ranks by documents, and fails where there are fewer than ranks; the
    # pool does it by requests.  So to the harness there is one process.
    results = evaluate(lm=model, task_dict=loaded, limit=limit, bootstrap_iters=bootstrap, log_samples=False)
    assert results is not None
    return dict(results)
