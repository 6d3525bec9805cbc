"""The Dockerfile's steps in a clean root, and commands after them: for a machine without a container engine.

    python -m tests.cluster.clean_root FOLDER              # its steps
    python -m tests.cluster.clean_root FOLDER make test    # and a command, as its user

A root that has had the steps is used again for other commands: only files are copied anew.

As root, with debootstrap.  The base is not the image's (no CUDA, and Debian's packages in place of
Ubuntu's), so this shows that the steps fit together and that what they install is enough.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).parents[2]
# What a host has for the network: not of the image, and an engine would bring it too.
BORROWED = ("/etc/resolv.conf", "/etc/hosts")
TRUSTED = Path("/etc/ssl/certs/ca-certificates.crt")
# The mounts end with the namespace, however a step ends.
ENTER = """\
set -e
root=$1; shift
mount --make-rprivate /
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/dev/shm"
while [ "$1" != -- ]; do
  [ ! -d "$1" ] || mkdir -p "$root/$1"
  [ -d "$1" ] || { mkdir -p "$(dirname "$root/$1")"; touch "$root/$1"; }
  mount --bind "$1" "$root/$1"
  shift
done
shift
exec chroot "$root" "$@"
"""


@dataclass
class Image:
    """A root, and who and where the next step is."""

    root: Path
    binds: list[str]
    is_made: bool
    """its RUN steps are done"""
    user: str = "0"
    folder: str = "/"
    variables: dict[str, str] = field(default_factory=dict)

    def step(self, instruction: str, given: str) -> None:
        """Do what an instruction of a Dockerfile says.

        Raises:
            SystemExit: a command failed.
        """
        if instruction == "RUN":
            if not self.is_made:
                self.run(["sh", "-c", given])
        elif instruction == "USER":
            self.user = given
        elif instruction == "WORKDIR":
            self.folder = given
        elif instruction == "ENV":
            for word in shlex.split(given):
                name, _, value = word.partition("=")
                self.variables[name] = value.replace("$PATH", self._environment()["PATH"])
        elif instruction == "COPY":
            self._copy(given)
        elif instruction not in ("FROM", "CMD"):
            raise SystemExit(f"error: nobody has taught this what {instruction} is")

    def run(self, command: list[str]) -> None:
        """Execute inside, as the user and in the folder that the steps before have set."""
        print("+", shlex.join(command), flush=True)
        inside = ["setpriv", f"--reuid={self.user}", f"--regid={self.user}", "--clear-groups"]
        inside += ["sh", "-c", 'cd "$0" && exec "$@"', self.folder, *command]
        own = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
        enter = ["bash", "-c", ENTER, "enter", str(self.root), *self.binds, "--", *inside]
        done = subprocess.run([*own, *enter], env=self._environment())
        if done.returncode:
            raise SystemExit(f"error: {shlex.join(command)} ended with {done.returncode}")

    def _environment(self) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "OPENBLAS_"))}
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        home = self.folder if self.user == "0" else str(Path(self.folder).parent)
        return {**own, "PATH": path, "HOME": home, "LANG": "C.UTF-8", **self.variables}

    def _copy(self, given: str) -> None:
        """Tracked files that .dockerignore leaves, which is less than an engine would see."""
        *sources, target = [word for word in given.split() if not word.startswith("--")]
        into = self.root / Path(self.folder, target).relative_to("/")
        into.mkdir(parents=True, exist_ok=True)
        ignored = [f":(exclude){line}" for line in (REPO / ".dockerignore").read_text().split()]
        command = ["git", "ls-files", "-z", *sources, *ignored]
        listed = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
        for name in filter(None, listed.stdout.split("\0")):
            to = into / (name if sources == ["."] else Path(name).name)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / name, to)
        subprocess.run(["chown", "-R", f"{self.user}:{self.user}", into], check=True)


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Each instruction of a Dockerfile and what follows it."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for line in lines.replace("\\\n", " ").splitlines():
        if line.strip():
            instruction, given = line.split(None, 1)
            yield instruction, re.sub(r"\s+", " ", given).strip()


def main(argv: list[str]) -> int:
    """Make the root if it is not there, do the steps, run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", default="bookworm", help="of the distribution (default: bookworm)")
    parser.add_argument("--mirror", default=[], nargs=1, help="of it; by default debootstrap's")
    parser.add_argument("--bind", action="append", default=[], help="a path that is to be seen inside, too")
    parser.add_argument("folder", type=Path, help="for the root; 8 GB")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="to run then, in the project's folder")
    given = parser.parse_args(argv)
    root = given.folder.absolute()
    made = root / "made"
    if root.exists() and not made.exists():
        raise SystemExit(f"error: {root} has not had all steps; remove it, or name another")
    if not root.exists():
        subprocess.run(["debootstrap", "--variant=minbase", given.suite, root, *given.mirror], check=True)
        if TRUSTED.exists():
            (root / "usr/local/share/ca-certificates").mkdir()
            shutil.copy(TRUSTED, root / "usr/local/share/ca-certificates/host.crt")
    binds = [path for path in (*BORROWED, *given.bind) if os.path.exists(path)]
    image = Image(root, binds, made.exists())
    for instruction, what in instructions((REPO / "Dockerfile").read_text()):
        image.step(instruction, what)
    made.touch()
    if given.command:
        image.run(given.command)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
