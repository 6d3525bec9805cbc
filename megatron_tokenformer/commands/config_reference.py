"""Print what a key of a run's config or of a schedule means, its kind, bounds and default; or all keys."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_tokenformer.commands.command_line import CommandParser
from megatron_tokenformer.config.reference import own_keys, sections, tables
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.errors import UserError, run_cli
from megatron_tokenformer.progressive.schema import Schedule

EXAMPLES = """\
examples:
  python tools/config_reference.py training.recompute     # one key
  python tools/config_reference.py checkpoint             # the keys of a section
  python tools/config_reference.py > docs/configuration.md
"""
PAGE = """\
# Configuration

<!-- Written by `python tools/config_reference.py > docs/configuration.md` from the schemas: change those. -->

A run is one YAML file of sections and keys, `pretrain --config FILE`, as in `configs/`.  `base: OTHER` at
its top, or a list of files, is read first, and this one merged onto it key by key; a path there is relative
to the file that names it, all other paths to the folder that a command runs in.  On the command line
`section.key=value` changes one key, its value being YAML (`null`, `[0.9, 0.95]`).  A key that does not
exist is refused with the nearest one that does, and so are values that contradict each other.  The config
as resolved is written into the run's folder and into each checkpoint.
`tokenformer config_reference KEY` prints what this page says of a key or of a section.

"""
SCHEDULE = """\
## Schedules

`progressive --config FILE` takes another file.  A stage's config is its `base`, then `common`, then its own
`config`.  In the file `stages` is a list; on the command line NAME is a stage's name:
`stages.small.config.training.steps=100`, `common.optimizer.lr=1e-3`.

"""


def main(argv: list[str] | None = None) -> int:
    """Print the whole page, or what it says of one key or section."""
    parser = CommandParser(__doc__, EXAMPLES)
    parser.add_argument("key", nargs="?", metavar="KEY", help="only this key, or this section")
    key = parser.parse_args(argv).key
    print("\n".join(described(key)) if key else page(), end="\n" if key else "")
    return 0


def page() -> str:
    """The whole reference, a page of the documentation."""
    run, schedule = "\n".join(tables(RunConfig)), "\n".join(tables(Schedule, level=3))
    return f"{PAGE}{run}\n{SCHEDULE}{schedule}"


def described(wanted: str) -> list[str]:
    """What there is to say of a key, or of all keys of a section, a line for each.

    Raises:
        UserError: there is neither.
    """
    lines = [
        f"{key}: {told}"
        for schema in (RunConfig, Schedule)
        for key, told in every_key(schema)
        if key == wanted or key.startswith(f"{wanted}.")
    ]
    if not lines:
        raise UserError(f"there is no key and no section '{wanted}'; without one, all are printed")
    return lines


def every_key(schema: type, path: str = "") -> Iterator[tuple[str, str]]:
    """All keys of a schema and of its sections, each with kind, default and meaning."""
    for key in own_keys(schema, path):
        yield key.name, f"{key.kind}; default {key.default}; {key.meaning}".replace("`", "")
    for _, section, inner in sections(schema, path):
        yield from every_key(section, inner)


if __name__ == "__main__":
    run_cli(main)
