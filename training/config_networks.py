"""Settings of the two networks, and the arguments that their constructors take.

Paper: Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN".
"""

from dataclasses import dataclass
from typing import Any

from imagesets.resolutions import MIN_RESOLUTION, is_power_of_two
from training.config_base import Config

ARCHITECTURES = ("orig", "skip", "resnet")
HALF_DTYPES = ("float16", "bfloat16")


def _check_network(config: "GeneratorConfig | DiscriminatorConfig") -> None:
    """Check the settings that both networks have."""
    config.require_at_least(0, "c_dim", "num_fp16_res")
    config.require_at_least(1, "img_channels", "channel_base", "channel_max")
    resolution = config.img_resolution
    config.require(resolution >= MIN_RESOLUTION and is_power_of_two(resolution), "img_resolution",
                   f"a power of two >= {MIN_RESOLUTION}")
    enough_channels = f"a number >= img_resolution ({resolution}), or no channel is left"
    config.require(config.channel_base >= resolution, "channel_base", enough_channels)
    config.require(config.conv_clamp is None or config.conv_clamp > 0, "conv_clamp", "a number > 0, or none")
    config.require(config.architecture in ARCHITECTURES, "architecture", f"one of {', '.join(ARCHITECTURES)}")
    config.require(config.half_dtype in HALF_DTYPES, "half_dtype", f"one of {', '.join(HALF_DTYPES)}")


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig(Config):
    """Sizes of the generator; `init_kwargs` is what its constructor takes."""

    img_resolution: int
    img_channels: int
    c_dim: int  # length of a label vector; 0 = no labels
    z_dim: int = 512
    w_dim: int = 512
    mapping_layers: int = 8
    architecture: str = "skip"
    channel_base: int = 32768  # channels at resolution R: min(channel_base // R, channel_max)
    channel_max: int = 512
    num_fp16_res: int = 0  # the highest resolutions that run in half_dtype
    half_dtype: str = "float16"
    conv_clamp: float | None = None  # None = activations are not clamped
    fp16_channels_last: bool = False

    def check(self) -> None:
        _check_network(self)
        self.require_at_least(1, "z_dim", "w_dim", "mapping_layers")

    def init_kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments of the generator's constructor; plain JSON types."""
        synthesis = {
            "architecture": self.architecture,
            "channel_base": self.channel_base,
            "channel_max": self.channel_max,
            "num_fp16_res": self.num_fp16_res,
            "conv_clamp": self.conv_clamp,
            "half_dtype": self.half_dtype,
        }
        if self.fp16_channels_last:
            synthesis["fp16_channels_last"] = True
        return {
            "z_dim": self.z_dim,
            "c_dim": self.c_dim,
            "w_dim": self.w_dim,
            "img_resolution": self.img_resolution,
            "img_channels": self.img_channels,
            "mapping_kwargs": {"num_layers": self.mapping_layers},
            "synthesis_kwargs": synthesis,
        }


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig(Config):
    """Sizes of the discriminator; `init_kwargs` is what its constructor takes."""

    img_resolution: int
    img_channels: int
    c_dim: int  # length of a label vector; 0 = no labels
    architecture: str = "resnet"
    channel_base: int = 32768  # channels at resolution R: min(channel_base // R, channel_max)
    channel_max: int = 512
    num_fp16_res: int = 0  # the highest resolutions that run in half_dtype
    half_dtype: str = "float16"
    conv_clamp: float | None = None  # None = activations are not clamped
    mbstd_group_size: int = 4  # images over which the minibatch standard deviation is taken
    freeze_layers: int | None = None  # convolutions next to the image that do not learn; None = all learn
    fp16_channels_last: bool = False

    def check(self) -> None:
        _check_network(self)
        self.require_at_least(1, "mbstd_group_size")
        self.require(self.freeze_layers is None or self.freeze_layers >= 0, "freeze_layers", "a number >= 0, or none")

    def init_kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments of the discriminator's constructor; plain JSON types."""
        block: dict[str, Any] = {}
        if self.freeze_layers is not None:
            block["freeze_layers"] = self.freeze_layers
        if self.fp16_channels_last:
            block["fp16_channels_last"] = True
        return {
            "c_dim": self.c_dim,
            "img_resolution": self.img_resolution,
            "img_channels": self.img_channels,
            "architecture": self.architecture,
            "channel_base": self.channel_base,
            "channel_max": self.channel_max,
            "num_fp16_res": self.num_fp16_res,
            "conv_clamp": self.conv_clamp,
            "half_dtype": self.half_dtype,
            "block_kwargs": block,
            "mapping_kwargs": {},
            "epilogue_kwargs": {"mbstd_group_size": self.mbstd_group_size},
        }
