"""Small inputs for preprocessing, its command line, and what it leaves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import orjson

from megatron_tokenformer.data.encode import Job

ROOT = Path(__file__).resolve().parents[2]
BYTES = Job("ByteTokenizer", None, append_eod=True)


def json_lines(texts: list[str], **others: object) -> bytes:
    """The texts as lines of JSON, each with the other keys as well."""
    return b"".join(orjson.dumps({"text": text, **others}) + b"\n" for text in texts)


def output_bytes(prefix: Path | str) -> tuple[bytes, ...]:
    """The `.bin` and the `.idx` of `PREFIX_text_document`."""
    return tuple(Path(f"{prefix}_text_document{suffix}").read_bytes() for suffix in (".bin", ".idx"))


def names(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def run_tool(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run tools/preprocess_data.py."""
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)
