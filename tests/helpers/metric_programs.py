"""Programs on metrics that tests run as several processes.

`python -m tests.helpers.metric_programs NAME+NAME FOLDER`
"""

import itertools
import sys
from pathlib import Path

import torch

from dnnlib.cli import StopRequest
from metrics import evaluation, features
from metrics.evaluation import Evaluator
from metrics.features import compute_rows, from_main, on_main, on_main_for_long, together
from metrics.image_sources import SetImages
from tests.helpers.metric_networks import MeanDetector, SquareDistance
from tests.helpers.small_networks import small_generator
from torch_utils.distributed import OtherProcessFailed, Processes, gather_rows, join
from training.run_folder import RunFolder
from training.run_report import Reporter
from training.snapshot_metrics import SnapshotMetrics


def evaluate(processes: Processes, folder: Path) -> dict:
    """Measure all kinds of metrics, with batches that divide evenly among processes and with others."""
    evaluation.open_detector = lambda name, *, device, weights: MeanDetector(name)
    evaluation.open_similarity = lambda name, *, device, weights: SquareDistance()
    found = {}
    for count, batch in ((70, 8), (12, 32)):
        names = f"fid{count}_full,kid{count},pr{count}_full,pr_full,is{count},ppl{count}_zfull"
        evaluator = Evaluator(names, data=folder / "data.zip", mirror=True, batch=batch, use_cache=False)
        results = evaluator.evaluate(small_generator(resolution=32))
        found[count] = {name: record["results"] for name, record in results.items()}
    return found


def assess(processes: Processes, folder: Path) -> dict:
    """Measure classes with intervals and a floor, of a network and of a set whose classes need further images."""
    evaluation.open_detector = lambda name, *, device, weights: MeanDetector(name)
    settings = {"data": folder / "data.zip", "holdout": folder / "held.zip", "ci": 0.9, "per_class": True, "batch": 4,
                "mirror": True, "use_cache": False}
    evaluator = Evaluator("fid12_full,kid8,pr12_full,dc12_full,auth12_full,div12_full,is12", **settings)
    found = {"network": evaluator.evaluate(small_generator(resolution=32)),
             "set": evaluator.evaluate_images(SetImages(folder / "fake.zip"))}
    return {kind: {name: {field: record.get(field) for field in ("results", "ci", "floor", "per_class", "worst_class")}
                   for name, record in results.items()} for kind, results in found.items()}


def give_up(processes: Processes, folder: Path) -> dict:
    """Give metrics up: after the second batch of fakes where one process asks, and while the main one compares."""
    failures = []
    # pr: five rounds of fakes, two of reals; with classes, of 11 images each, two rounds more of fakes
    for name, rank, most, per_class in (("fid70_full", 1, 2, False), ("pr70_full", 0, 8, False),
                                        ("pr70_full", 1, 6, True)):
        evaluator = Evaluator(name, data=folder / "data.zip", batch=8, use_cache=False, per_class=per_class)
        asked = itertools.count(1)
        try:
            evaluator.evaluate(small_generator(resolution=32), stop=lambda rank=rank, most=most, asked=asked: (
                next(asked) >= most and processes.rank == rank))
        except (evaluation.Stopped, OtherProcessFailed) as error:
            failures.append((type(error).__name__, next(asked) - 1))
    return {"failures": failures, "after": evaluator.evaluate(small_generator(resolution=32)).keys() == {"pr70_full"}}


def leave_out(processes: Processes, folder: Path) -> dict:
    """Leave metrics out, of a network file that the main process could not write, and of one that is there."""
    missing, is_main = [], processes.rank == 0
    with StopRequest(max_hours=1e-9) as stop:
        for failure in ("No space left on device", None):
            metrics = SnapshotMetrics(("kid20",), lambda G, *, stop: {}, run=RunFolder(folder), processes=processes,
                                      reporter=Reporter(folder, is_main=is_main, tensorboard=False), stop=stop,
                                      continuation=lambda: "the same command continues")
            metrics.expect(3, 800)
            metrics.compute(torch.nn.Identity(), None, failure if is_main else None)
            missing.append(metrics.state_dict()["networks"])
    return {"missing": missing}


def exchange(processes: Processes, folder: Path) -> dict:
    """Gather rows, and let work fail here and there."""
    rank = processes.rank
    rows = torch.arange(6.0).reshape(3, 2)[:2 * rank] + 100 * rank
    failures = []
    features._BEAT_SECONDS = 0  # each call of beat is a sign of life
    for call in (lambda: together(lambda: 1 // (1 - rank)), lambda: on_main(lambda: 1 // rank),
                 lambda: on_main_for_long(lambda beat: (beat(), 1 // rank)),
                 lambda: compute_rows(8, 2, [(8, 1)], lambda rows: [torch.zeros(len(rows), 1 // (2 - rows.start))])):
        try:
            call()
        except (ZeroDivisionError, RuntimeError) as error:
            failures.append(f"{type(error).__name__}: {error}")
    return {"rows": gather_rows(rows), "none": gather_rows(torch.zeros(0, 3, dtype=torch.uint8)), "failures": failures,
            "main": on_main(lambda: "here"), "from_main": from_main(lambda: ["rank", rank]),
            "long": on_main_for_long(lambda beat: [beat() for _ in range(3)]),
            "blocks": compute_rows(5, 2, [(5, 1), (3, 2)], lambda rows: [
                torch.tensor(rows)[:, None].float(), torch.tensor(rows).float()[:max(3 - rows.start, 0), None].repeat(
                    1, 2)])}


def main() -> None:
    torch.set_num_threads(2)
    names, folder = sys.argv[1].split("+"), Path(sys.argv[2])
    with join("cpu") as processes:
        for name in names:
            torch.save(globals()[name](processes, folder), folder / f"{name}-{processes.rank}.pt")


if __name__ == "__main__":
    main()
