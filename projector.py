"""Project real images into the latent space of a network: one image, or a set."""

import sys

from dnnlib.cli import run
from latent.command import make_command

main = make_command()

if __name__ == "__main__":
    sys.exit(run(main))
