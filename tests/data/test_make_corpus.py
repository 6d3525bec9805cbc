"""The demo corpus is made once, splits by module, and reads back through our own readers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_tokenformer.data.readers import read_texts

SCRIPT = Path(__file__).resolve().parents[2] / "examples/demo/make_corpus.py"


@pytest.fixture(scope="module")
def make_corpus() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_corpus", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small stand-in for the standard library: 60 modules, and files that must not be taken."""
    root = tmp_path / "library"
    for name in ("test/t.py", "site-packages/p.py", "sub/__pycache__/c.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("unwanted = True\n")
    for number in range(60):
        (root / f"sub/m{number}.py").write_text(f'"""Module {number}."""\n\ndef f():\n    """Inner."""\n')
    (root / "latin.py").write_bytes(b"# caf\xe9\n")
    (root / "plain.py").write_text("x = 1\n")
    return root


def test_corpus(
    make_corpus: ModuleType,
    library: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "corpus"
    monkeypatch.setattr(make_corpus.sysconfig, "get_path", lambda name: str(library))
    monkeypatch.setattr(sys, "argv", ["make_corpus.py", "--output", str(output)])
    make_corpus.main()
    assert "121 documents" in capsys.readouterr().out
    assert sorted(path.name for path in output.iterdir()) == sorted(make_corpus.OUTPUTS)

    texts = {name: list(read_texts([str(output / name)])) for name in make_corpus.OUTPUTS}
    everything = [text for held in texts.values() for text in held]
    assert len(everything) == 121
    assert "unwanted" not in "".join(everything)
    assert "Module 7.\n\nInner." in everything
    for held in texts.values():
        sources = sum(text.startswith('"""Module') for text in held)
        assert sources == sum(text.startswith("Module") for text in held)
    assert all(texts.values())

    first = [(output / name).read_bytes() for name in make_corpus.OUTPUTS]
    make_corpus.main()
    assert "there already" in capsys.readouterr().out
    (output / make_corpus.OUTPUTS[0]).unlink()
    make_corpus.main()
    assert [(output / name).read_bytes() for name in make_corpus.OUTPUTS] == first
