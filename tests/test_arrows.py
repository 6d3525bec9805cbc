"""Which room imports which: the table in docs/architecture.md, and nothing besides."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
PACKAGE = REPO / "megatron_tokenformer"
ROOMS = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def imports(path: Path) -> Iterator[str]:
    """What a module imports of the rooms, anywhere in it, as `room/module/name`; not what only types need."""
    found: list[ast.AST] = [ast.parse(path.read_text())]
    while found:
        node = found.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            found += node.orelse
            continue
        found += ast.iter_child_nodes(node)
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = path.relative_to(REPO).parts[: -node.level] if node.level else ()
            module = ".".join((*here, node.module) if node.module else here)
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, inside = name.partition(".")
            if package == PACKAGE.name and inside.split(".")[0] in ROOMS:
                yield inside.replace(".", "/")


def table() -> dict[str, set[str] | None]:
    """Of each room on the page, what it imports; None: everything."""
    rows = re.findall(r"^\| `(\w+)/` \|.*\| ([^|]*) \|$", (REPO / "docs/architecture.md").read_text(), re.M)
    return {
        room: None if cell.startswith("everything") else set(re.findall(r"`([\w/]+)`", cell))
        for room, cell in rows
    }


def test_the_table_has_every_room() -> None:
    assert len(ROOMS) > 8 and table().keys() == ROOMS


def test_a_room_imports_what_the_table_says_and_all_that_it_says() -> None:
    for room, arrows in table().items():
        if arrows is None:
            continue
        unused = set(arrows)
        for path in sorted((PACKAGE / room).rglob("*.py")):
            for name in imports(path):
                arrow = next((each for each in arrows if f"{name}/".startswith(f"{each}/")), None)
                assert arrow or name.startswith(f"{room}/"), f"{path} imports {name}"
                unused.discard(arrow or "")
        assert not unused, f"{room} imports none of these"


def test_arrows_do_not_go_round() -> None:
    placed: set[str] = set()
    for room, arrows in table().items():
        assert {arrow.split("/")[0] for arrow in arrows or ()} <= placed, f"{room} looks down the table"
        placed.add(room)


def test_what_all_rooms_use_imports_none_of_them() -> None:
    shared = [path for path in PACKAGE.glob("*.py") if path.name != "__main__.py"]
    assert {"errors.py", "durable.py", "metrics_file.py"} <= {path.name for path in shared}
    assert {path.name: [*imports(path)] for path in shared if [*imports(path)]} == {}
