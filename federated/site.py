"""One institution ("site"): it trains on its own images, round by round, and keeps its state on its own disk.

Optimizer moments, augmentation strength, path length mean and the place in the data order stay here from round to
round; only the networks are replaced by those of the server at the start of each round. A site that is killed
continues its round from its last state; one that has finished the round makes the same update again.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.cli import StopRequest, UserError
from federated.agreement import Agreement, constants_hash, load_tensors, local_tensors, tensors_hash
from federated.exchange import STATISTICS, GlobalMessage, Refused, SiteNumbers, decode_global, encode_update
from federated.privacy import (
    SentUpdate,
    epsilon_spent,
    protect,
    save_sent_updates,
    sent_updates,
    site_secret,
)
from federated.schedule import Schedule, site_seed
from imagesets.classes import CLASS
from torch_utils.distributed import Processes
from training.config import RunSettings, TrainConfig
from training.dataset import ImageDataset, hash_content
from training.loop import EXIT_DIVERGED, EXIT_STOPPED, TrainingLoop
from training.run_folder import RunFolder, open_run
from training.state import TrainingState
from training.step import Proximal


class SiteStopped(Exception):
    """Training ended before the end of a round: the site was asked to stop, or its steps kept failing."""

    def __init__(self, exit_code: int):
        super().__init__(f"exit code {exit_code}")
        self.exit_code = exit_code  # as of training.loop


@dataclass(kw_only=True)
class _Round:
    """The round that a site trains, or has trained last."""

    number: int = 0
    base_hash: str = ""  # of the networks from the server
    start_nimg: int = 0
    is_done: bool = False
    has_failed: bool = False  # steps kept failing
    seconds: float = 0.0  # of training, by earlier processes too
    statistics: dict[str, list[float]] | None = None  # name -> number, sum, sum of squares


class SiteLoop(TrainingLoop):
    """The training loop of a site. It writes no network snapshots: its networks are those of the server, changed."""

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self.round = _Round(statistics={})
        self._began: float | None = None  # when the training of this round began in this process

    def end_tick(self) -> None:
        """Report a tick, and add its statistics to those of the round."""
        for name, entry in self.report_tick().items():
            number, mean, std = (entry[key] for key in ("num", "mean", "std"))
            moments = (number, number * mean, number * (std**2 + mean**2))
            sums = self.round.statistics.get(name, [0.0, 0.0, 0.0])
            self.round.statistics[name] = [old + new for old, new in zip(sums, moments)]
        self.count_tick()
        if self.tick == 1:  # as of any run: a state is missed from the second tick on
            self.save_state()
        self.output.begin_tick()

    def train_round(self, message: GlobalMessage, end_nimg: int) -> None:
        """Train until the site has seen `end_nimg` images, from the networks of the message unless that began already.

        Raises SiteStopped.
        """
        if self.round.has_failed:
            raise SiteStopped(EXIT_DIVERGED)
        if self.round.is_done:
            return
        self._began = time.monotonic()
        self.output.begin_tick()  # waiting for other sites is no part of a tick
        code = self.train_until(end_nimg)
        if code == EXIT_DIVERGED:  # the others may go on: a site that is killed later has to fail again
            self.round.has_failed = True
            self.save_state()
        if code is not None:
            raise SiteStopped(code)
        self.round.seconds, self._began, self.round.is_done = self._seconds(), None, True
        self.save_state()
        if self.output.state_failure is not None:  # the server must not get ahead of the newest state
            self.output.log(f"stopped after round {self.round.number}: {self.output.continuation()}")
            raise SiteStopped(EXIT_STOPPED)

    def begin_round(self, message: GlobalMessage, start_nimg: int) -> None:
        """Replace the networks by those of the message, at the place in the plan where the round starts."""
        load_tensors(self.state, {**(message.start or {}), **message.tensors})
        self.state.nimg, self.state.iteration = start_nimg, start_nimg // self.config.batch
        if self.tick_start_nimg < start_nimg and self.tick == 0:  # it joined later
            self.tick_start_nimg = start_nimg
        self.round = _Round(number=message.round, base_hash=message.base_hash, start_nimg=start_nimg, statistics={})

    def round_statistics(self) -> dict[str, dict[str, float]]:
        """Return the statistics of the round as a Collector does, those that an update may declare."""
        found = {}
        for name, (number, total, squares) in sorted(self.round.statistics.items()):
            if name in STATISTICS:
                mean = total / number
                found[name] = {"num": int(number), "mean": mean, "std": max(squares / number - mean**2, 0.0)**0.5}
        return found

    def state_dict(self) -> dict[str, Any]:
        now = self.round
        return {**super().state_dict(), "round": {
            "number": now.number, "base_hash": now.base_hash, "start_nimg": now.start_nimg, "is_done": now.is_done,
            "has_failed": now.has_failed, "seconds": self._seconds(),
            "statistics": {name: list(sums) for name, sums in now.statistics.items()}}}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        super().load_state_dict(saved)
        self.round = _Round(**saved["round"])

    def _seconds(self) -> float:
        return self.round.seconds + (0 if self._began is None else time.monotonic() - self._began)


class Site:
    """An institution in a decentralized training.

    config:    common to all sites, with `federation`
    settings:  of this machine; `data` is not read
    schedule:  of all sites
    dataset:   the site's images, with their sampling weights
    folder:    for its files
    is_new:    no round has an update of the site yet, although it may have been planned in some: it was lost in them
    max_epsilon:  send no update with which those of the site in this folder would spend more; None = no limit
    """

    def __init__(self, name: str, *, config: TrainConfig, settings: RunSettings, schedule: Schedule,
                 dataset: ImageDataset, weights: np.ndarray | None, folder: Path, device: torch.device,
                 stop: StopRequest, is_new: bool = False, max_epsilon: float | None = None):
        self.name, self.dataset, self.schedule, self.is_new = name, dataset, schedule, is_new
        self.max_epsilon = max_epsilon
        federation, classes = config.federation, dataset.label_names
        own = replace(
            config, run_name=folder.name, seed=site_seed(config.seed, federation.sites.index(name)), metrics=(),
            resume=None, resume_classes="same", resume_partial=False,  # what is resumed comes from the server
            kimg=-(-schedule.end_nimg(name, federation.rounds) // 1000),
            dataset=replace(config.dataset, name=dataset.name, max_size=dataset.num_images))
        self.run: RunFolder = open_run(folder, own, hash_content(dataset, weights), classes=classes or [])
        try:
            state = TrainingState.create(config, device)  # from the seed of all sites
            alone = Processes(rank=0, count=1, device=device)
            self.loop = SiteLoop(own, replace(settings, notes=()), dataset, weights, alone, self.run, stop, None,
                                 state=state, title=f"[{name}] ")
            self.agreement = Agreement.of(state, share=federation.share, ema=federation.ema,
                                          payload=federation.payload, classes=classes, label_kind=dataset.label_kind,
                                          privacy=federation.privacy())
            self.loop.output.clock.total_nimg = schedule.end_nimg(name, federation.rounds)
            self.loop.start()
            if federation.dp:
                self._secret = site_secret(folder, round=self.loop.round.number)
                self._sent = sent_updates(folder, round=self.loop.round.number)
                if not self._sent:
                    save_sent_updates(folder, self._sent)  # from now on it must not be missing
        except BaseException:
            self.run.release()
            raise

    def close(self) -> None:
        """Release the lock of the site's folder."""
        self.run.release()

    def train_round(self, data: bytes) -> bytes:
        """Take part in the round that a global message begins; return the update.

        Raises SiteStopped, Refused if the message does not fit this site, and UserError if the round is not the next or
        the update would spend more than `max_epsilon`.
        """
        loop, state = self.loop, self.loop.state
        message = decode_global(data, self.agreement, constants_hash=constants_hash(state))
        first, last = self.schedule.first_round(self.name), self.schedule.last_round(self.name)
        if not first <= message.round <= last:
            raise Refused(f"round {message.round} is not one of this site; expected one from {first} to {last}")
        if loop.round.number < message.round:
            self._check_state(message.round)
            loop.begin_round(message, self.schedule.start_nimg(self.name, message.round))
            if message.start is not None and constants_hash(state) != message.constants_hash:
                raise Refused("the constants that came with the message are not those that it names")
        elif (loop.round.number, loop.round.base_hash) != (message.round, message.base_hash):
            what = "again, from other networks" if message.round == loop.round.number else "now"
            raise UserError(f"{self.run.path} has trained round {loop.round.number}, and the server begins round "
                            f"{message.round} {what}; expected the round after: restore the server's newest state, or "
                            "start another run with --new")
        mu = loop.config.federation.fedprox_mu
        loop.proximal = None if mu == 0 else Proximal(mu=mu, anchors=self._anchors(message))
        loop.train_round(message, self.schedule.end_nimg(self.name, message.round))
        tensors = self._sent_tensors(message)
        update = encode_update(self.agreement, tensors, message, site=self.name, constants_hash=constants_hash(state),
                               numbers=self._numbers())
        if self.agreement.privacy is not None:
            self._count(SentUpdate(round=message.round, base_hash=message.base_hash, hash=tensors_hash(tensors)))
        return update

    def _sent_tensors(self, message: GlobalMessage) -> Mapping[str, torch.Tensor]:
        """Return the tensors after the round; with --dp clipped and with noise."""
        found, privacy = local_tensors(self.loop.state, self.agreement), self.agreement.privacy
        if privacy is None:
            return found
        return protect(found, message.tensors, clip=privacy["clip"], noise=privacy["noise"], secret=self._secret,
                       round=message.round, base_hash=message.base_hash)

    def _count(self, update: SentUpdate) -> None:
        """Write down an update that is about to leave the site; raise UserError if it would spend too much."""
        privacy, sent = self.agreement.privacy, self._sent
        if update not in sent:  # an equal one tells nothing new
            sent = [*sent, update]
        spent = epsilon_spent(privacy["noise"], len(sent), privacy["delta"])
        if self.max_epsilon is not None and spent > self.max_epsilon:
            raise UserError(f"the update of round {update.round} would be number {len(sent)} of {self.run.path} and "
                            f"spend epsilon {spent:.4g} (delta {privacy['delta']:g}) in all, but --max-epsilon is "
                            f"{self.max_epsilon:g}; expected at most that: start the site with another --max-epsilon")
        if sent is not self._sent:
            save_sent_updates(self.run.path, sent)
            self._sent = sent
        self.loop.output.log(f"round {update.round}: sends its update clipped to the norm {privacy['clip']:g}, with "
                             f"noise of standard deviation {privacy['clip'] * privacy['noise']:.4g}; epsilon "
                             f"{spent:.4g} so far (delta {privacy['delta']:g})")

    def _check_state(self, number: int) -> None:
        """Raise UserError if a round begins and the site's state is missing; warn if it is of an earlier round."""
        trained, first = self.loop.round.number, self.schedule.first_round(self.name)
        if trained == 0 and number > first and not self.is_new:
            raise UserError(f"{self.run.path} has no resumable state, but the site takes part since round {first}, and "
                            f"round {number} begins; expected {self.loop.checkpoints.newest.name}: copy it back, let "
                            f"the site leave with --leave={self.name}:{number - 1}, or start another run with --new")
        if 0 < trained < number - 1:
            self.loop.output.log(f"warning: the site's newest state is of round {trained}, and round {number} begins: "
                                 "what the rounds between changed in its optimizers and augmentation is lost")

    def _anchors(self, message: GlobalMessage) -> dict[str, list[torch.Tensor]]:
        """Return the networks of a message, parameter by parameter; networks that do not travel are not held."""
        state, found = self.loop.state, {}
        for role in ("G", "D"):
            names = [f"{role}.{name}" for name, _ in getattr(state, role).named_parameters()]
            if names and names[0] in message.tensors:
                found[role] = [message.tensors[name].to(state.device) for name in names]
        return found

    def _numbers(self) -> SiteNumbers:
        """Return what the site declares about the round that it finished."""
        loop, began = self.loop, self.loop.round.start_nimg
        num_images = loop.state.nimg - began
        planned = {"num_images": num_images, "num_iterations": num_images // loop.config.batch,
                   "seconds": loop.round.seconds}
        if self.agreement.privacy is not None:  # what depends on the images is not told
            return SiteNumbers(**planned, images_of_class=(), augment_p=0.0)
        images_of_class: tuple[int, ...] = ()
        if self.dataset.label_kind == CLASS:
            rows = loop.order.items(began, num_images) % self.dataset.num_images  # flipped copies come second
            classes = self.dataset.class_indices()[rows]
            images_of_class = tuple(np.bincount(classes, minlength=self.dataset.label_dim).tolist())
        pipe = loop.state.augment_pipe
        return SiteNumbers(**planned, images_of_class=images_of_class, statistics=loop.round_statistics(),
                           augment_p=0.0 if pipe is None else pipe.p.item())
