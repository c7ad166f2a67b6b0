"""Read what --parts, --institutions, --sizes and --skew ask for."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from dnnlib.cli import UserError
from dnnlib.disk_failures import retrying

PARTS_SYNTAX = "NAME:SHARE,NAME:SHARE,... such as train:0.8,val:0.1,test:0.1"
SKEW_SYNTAX = "CLASS=SHARE,SHARE,...;CLASS=... with a share, or *, for each institution, such as melanoma=0.3,0.05,*"
REST = None  # stands for * in a skew

_PART_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part to make and its share of the images, exact, above 0."""

    name: str
    share: Fraction


@dataclass(frozen=True, kw_only=True)
class SplitRequest:
    """What to divide a data set into.

    parts:         names and shares, which sum to 1; empty to divide the whole set among institutions
    institutions:  names and shares within the first part, or of the whole set; may be empty
    skew:          class name -> share of the images of each institution that are of this class, REST for what is left
    allow_missing: parts may lack a class that has fewer groups than there are parts
    leave_out:     images for which the skew leaves no place go into no part
    """

    parts: tuple[Part, ...] = ()
    institutions: tuple[Part, ...] = ()
    skew: dict[str, tuple[Fraction | None, ...]] | None = None
    seed: int = 0
    allow_missing: bool = False
    leave_out: bool = False

    def __post_init__(self):
        counts = Counter(part.name for part in self.final_parts)
        for name, count in counts.items():
            if count > 1:
                raise UserError(f"--parts names {name}, which --institutions makes, too; choose another name")

    @property
    def final_parts(self) -> tuple[Part, ...]:
        """The parts that become files, with their shares of the whole set."""
        if not self.institutions:
            return self.parts
        whole = self.parts[0].share if self.parts else Fraction(1)
        return (*(Part(name=part.name, share=part.share * whole) for part in self.institutions), *self.parts[1:])


def create_request(*, parts: str | None, institutions: int | None, sizes: str | None, skew: str | None, seed: int,
                   allow_missing: bool, leave_out: bool) -> SplitRequest:
    """Return the request that options make. Raises UserError for a wrong text or options that do not go together."""
    if parts is None and institutions is None:
        raise UserError(f"neither --parts nor --institutions is given; expected --parts={PARTS_SYNTAX}, "
                        "or --institutions=3")
    for option, value in (("--sizes", sizes), ("--skew", skew)):
        if value is not None and institutions is None:
            raise UserError(f"{option} is given without --institutions; add --institutions=3, say")
    if leave_out and skew is None:
        raise UserError("--leave-out is given without --skew; only a skew may leave images out")
    return SplitRequest(
        parts=() if parts is None else parse_parts(parts),
        institutions=() if institutions is None else name_institutions(institutions, sizes),
        skew=None if skew is None else parse_skew(read_skew(skew), institutions),
        seed=seed, allow_missing=allow_missing, leave_out=leave_out)


def parse_parts(text: str) -> tuple[Part, ...]:
    """Return the parts of "train:0.8,val:0.1,test:0.1"; shares may also be fractions, as 1/3."""
    parts: list[Part] = []
    for item in text.split(","):
        name, colon, share = (piece.strip() for piece in item.partition(":"))
        if not colon or not _PART_NAME.fullmatch(name):
            raise UserError(f"--parts={text}: {item.strip()!r} is not NAME:SHARE; expected {PARTS_SYNTAX}")
        # Names become file names, which some systems compare without regard to case.
        if name.lower() in [part.name.lower() for part in parts]:
            raise UserError(f"--parts={text} names {name} twice; expected each name once")
        parts.append(Part(name=name, share=_parse_share(f"--parts={text}", share)))
    _check_sum(f"--parts={text}", [part.share for part in parts])
    return tuple(parts)


def name_institutions(count: int, sizes: str | None) -> tuple[Part, ...]:
    """Return institution1, institution2, ... of the given sizes, "0.06,0.33,0.61", or of equal ones."""
    if sizes is None:
        shares = [Fraction(1, count)] * count
    else:
        shares = [_parse_share(f"--sizes={sizes}", share.strip()) for share in sizes.split(",")]
        if len(shares) != count:
            raise UserError(f"--sizes={sizes} has {len(shares)} numbers; expected {count}, one for each of "
                            f"--institutions={count}")
        _check_sum(f"--sizes={sizes}", shares)
    return tuple(Part(name=f"institution{index}", share=share) for index, share in enumerate(shares, start=1))


def read_skew(text: str) -> str:
    """Return the skew itself: the text, or the content of the file it names, a class a line, # for comments."""
    if "=" in text:
        return text
    try:
        lines = retrying(lambda: Path(text).read_text(encoding="utf-8"), text).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--skew={text} is neither a readable file nor a skew; expected {SKEW_SYNTAX}") from error
    lines = [line.split("#")[0].strip() for line in lines]
    return ";".join(line for line in lines if line)


def parse_skew(text: str, institutions: int) -> dict[str, tuple[Fraction | None, ...]]:
    """Return the shares by class of "melanoma=0.3,0.05,*;nv=...", REST for *."""
    skew: dict[str, tuple[Fraction | None, ...]] = {}
    for item in text.split(";"):
        name, equals, values = (piece.strip() for piece in item.rpartition("="))
        if not equals or not name or not values:
            raise UserError(f"--skew: {item.strip()!r} is not understood; expected {SKEW_SYNTAX}")
        if name in skew:
            raise UserError(f"--skew names {name} twice; expected each class once")
        texts = [value.strip() for value in values.split(",")]
        if len(texts) != institutions:
            raise UserError(f"--skew: {name} has {len(texts)} shares; expected {institutions}, one for each of "
                            f"--institutions={institutions}")
        if texts.count("*") > 1:
            raise UserError(f"--skew: {name} has {texts.count('*')} shares *; expected at most one")
        skew[name] = tuple(REST if value == "*" else _parse_share(f"--skew: {name}", value, zero=True)
                           for value in texts)
    return skew


def _parse_share(what: str, text: str, *, zero: bool = False) -> Fraction:
    try:
        # As a fraction, so that sums are exact: in binary, 0.7 + 0.2 + 0.1 is not 1.
        share = Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"{what}: the share {text!r} is not a number; expected one such as 0.8 or 1/3") from error
    if share < 0 or share > 1 or (share == 0 and not zero):
        lowest = "from 0" if zero else "above 0"
        raise UserError(f"{what}: the share {text} is out of range; expected a number {lowest} and up to 1")
    return share


def _check_sum(what: str, shares: Sequence[Fraction]) -> None:
    if sum(shares) != 1:
        raise UserError(f"{what}: the shares sum to {float(sum(shares)):.6g}; expected 1")
