"""Read lists of whole numbers such as 0,1,5-9: seeds, and layers of styles."""

import re

from dnnlib.cli import UserError
from latent.sampling import LARGEST_SEED

MOST_SEEDS = 1_000_000

_PART = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")


def parse_ranges(flag: str, text: str, *, largest: int, what: str) -> list[range]:
    """Return what "0,1,5-9" names, in its order.

    flag:     the name of the option, for messages
    largest:  the largest number there is
    what:     one of the things that are numbered, for messages

    Raises UserError for anything else.
    """
    found = []
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise UserError(f"{flag} has {part.strip()!r}; expected numbers and ranges, such as 0,1,5-9")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"{flag} has the range {first}-{last}, which runs backwards; expected {last}-{first}")
        if last > largest:
            raise UserError(f"{flag} has {last}; the largest {what} is {largest}")
        found.append(range(first, last + 1))
    return found


def parse_seeds(flag: str, text: str) -> list[int]:
    """Return the seeds that "0,1,5-9" names, in its order. Raises UserError."""
    ranges = parse_ranges(flag, text, largest=LARGEST_SEED, what="seed")
    if (count := sum(map(len, ranges))) > MOST_SEEDS:
        raise UserError(f"{flag} names {count} seeds; expected at most {MOST_SEEDS}: for many images use --zip and "
                        "--count")
    return [seed for some in ranges for seed in some]


def parse_first_seed(flag: str, text: str) -> int:
    """Return the one seed that a labelled set starts from. Raises UserError."""
    ranges = parse_ranges(flag, text, largest=LARGEST_SEED, what="seed")
    if len(ranges) != 1 or len(ranges[0]) != 1:
        raise UserError(f"{flag} is {text}; with --zip expected the first seed alone, such as --seeds=0: --count says "
                        "how many follow")
    return ranges[0][0]
