"""A folder of small tasks, of each kind that the paper's are of, and their figures computed plainly."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from megatron_tokenformer.checkpoint.manifest import read_manifest
from megatron_tokenformer.evaluation.load import load_model
from megatron_tokenformer.model.language_model import LanguageModel
from tests.evaluation.models import plain_logits

LENGTH = 32  # of the toy's context
CHOICES = [
    {"question": "the cat", "options": ["sat on", "sat", "is round"], "answer": 0},
    {"question": "on the", "options": ["mat. the cat", "m", "zzz"], "answer": 1},
    {
        "question": "a long question about what the cat sat on",
        "options": ["mat", "hat"],
        "answer": 1,
    },
    {"question": "the", "options": [" cat", "qqqq", "at"], "answer": 2},
    {"question": "cat sat on", "options": ["the", "thy", "the mat"], "answer": 0},
]
PASSAGES = ["the cat sat on the mat", "sat on the cat", "hello there world", "mat mat mat mat mat"]
BLANKS = [
    {"before": ["the cat ", "the dog "], "after": "sat on the mat", "answer": 0},
    {"before": ["on a hat ", "on the mat "], "after": ". the cat", "answer": 1},
    {"before": ["x ", "the cat sat "], "after": "on", "answer": 0},
]
QUESTIONS = [{"question": q, "answer": "?"} for q in ("the cat", "on the mat, the", "sat", "a")]
ROLLED = ["the cat sat on the mat. " * 4, "short"]

TASKS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "toy_choice": (
        CHOICES,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_target": "answer",
            "doc_to_choice": "options",
            "metric_list": ["acc", "acc_norm"],
        },
    ),
    "toy_lambada": (
        [{"text": text} for text in PASSAGES],
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}",
            "metric_list": ["perplexity", "acc"],
        },
    ),
    "toy_grande": (
        BLANKS,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "!function functions.which",
            "doc_to_target": "!function functions.rest",
            "doc_to_choice": "!function functions.beginnings",
            "metric_list": ["acc"],
        },
    ),
    "toy_write": (
        QUESTIONS,
        {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 6, "do_sample": False},
            "metric_list": ["exact_match"],
        },
    ),
    "toy_rolled": (
        [{"text": text} for text in ROLLED],
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": ["bits_per_byte"],
        },
    ),
}
FUNCTIONS = """
def which(doc):
    return doc["answer"]

def rest(doc):
    return doc["after"]

def beginnings(doc):
    return doc["before"]
"""


def write_tasks(folder: Path, answers: list[str] | None = None) -> str:
    """The tasks as files of the harness; their folder.

    Args:
        answers: of the questions of `toy_write`.
    """
    folder.mkdir()
    (folder / "functions.py").write_text(FUNCTIONS)
    for name, (documents, settings) in TASKS.items():
        if name == "toy_write" and answers is not None:
            documents = [{**doc, "answer": answer} for doc, answer in zip(documents, answers)]
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents))
        lines = [f"task: {name}", "dataset_path: json", "test_split: test"]
        lines += [f"dataset_kwargs: {{data_files: {{test: {data}}}}}"]
        for key, value in settings.items():
            if key == "metric_list":
                lines += ["metric_list:", *(f"  - metric: {metric}" for metric in value)]
            else:
                told = value if str(value).startswith("!function") else json.dumps(value)
                lines.append(f"{key}: {told}")
        (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n")
    return str(folder)


class Plain:
    """A checkpoint's model, asked one thing at a time, without any of the code that is tested."""

    def __init__(self, path: Path) -> None:
        self.model: LanguageModel = load_model(path, read_manifest(path), "fp32", torch.device("cpu"))

    def likelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """Of the bytes of a continuation, and whether each is the likeliest."""
        before, after = list(context.encode()) or [256], list(continuation.encode())
        return self._of((before + after)[-(LENGTH + 1) :], len(after))

    def _of(self, ids: list[int], count: int) -> tuple[float, bool]:
        logits = plain_logits(self.model, ids[:-1])[-count:]
        targets = torch.tensor(ids[-count:])
        nats = F.cross_entropy(logits.double(), targets, reduction="sum").item()
        return -nats, bool((logits.argmax(-1) == targets).all())

    def write(self, context: str, count: int, stop: str) -> str:
        """The likeliest bytes one after another."""
        ids, text = list(context.encode())[-(LENGTH - count) :], b""
        while len(text) < count and stop.encode() not in text:
            token = int(plain_logits(self.model, ids + list(text))[-1, :257].argmax())
            if token == 256:
                break
            text += bytes([token])
        return text.decode(errors="replace").split(stop)[0]

    def rolled(self, text: str) -> float:
        """The log-probability of a whole text, each window of it as long as can be."""
        ids, total, at = list(text.encode()), 0.0, 0
        while at < len(ids):
            end = min(at + LENGTH, len(ids))
            # Everything before it that fits, with the end of a document before the first.
            window = ([256, *ids])[max(0, end - LENGTH) : end + 1]
            total += self._of(window, end - at)[0]
            at = end
        return total

    def figures(self) -> dict[str, float]:
        """All figures of all tasks but `toy_write`."""
        right, normed = [], []
        for doc in CHOICES:
            context = f"Question: {doc['question']}\nAnswer:"
            found = [self.likelihood(context, " " + option)[0] for option in doc["options"]]
            normed_found = [x / len(option) for x, option in zip(found, doc["options"])]
            right.append(found.index(max(found)) == doc["answer"])
            normed.append(normed_found.index(max(normed_found)) == doc["answer"])
        words = [text.rsplit(" ", 1) for text in PASSAGES]
        last = [self.likelihood(start, " " + word) for start, word in words]
        grande = []
        for doc in BLANKS:
            found = [self.likelihood(start.rstrip(), " " + doc["after"])[0] for start in doc["before"]]
            grande.append(found.index(max(found)) == doc["answer"])
        bits = -sum(map(self.rolled, ROLLED)) / math.log(2) / sum(len(text.encode()) for text in ROLLED)
        return {
            "toy_choice/acc": sum(right) / len(right),
            "toy_choice/acc_norm": sum(normed) / len(normed),
            "toy_lambada/perplexity": math.exp(-sum(x for x, _ in last) / len(last)),
            "toy_lambada/acc": sum(greedy for _, greedy in last) / len(last),
            "toy_grande/acc": sum(grande) / len(grande),
            "toy_rolled/bits_per_byte": bits,
        }
