"""The pages of the documentation, and what they name."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
PYTHON = re.compile(r"^```python\n.*?^```", re.MULTILINE | re.DOTALL)
FOREIGN_COLUMN = re.compile(r"^\| [^|]*\|", re.MULTILINE)


def ours(page: Path) -> str:
    """The text of a page without Python, which has names of its own, and without other projects' names.

    Those are the first column of the tables that translate them.
    """
    text = PYTHON.sub("", page.read_text(encoding="utf-8").replace("\\\n", " "))
    return FOREIGN_COLUMN.sub("|", text) if page.name == "coming-from.md" else text


def code_blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "docs" / page).read_text("utf-8"), re.S | re.M)
