"""The quality metrics that --metrics may name."""

from collections.abc import Collection

from training.config import ConfigError

# As in Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data".
METRIC_NAMES = (
    "fid50k_full", "kid50k_full", "pr50k3_full",  # against all real images
    "fid50k", "kid50k", "pr50k3",  # against 50,000 real images
    "is50k", "ppl2_wend", "ppl_zfull", "ppl_wfull", "ppl_zend", "ppl_wend",
)  # fmt: skip
DEFAULT_METRIC = "fid50k_full"


def choose_metrics(text: str | None, available: Collection[str]) -> tuple[tuple[str, ...], str | None]:
    """Return the metrics of a run, and a line for the user where it is not what is usual.

    text:       of --metrics: names separated by commas, or "none"; None where it was not given
    available:  metrics that can be computed here
    Raises ConfigError for unknown names and for metrics that cannot be computed.
    """
    if text is None:
        if DEFAULT_METRIC in available:
            return (DEFAULT_METRIC,), None
        return (), f"metrics: none, since {DEFAULT_METRIC} cannot be computed here (--metrics=none omits this line)"
    if text.strip().lower() == "none":
        return (), None
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in METRIC_NAMES:
            raise ConfigError(f"--metrics names {name!r}; expected none, or some of {', '.join(METRIC_NAMES)}")
        if name not in available:
            can = f"some of {', '.join(available)}" if available else "none: leave it out"
            raise ConfigError(f"--metrics names {name}, which cannot be computed yet; expected {can}")
    return names, None
