"""The numbers of a round of decentralized training, for the log, stats.jsonl and TensorBoard of the server."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dnnlib.progress import format_seconds
from federated.exchange import SiteUpdate
from training.run_report import TickTimes, process_memory


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """The numbers of a round, beside the sites' statistics; takes the place of training.run_report.Tick."""

    number: int  # from 1
    nimg: int  # images that all sites together have seen
    times: TickTimes
    updates: Mapping[str, SiteUpdate]  # those in the mean
    refused: Mapping[str, str]  # site -> reason
    norms: Mapping[str, float]  # of the updates, also of refused ones
    cosines: Mapping[tuple[str, str], float]
    bytes_down: Mapping[str, int]
    bytes_up: Mapping[str, int]
    site_nimg: Mapping[str, int]
    epsilons: Mapping[str, float]  # spent by each site so far, with those that have left; {} without --dp

    def scalars(self) -> dict[str, float]:
        """Return the numbers under their names in statistics and TensorBoard."""
        times = self.times
        found = {
            "Progress/tick": self.number, "Progress/kimg": self.nimg / 1000, "Progress/sites": len(self.updates),
            "Progress/refused": len(self.refused), "Timing/total_sec": times.total,
            "Timing/total_hours": times.total / 3600, "Timing/sec_per_tick": times.tick,
            "Timing/sec_per_kimg": times.per_kimg, "Timing/maintenance_sec": times.maintenance,
            "Resources/cpu_mem_gb": process_memory() / 2**30}
        for name, update in self.updates.items():
            if not self.epsilons:  # it is not declared then
                found[f"Sites/{name}/Progress/augment"] = update.numbers.augment_p
            found[f"Sites/{name}/Progress/kimg"] = self.site_nimg[name] / 1000
            found[f"Sites/{name}/Timing/sec"] = update.numbers.seconds
        for kind, values in (("Update/norm", self.norms), ("Exchange/bytes_down", self.bytes_down),
                             ("Exchange/bytes_up", self.bytes_up), ("Privacy/epsilon", self.epsilons)):
            found |= {f"{kind}/{name}": value for name, value in values.items()}
        return found | {f"Update/cosine/{one}/{other}": value for (one, other), value in self.cosines.items()}

    def line(self, stats: Mapping[str, Mapping[str, float]]) -> str:
        """Return the progress line."""
        left = "-" if self.times.left is None else format_seconds(self.times.left)
        fields = [f"round {self.number:<4} kimg {self.nimg / 1000:<7.1f} time {format_seconds(self.times.total):<9} "
                  f"left {left:<9} sec/kimg {self.times.per_kimg:<7.2f}"]
        for name in sorted(self.updates):
            def mean(statistic: str, name: str = name) -> str:
                entry = stats.get(f"Sites/{name}/{statistic}")
                return "-" if entry is None else f"{entry['mean']:.3f}"
            declared = (f"epsilon {self.epsilons[name]:.4g} " if self.epsilons else
                        f"G {mean('Loss/G/loss')} D {mean('Loss/D/loss')} "
                        f"augment {self.updates[name].numbers.augment_p:.3f} ")
            fields.append(f"{name}: {declared}norm {self.norms[name]:.3g}")
        if self.cosines:
            fields.append(f"cosine {min(self.cosines.values()):.3f}")
        return "  ".join(fields)


def pool_statistics(statistics: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Return the statistics of all sites together, as those of a single run."""
    found: dict[str, dict[str, float]] = {}
    for name in sorted({name for site in statistics for name in site}):
        entries = [site[name] for site in statistics if name in site]
        number = sum(entry["num"] for entry in entries)
        mean = sum(entry["num"] * entry["mean"] for entry in entries) / number
        square = sum(entry["num"] * (entry["std"]**2 + entry["mean"]**2) for entry in entries) / number
        found[name] = {"num": number, "mean": mean, "std": math.sqrt(max(square - mean**2, 0.0))}
    return found
