"""Run train.py with networks of 4 channels, so that whole runs are small: `python -m tests.helpers.narrow_train FLAGS`.

--cfg=stylegan2 means the preset `narrow_preset` here; all else is train.py.
"""

import sys
from dataclasses import replace

import train
from dnnlib.cli import run
from training.presets import FIXED_PRESETS, Preset, choose_preset

NAME = "stylegan2"


def narrow_preset() -> Preset:
    """Return the preset `tiny` with 4 channels in each layer and latents of 8 numbers."""
    return replace(choose_preset("tiny", 8, 1), channel_base=32, channel_max=4, latent_dim=8)


if __name__ == "__main__":
    FIXED_PRESETS[NAME] = narrow_preset()
    sys.exit(run(train.main))
