"""Measure how good the images of a network, or of a set, are."""

import sys

from dnnlib.cli import run
from metrics.command import make_command

main = make_command()

if __name__ == "__main__":
    sys.exit(run(main))
