"""Which image sizes there are: the networks take squares with a power of two a side, within these limits."""

# A discriminator has a block with an RGB input from 8 on; at 4096 --cfg=auto would pass one image at a time.
MIN_RESOLUTION, MAX_RESOLUTION = 8, 2048
RESOLUTIONS = f"a power of two from {MIN_RESOLUTION} to {MAX_RESOLUTION}"  # for messages


def is_power_of_two(number: int) -> bool:
    """Tell whether a whole number is 1, 2, 4, 8, ..."""
    return number >= 1 and number & (number - 1) == 0


def is_resolution(side: int) -> bool:
    """Tell whether networks can be trained on images of this many pixels a side."""
    return is_power_of_two(side) and MIN_RESOLUTION <= side <= MAX_RESOLUTION


def nearest_resolution(side: int, largest: int = MAX_RESOLUTION) -> int:
    """Return the resolution, up to `largest`, that is nearest."""
    powers = [1 << exponent for exponent in range(MIN_RESOLUTION.bit_length() - 1, largest.bit_length())]
    return min(powers, key=lambda power: abs(power - side))
