"""Find the latents of real images: one, or those of a set."""

import sys

from dnnlib.cli import run
from latent.command import make_command

main = make_command()

if __name__ == "__main__":
    sys.exit(run(main))
