"""What the tests on pretend hosts need of this machine; as a program, one sentence about what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

PACKAGES = {
    "ip": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "munged": "munge",
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "shellcheck": "shellcheck",
}


def missing() -> str | None:
    """Why the tests cannot run here, and what to do; None if they can."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    absent = sorted({package for name, package in PACKAGES.items() if shutil.which(name, path=path) is None})
    if absent:
        return (
            f"the cluster tests need the Debian packages {', '.join(absent)}: "
            f"apt-get install --no-install-recommends {' '.join(absent)}"
        )
    if subprocess.run(
        ["unshare", "--net", "--pid", "--mount", "--fork", "true"], capture_output=True
    ).returncode:
        return "the cluster tests make namespaces, which needs root (in a container: docker run --privileged)"
    return None


if __name__ == "__main__":
    reason = missing()
    sys.exit(f"error: {reason}" if reason else 0)
