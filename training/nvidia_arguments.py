"""Tell which constructor arguments the classes in NVIDIA's network files have, and copy them as plain values.

The names are the public interface of that repository: users give them in `--cfg` tables and files carry them. Files
whose classes or arguments are not in this table come from another project or version, and are refused by name.
"""
import math

_LONGEST_QUOTE = 80  # characters of an untrusted value in a message
_MAX_VALUES, _MAX_DEPTH = 10_000, 16  # shared references could otherwise unfold without end

_IMAGE = "img_resolution img_channels"
_CHANNELS = "channel_base channel_max num_fp16_res"
_HALF = "conv_clamp use_fp16 fp16_channels_last"
# Class -> its arguments in the order in which they can be given by position.
_POSITIONAL = {
    "Generator": f"z_dim c_dim w_dim {_IMAGE} mapping_kwargs synthesis_kwargs",
    "MappingNetwork": "z_dim c_dim w_dim num_ws num_layers embed_features layer_features activation lr_multiplier "
                      "w_avg_beta",
    "SynthesisNetwork": f"w_dim {_IMAGE} {_CHANNELS}",
    "SynthesisBlock": "in_channels out_channels w_dim resolution img_channels is_last architecture resample_filter "
                      f"{_HALF}",
    "SynthesisLayer": "in_channels out_channels w_dim resolution kernel_size up use_noise activation resample_filter "
                      "conv_clamp channels_last",
    "ToRGBLayer": "in_channels out_channels w_dim kernel_size conv_clamp channels_last",
    "Discriminator": f"c_dim {_IMAGE} architecture {_CHANNELS} conv_clamp cmap_dim block_kwargs mapping_kwargs "
                     "epilogue_kwargs",
    "DiscriminatorBlock": "in_channels tmp_channels out_channels resolution img_channels first_layer_idx architecture "
                          f"activation resample_filter {_HALF} freeze_layers",
    "DiscriminatorEpilogue": "in_channels cmap_dim resolution img_channels architecture mbstd_group_size "
                             "mbstd_num_channels activation conv_clamp",
    "MinibatchStdLayer": "group_size num_channels",
    "Conv2dLayer": "in_channels out_channels kernel_size bias activation up down resample_filter conv_clamp "
                   "channels_last trainable",
    "FullyConnectedLayer": "in_features out_features bias activation lr_multiplier bias_init",
    "AugmentPipe": "xflip rotate90 xint xint_max scale rotate aniso xfrac scale_std rotate_max aniso_std xfrac_std "
                   "brightness contrast lumaflip hue saturation brightness_std contrast_std hue_max saturation_std "
                   "imgfilter imgfilter_bands imgfilter_std noise cutout noise_std cutout_size",
}
# Class -> classes to which it hands on arguments that it does not know.
_HANDED_ON = {"SynthesisNetwork": ("SynthesisBlock", "SynthesisLayer"), "SynthesisBlock": ("SynthesisLayer",)}
# (Class, argument) -> class for which the argument's dict is meant.
_NESTED = {
    ("Generator", "mapping_kwargs"): "MappingNetwork",
    ("Generator", "synthesis_kwargs"): "SynthesisNetwork",
    ("Discriminator", "mapping_kwargs"): "MappingNetwork",
    ("Discriminator", "block_kwargs"): "DiscriminatorBlock",
    ("Discriminator", "epilogue_kwargs"): "DiscriminatorEpilogue",
}


def named_arguments(where: str, class_name: str, args: object, kwargs: object) -> dict[str, object]:
    """Return the constructor arguments of a pickled object by name, as plain values.

    where: the object's place in the file, for messages
    args:  the positional ones, a tuple; kwargs: the others, a dict
    Raises ValueError for a class or an argument, also a nested one, that is not in the table.
    """
    if class_name not in _POSITIONAL:
        raise ValueError(f"{where} is of class {quote(class_name)}, which StyleGAN2-ADA does not have")
    order = _POSITIONAL[class_name].split()
    if type(args) is not tuple or type(kwargs) is not dict or len(args) > len(order):
        raise ValueError(f"{where} ({class_name}) has malformed constructor arguments")
    by_position = dict(zip(order, args, strict=False))
    twice = [name for name in by_position if name in kwargs]
    if twice:
        raise ValueError(f"{where} ({class_name}) has the argument {twice[0]!r} by position and by name")
    arguments = to_plain(by_position | kwargs, f"{where} ({class_name})")
    _check_names(where, class_name, arguments)
    return arguments


def _check_names(where: str, class_name: str, arguments: dict[str, object]) -> None:
    accepted = {name for each in (class_name, *_HANDED_ON.get(class_name, ())) for name in _POSITIONAL[each].split()}
    for name, value in arguments.items():
        if name not in accepted:
            raise ValueError(f"{where} ({class_name}) has the constructor argument {quote(name)}, which "
                                "StyleGAN2-ADA does not have")
        nested = _NESTED.get((class_name, name))
        if nested is None:
            continue
        if type(value) is not dict:
            raise ValueError(f"{where} ({class_name}) has {name} {quote(value)}; expected a dict")
        _check_names(f"{where}.{name}", nested, value)


def to_plain(value: object, where: str) -> object:
    """Return a copy of None, bool, int, finite float, str, and lists and str-keyed dicts of them; tuples become lists.

    where: name for messages
    Raises ValueError for anything else, and when the value is nested too deep or holds too much.
    """
    num_values = 0

    def copy(value: object, depth: int) -> object:
        nonlocal num_values
        num_values += 1
        if depth > _MAX_DEPTH:
            raise ValueError(f"{where} is nested more than {_MAX_DEPTH} levels deep; no network's file is")
        if num_values > _MAX_VALUES:
            raise ValueError(f"{where} holds more than {_MAX_VALUES:,} values; no network's file does")
        if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
            return value
        if type(value) in (list, tuple):
            return [copy(item, depth + 1) for item in value]
        if type(value) is dict and all(type(key) is str for key in value):
            return {key: copy(item, depth + 1) for key, item in value.items()}
        raise ValueError(f"{where} holds {quote(value)}; expected plain values")

    return copy(value, 0)


def quote(value: object) -> str:
    """Show an untrusted value in a message: ASCII, one line, short."""
    if isinstance(value, (str, bytes)):
        value = value[:_LONGEST_QUOTE + 1]  # a value can be hundreds of megabytes
    text = ascii(value) if isinstance(value, (str, bytes, int, float, type(None))) else type(value).__name__
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}..."
