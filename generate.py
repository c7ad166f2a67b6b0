"""Make images with a trained network: from seeds or saved styles, as files, sheets or labeled data sets."""

import sys

from dnnlib.cli import run
from generation.command import make_command

main = make_command()

if __name__ == "__main__":
    sys.exit(run(main))
