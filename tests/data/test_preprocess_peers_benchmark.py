"""benchmarks/preprocess_peers.py: what it asks of the tools, measures and prints; no checkout is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_tokenformer.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import preprocess_peers

    return preprocess_peers


def write_tool(checkout: Path, name: str, source: str = "") -> str:
    tool = checkout / name
    tool.parent.mkdir(parents=True)
    tool.write_text(source)
    return str(checkout)


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_all_tools_get_the_same_tokenizer_workers_and_end_of_document(
    benchmark: ModuleType, tmp_path: Path
) -> None:
    neox = write_tool(tmp_path / "neox", "tools/datasets/preprocess_data.py")
    megatron = write_tool(tmp_path / "megatron", "tools/preprocess_data.py")
    ours, theirs, others = benchmark.find_contenders({"gpt-neox": neox, "megatron-lm": megatron}, tmp_path, 3)
    assert [ours.name, theirs.name, others.name] == ["ours", "gpt-neox", "megatron-lm"]
    for contender in (ours, theirs, others):
        assert option(contender.command, "--workers") == "3"
        assert "--append-eod" in contender.command
    assert option(ours.command, "--tokenizer-model") == str(tmp_path / "tokenizer.json")
    assert option(theirs.command, "--vocab-file") == str(tmp_path / "tokenizer.json")
    assert option(others.command, "--tokenizer-model") == str(tmp_path / "hf")
    assert "--performance-dir" not in others.command


def test_each_peer_imports_its_own_checkout_first_and_ours_neither(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/libraries")
    neox = write_tool(tmp_path / "neox", "tools/datasets/preprocess_data.py")
    ours, theirs = benchmark.find_contenders({"gpt-neox": neox, "megatron-lm": None}, tmp_path, 2)
    assert ours.python_path == str(ROOT)
    assert theirs.python_path == os.pathsep.join([neox, "/libraries"])


def test_a_megatron_that_asks_for_old_figures_gets_a_folder_of_them(
    benchmark: ModuleType, tmp_path: Path
) -> None:
    megatron = write_tool(tmp_path / "megatron", "tools/preprocess_data.py", "'--performance-dir'")
    _, others = benchmark.find_contenders({"gpt-neox": None, "megatron-lm": megatron}, tmp_path, 2)
    assert option(others.command, "--performance-dir") == str(tmp_path / "performance")


def test_a_folder_without_the_tool_is_refused_by_name(benchmark: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--gpt-neox .*: no tools/datasets/preprocess_data.py there"):
        benchmark.find_contenders({"gpt-neox": str(tmp_path), "megatron-lm": None}, tmp_path, 2)


def test_nothing_to_compare_with_is_refused(benchmark: ModuleType, tmp_path: Path) -> None:
    args = benchmark.parse_arguments([])
    with pytest.raises(UserError, match="--megatron-lm DIR, --gpt-neox DIR or both"):
        benchmark.find_contenders({"gpt-neox": args.gpt_neox, "megatron-lm": args.megatron_lm}, tmp_path, 2)


def test_cpu_time_is_that_of_all_processes(benchmark: ModuleType, tmp_path: Path) -> None:
    child = "import time\nwhile time.process_time() < 0.3: pass"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    usage = benchmark.run_measured([sys.executable, "-c", parent], dict(os.environ), tmp_path)
    assert usage.cpu_seconds >= 0.3


def test_memory_is_that_of_all_processes(benchmark: ModuleType) -> None:
    child = "import sys; x = bytearray(b'x' * 64_000_000); print('ready', flush=True); sys.stdin.read()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        found = benchmark.tree_bytes(process.pid)
        process.communicate()
    assert 64_000_000 <= found < 128_000_000


def test_a_tool_that_fails_is_told_with_its_last_words(benchmark: ModuleType, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such luck')"]
    with pytest.raises(UserError, match="ended with 1: no such luck"):
        benchmark.run_measured(command, dict(os.environ), tmp_path)


def test_ratios_are_medians_of_the_rounds_own_and_the_table_shows_them(benchmark: ModuleType) -> None:
    # Round 2 was disturbed for both alike: 10, 20 and 30 times in CPU time, 4, 5 and 6 on the clock.
    ours = [benchmark.Usage(1.0, 1.0, 5), benchmark.Usage(2.0, 3.0, 7), benchmark.Usage(1.0, 1.0, 6)]
    theirs = [
        benchmark.Usage(10.0, 4.0, 100_000_000),
        benchmark.Usage(40.0, 15.0, 300_000_000),
        benchmark.Usage(30.0, 6.0, 200_000_000),
    ]
    figures = benchmark.compare(theirs, ours, tokens=60_000_000)
    assert figures["ours_is_times"] == {"per_cpu_second": 20.0, "per_second": 5.0}
    assert figures["tokens_per_cpu_second"] == {"median": 2e6, "lowest": 1.5e6, "highest": 6e6}
    assert figures["tokens_per_second"] == {"median": 1e7, "lowest": 4e6, "highest": 1.5e7}
    figures |= {"start_up": {"cpu_seconds": 3.0, "wall_seconds": 2.0}, "identical": [True, False]}
    shown = benchmark.table(
        {
            "corpus": "words",
            "text_bytes": 240_000_000,
            "documents": 1_234,
            "empty_texts": 5,
            "tokens": 60_000_000,
            "vocab_size": 50_000,
            "workers": 2,
            "cores": 2,
            "rounds": 3,
            "load_before_rounds": [0.5, 1.0, 0.7],
            "contenders": {"gpt-neox": figures},
        }
    )
    assert shown.splitlines()[0].startswith("words: 240 MB of text, 1,234 documents, 5 empty texts, ")
    assert [cell.strip() for cell in shown.splitlines()[-1].split("|")[1:-1]] == [
        "GPT-NeoX",
        "2.00 (1.50 to 6.00)",
        "10.00 (4.00 to 15.00)",
        "3.0 / 2.0",
        "300",
        "20.0 times",
        "5.0 times",
        "yes / no",
    ]
