"""Small disks that tests fill up."""

import subprocess

import pytest


def can_mount() -> bool:
    command = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


needs_mount = pytest.mark.skipif(
    not can_mount(), reason="needs a Linux that lets users mount a tmpfs in a name space of their own")
