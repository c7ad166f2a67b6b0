"""Test what synthetic images are worth: protocols without leaks, classifiers, their predictions."""

import sys

from analysis.command import make_group
from dnnlib.cli import run

main = make_group()

if __name__ == "__main__":
    sys.exit(run(main))
