"""What each site does in each round: whether it takes part, on how many images it trains, and from which seed it draws.

All of it follows from the settings and the sites' numbers of images; nothing is stored.
"""

import math
import re
from collections.abc import Sequence
from fractions import Fraction

from dnnlib.cli import UserError
from dnnlib.text import listed, suggestion
from torch_utils.seeding import seed_for
from training.config import FederationConfig

_ENTRY = re.compile(r"(?P<site>.+):(?P<round>[0-9]{1,9})")


def site_seed(seed: int, index: int) -> int:
    """Return the random seed of a site's training: that of site 0 is the run's, so that it alone is train.py.

    index: number of the site, in the order of --data
    """
    return seed if index == 0 else seed_for(seed, 0, index, "site")


def default_round_kimg(sizes: Sequence[int], local: str) -> float:
    """Return the length of a round, in thousands of images, in which sites pass their images about once.

    "equal": the smallest site passes all of its images, the others a part; "proportional": each site does.
    """
    return (min(sizes) if local == "equal" else sum(sizes) // len(sizes)) / 1000


class Schedule:
    """The rounds of a run, counted from 1.

    Site i is planned to see n_i images in a round, exactly:

        n_i = 1000 * round_kimg                                 local "equal"
        n_i = 1000 * round_kimg * sites * size_i / sum(sizes)   local "proportional"; the same sum over all sites

    Round r ends for it at the first whole iteration at or after r * n_i images, so that rounding does not add up. That
    counts from round 1 on for every site: one that joins in a later round starts where the others are, since the
    ramp-up of its generator's moving average must not start again.

    sizes:  number of images of each site, in the order of federation.sites
    batch:  images of an iteration

    Raises UserError if a site would not get one iteration in each round, or if --join or --leave does not fit.
    """

    def __init__(self, federation: FederationConfig, *, sizes: Sequence[int], batch: int):
        self.sites, self.rounds, self.batch = federation.sites, federation.rounds, batch
        # str, because 0.336 means 336 images, not the binary number next to it.
        self._mean_images = 1000 * Fraction(str(federation.round_kimg))
        shares = [Fraction(1)] * len(sizes)
        if federation.local == "proportional":
            shares = [Fraction(len(sizes) * size, sum(sizes)) for size in sizes]
        self._images = {site: self._mean_images * share for site, share in zip(self.sites, shares, strict=True)}
        smallest = min(shares)
        if self._mean_images * smallest < batch:
            site = self.sites[shares.index(smallest)]
            raise UserError(f"--round-kimg is {federation.round_kimg}, so site {site} would see "
                            f"{float(self._images[site]):g} images in a round; expected at least one iteration of "
                            f"--batch={batch}: try --round-kimg={math.ceil(batch / smallest) / 1000:.12g}")
        joins, leaves = (_parse_rounds(flag, entries, self.sites)
                         for flag, entries in (("--join", federation.join), ("--leave", federation.leave)))
        self._first = {site: joins.get(site, 1) for site in self.sites}
        self._last = {site: leaves.get(site, self.rounds) for site in self.sites}
        self._check_membership()

    def first_round(self, site: str) -> int:
        """Return the first round that a site takes part in."""
        return self._first[site]

    def last_round(self, site: str) -> int:
        """Return the last round that a site takes part in."""
        return min(self._last[site], self.rounds)

    def members(self, number: int) -> list[str]:
        """Return the names of the sites that take part in a round, sorted."""
        return sorted(site for site in self.sites if self._first[site] <= number <= self._last[site])

    def num_rounds(self, site: str, number: int) -> int:
        """Return how many of the first `number` rounds a site takes part in."""
        return max(min(number, self._last[site]) - self._first[site] + 1, 0)

    def start_nimg(self, site: str, number: int) -> int:
        """Return the site's image counter at the start of a round."""
        return self.end_nimg(site, number - 1)

    def end_nimg(self, site: str, number: int) -> int:
        """Return the site's image counter at the end of a round."""
        return self._whole_iterations(number * self._images[site])

    def num_images(self, site: str, number: int) -> int:
        """Return how many images a site sees in a round that it takes part in."""
        return self.end_nimg(site, number) - self.start_nimg(site, number)

    def mean_end_nimg(self, number: int) -> int:
        """Return the image counter of a site of mean size at the end of a round; 0 for round 0."""
        return self._whole_iterations(number * self._mean_images)

    def total_images(self, number: int) -> int:
        """Return how many images all sites together have seen at the end of a round."""
        return sum(self.end_nimg(site, min(number, self._last[site])) - self.start_nimg(site, first)
                   for site, first in self._first.items() if first <= number)

    def _whole_iterations(self, images: Fraction) -> int:
        return math.ceil(images / self.batch) * self.batch

    def _check_membership(self) -> None:
        for site, first in self._first.items():
            if first > self.rounds:
                raise UserError(f"--join has {site}:{first}, but --rounds is {self.rounds}; expected a round from 1 to "
                                f"{self.rounds}")
            if self._last[site] < first:
                raise UserError(f"--leave has {site}:{self._last[site]}, which is before its first round {first}; "
                                f"expected that or a later round")
        # A gap begins with the run, or after a site's last round.
        for number in sorted({1, *(last + 1 for last in self._last.values() if last < self.rounds)}):
            if not self.members(number):
                raise UserError(f"--join and --leave let no site take part in round {number} of {self.rounds}; "
                                f"expected at least one in each round")


def _parse_rounds(flag: str, entries: Sequence[str], sites: Sequence[str]) -> dict[str, int]:
    """Return {site: round} of entries NAME:ROUND."""
    found: dict[str, int] = {}
    for entry in entries:
        match = _ENTRY.fullmatch(entry)
        if match is None or int(match["round"]) < 1:
            raise UserError(f"{flag} has {entry}; expected NAME:ROUND with a round from 1 on, such as {sites[-1]}:5")
        site = match["site"]
        if site not in sites:
            raise UserError(f"{flag} names {site}, which is not a site{suggestion(site, sites)}; expected one of "
                            f"{listed(sites)}")
        if site in found:
            raise UserError(f"{flag} names {site} twice; expected each site once")
        found[site] = int(match["round"])
    return found
