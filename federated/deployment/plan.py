"""From the flags of `federate.py start` and what sites declare about their images to the settings that all share.

Before the first round each site declares facts about its images: numbers, hashes, and class names, which all sites
have to share. The server resolves the flags with them, exactly as `federate.py simulate` does with the data sets
themselves, and sends the result to the sites as a plan. Each side checks what it gets from the other.
"""

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from dnnlib.cli import UserError
from dnnlib.text import listed, plural
from federated.command import FLAGS
from federated.deployment.job import ServerSettings, StartRequest
from federated.exchange import HASH, LARGEST_COUNT, PROTOCOL_VERSION
from federated.institutions import (
    check_alike,
    check_reference,
    notes_on_rounds,
    parse_federation,
    plan_rounds,
    train_flags,
)
from federated.privacy import SentUpdate, epsilon_spent
from federated.schedule import Schedule
from federated.server import SiteFacts
from imagesets.classes import CLASS, LABELS, VECTOR
from imagesets.reader import Shape
from torch_utils.device import choose_precision
from torch_utils.distributed import Place
from training.command import (
    ChooseMetrics,
    check_comparable,
    check_per_class,
    check_resume_weights,
    describe_empty_classes,
    parse_flags,
)
from training.config import NAME, DatasetFacts, FederationConfig, RunSettings, TrainConfig
from training.dataset import UNKNOWN_DATA, ImageDataset, hash_content
from training.sampling import image_weights

BALANCES = ("none", "classes")  # a file of weights is on one machine
FACTS_LIMIT = 2**20  # bytes of declared facts
_CLASS_NAME = 200  # characters at most
_MOST_IMAGES = 10**8  # the server holds a number for each
_MOST_PIXELS, _MOST_CHANNELS = 2**16, 4
MAX_DELTA = FederationConfig.dp_delta  # of runs that `site --max-epsilon` accepts: a larger one makes epsilon small
_HISTORY = 64  # entries of training_data["generated_from"] at most


class Unsuitable(ValueError):
    """Facts or a plan that must not be used; the text is one line with the reason."""


@dataclass(frozen=True, kw_only=True)
class DeclaredFacts:
    """What a site declares about its images before the first round. It holds no text but hashes and class names."""

    protocol: int  # PROTOCOL_VERSION of the site's program
    device: str  # "cpu" or "cuda", which decides about --precision=auto
    resolution: int
    channels: int
    num_images: int
    label_dim: int  # of labels in use; 0 without
    label_kind: str | None
    classes: tuple[str, ...] | None  # names
    class_counts: tuple[int, ...]  # () without classes
    content_hash: str  # of images, labels and weights, as training.dataset.hash_content
    training_data: Mapping[str, Any]  # as ImageDataset.training_data; of its histories only hashes and numbers
    is_phantom: bool

    @classmethod
    def of(cls, dataset: ImageDataset, *, balance: str, device: str) -> "DeclaredFacts":
        """Declare a data set, opened with the labels and mirroring of the run."""
        facts = SiteFacts.of(dataset)
        return cls(protocol=PROTOCOL_VERSION, device=device.partition(":")[0], resolution=dataset.resolution,
                   channels=dataset.num_channels, num_images=dataset.num_images,
                   label_dim=dataset.label_dim if dataset.use_labels else 0,
                   label_kind=dataset.label_kind,
                   classes=None if dataset.label_names is None else tuple(dataset.label_names),
                   class_counts=facts.class_counts,
                   content_hash=hash_content(dataset, image_weights(balance, dataset)),
                   training_data=_numbers_of(facts.training_data), is_phantom=facts.is_phantom)

    def to_bytes(self) -> bytes:
        """Return the facts as they travel."""
        return json.dumps(asdict(self), separators=(",", ":"), sort_keys=True, allow_nan=False).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "DeclaredFacts":
        """Read facts; raises Unsuitable unless they hold exactly what `to_bytes` writes, with values of these kinds."""
        if not isinstance(data, bytes):  # whatever a site sent
            raise Unsuitable("the declared facts cannot be read")
        if len(data) > FACTS_LIMIT:
            raise Unsuitable(f"the declared facts have {len(data)} bytes; expected at most {FACTS_LIMIT}")
        try:
            found = json.loads(data)
            if not isinstance(found, dict) or set(found) != {field.name for field in fields(cls)}:
                raise Unsuitable("the declared facts are not those of this version; use the same version of this "
                                 "project everywhere")
            _check_facts(found)
            facts = cls(**{**found, "classes": None if found["classes"] is None else tuple(found["classes"]),
                           "class_counts": tuple(found["class_counts"])})
            if facts.to_bytes() != data:
                raise Unsuitable("the declared facts are written in another way")
        except Unsuitable:
            raise
        except (ValueError, TypeError, RecursionError) as error:  # no JSON, or numbers of thousands of digits
            raise Unsuitable("the declared facts cannot be read") from error
        return facts

    # As an ImageDataset of the run would have it, for the checks of training.command and `check_alike`.

    @property
    def image_shape(self) -> Shape:
        return self.channels, self.resolution, self.resolution

    @property
    def use_labels(self) -> bool:
        return self.label_dim > 0

    @property
    def label_names(self) -> list[str] | None:
        return None if self.classes is None else list(self.classes)

    def to_dataset_facts(self) -> DatasetFacts:
        """Return what `training.options.resolve` needs to know."""
        return DatasetFacts(name="sites", resolution=self.resolution, channels=self.channels,
                            num_images=self.num_images, c_dim=self.label_dim)

    @property
    def site_facts(self) -> SiteFacts:
        """The facts as the server takes them."""
        return SiteFacts(num_images=self.num_images, class_counts=self.class_counts, training_data=self.training_data,
                         is_phantom=self.is_phantom)


@dataclass(frozen=True, kw_only=True)
class DeclaredSite:
    """A site by its facts, in the place of federated.institutions.Institution."""

    name: str
    dataset: DeclaredFacts

    @property
    def label(self) -> str:
        return f"the data set of site {self.name}"


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedRun:
    """A run that the server can start."""

    config: TrainConfig
    settings: RunSettings  # of the server
    schedule: Schedule
    facts: Mapping[str, DeclaredFacts]  # by site
    holdout: str | None
    valid: str | None

    @property
    def first(self) -> DeclaredFacts:
        return self.facts[self.schedule.sites[0]]

    @property
    def content_hash(self) -> str:
        """SHA-256 of what the sites of the first round train on, as that of a PreparedFederation."""
        parts = sorted((name, self.facts[name].content_hash) for name in self.schedule.members(1))
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def default_flags() -> dict[str, Any]:
    """Return the value of each flag of `federate.py simulate` that is not given."""
    return click.Command("simulate", params=list(FLAGS)).make_context("simulate", []).params


def project_version() -> str:
    """Return the version of this project."""
    file = Path(__file__).parents[2] / "pyproject.toml"  # an installed package is not needed
    return tomllib.loads(file.read_text(encoding="utf-8"))["project"]["version"]


def questions(request: StartRequest) -> dict[str, Any]:
    """Return what sites need to know before they can declare their facts."""
    flags = {**default_flags(), **request.flags}
    return {"protocol": PROTOCOL_VERSION, "version": project_version(), "cond": flags["cond"] is True,
            "mirror": flags["mirror"] is True, "balance": flags["balance"]}


def answer_questions(text: str, path: str, *, device: str) -> DeclaredFacts:
    """Return the facts of a site's data set; raises UserError, which may name the path and stays at the site."""
    asked = json.loads(text)
    if asked.get("protocol") != PROTOCOL_VERSION:
        raise UserError(f"the server's protocol version is {asked.get('protocol')!r} and this site's "
                        f"{PROTOCOL_VERSION}; expected the same: use the same version of this project everywhere")
    if asked.get("version") != project_version():
        raise UserError(f"the server runs version {asked.get('version')!r} of this project and this site "
                        f"{project_version()!r}; expected the same version everywhere: install it")
    if asked["balance"] not in BALANCES:
        raise UserError(f"--balance is {asked['balance']!r}; expected one of {listed(BALANCES)}")
    dataset = ImageDataset(path, use_labels=bool(asked["cond"]), xflip=bool(asked["mirror"]))
    for name in dataset.label_names or []:
        if not _is_class_name(name):
            raise UserError(f"{dataset.path} has a class {name!r}; expected names of at most {_CLASS_NAME} printable "
                            "characters, since they are sent to the server: convert the data set with dataset_tool.py "
                            "and other --classes")
    return DeclaredFacts.of(dataset, balance=asked["balance"], device=device)


def plan_run(request: StartRequest, settings: ServerSettings, facts: Mapping[str, DeclaredFacts],
             choose_metrics: ChooseMetrics) -> PlannedRun:
    """Resolve the flags of a run at the server, as `federated.institutions.prepare_federation` does on one machine.

    facts:  of all sites

    Raises UserError (ConfigError among them) if the run cannot work.
    """
    names = settings.sites
    flags = {**default_flags(), **request.flags, "name": request.name, "outdir": settings.outdir,
             "device": settings.device, "holdout": settings.holdout, "valid": settings.valid,
             "detector_weights": settings.detector_weights, "share_statistics": False, "gpus": 1}
    declared = [DeclaredSite(name=name, dataset=facts[name]) for name in names]
    for index, each in enumerate(declared):
        if each.dataset.label_kind == VECTOR:
            raise UserError(f"{each.label} has {LABELS[VECTOR]}; expected {LABELS[CLASS]}, since decentralized "
                            "training takes classes: leave --cond out")
        check_alike(declared[0], each, flag="")
        for other in declared[:index]:
            if each.dataset.training_data["pixels_sha256"] == other.dataset.training_data["pixels_sha256"]:
                raise UserError(f"{each.label} has the same images as {other.label}; expected each image at one "
                                "institution")
    chooses_precision = flags["precision"] not in (None, "auto") or flags["fp32"] is not None
    if not chooses_precision:
        slowest = "cuda" if all(each.dataset.device == "cuda" for each in declared) else "cpu"
        flags["precision"] = choose_precision("auto", slowest).name
    federation = parse_federation(flags, names)
    if flags["holdout"] is None or (flags["metrics"] or "").strip().lower() == "none":
        flags |= {"holdout": None, "detector_weights": ()}  # which the server offers, and this run does not use
    check_reference(flags, "a server that was started with --holdout")
    parsed = parse_flags(train_flags(flags, names), choose_metrics, Place(), 1)
    sizes = [facts[name].num_images for name in names]
    config = parsed.resolve(replace(facts[names[0]].to_dataset_facts(), num_images=sum(sizes)))
    check_per_class(parsed.settings, use_labels=config.dataset.use_labels)
    config, schedule = plan_rounds(config, federation, sizes, is_given=flags["round_kimg"] is not None)
    config, resume_note = parsed.settle_resume(config)
    first, use_labels = declared[0], config.dataset.use_labels
    held_notes = []
    for name in ("valid", "holdout"):
        if flags[name] is not None:
            held = ImageDataset(flags[name], use_labels=use_labels, classes=first.dataset.classes)
            held_notes.append(check_comparable(held, first.dataset, f"--{name}", first.label, first.label))
    check_resume_weights(config, first.dataset)
    empty_note = None
    if use_labels:
        counts = np.sum([each.dataset.class_counts for each in declared], axis=0)
        empty_note = describe_empty_classes(counts, first.dataset.classes, "no site has")
    machine = [line for line in parsed.notes if "--tune-malloc" not in line]  # which belongs to no run
    found = (parsed.warning, resume_note, *notes_on_rounds(config.federation, schedule), empty_note, *held_notes)
    notes = (*machine, *(line for line in found if line is not None))
    precision = parsed.settings.precision if chooses_precision else "auto"  # a continued run keeps its own
    return PlannedRun(config=config, settings=replace(parsed.settings, precision=precision, notes=notes),
                      schedule=schedule, facts=dict(facts), holdout=settings.holdout, valid=settings.valid)


@dataclass(frozen=True, kw_only=True)
class SitePlan:
    """What a site needs to know of a run besides the messages of its rounds."""

    run: str  # name of the run's folder, at the server and at the sites
    balance: str
    config: TrainConfig
    sizes: tuple[int, ...]  # number of images of each site, in the order of config.federation.sites
    new: tuple[str, ...] = ()  # names of sites of which no round has an update yet

    def to_text(self) -> str:
        """Return the plan as it travels."""
        config = replace(self.config, resume=None)  # a path of the server; sites get the weights with their first round
        return json.dumps({"run": self.run, "balance": self.balance, "config": config.to_dict(),
                           "sizes": list(self.sizes), "new": list(self.new)}, allow_nan=False)

    @classmethod
    def from_text(cls, text: str, *, site: str, facts: DeclaredFacts) -> "SitePlan":
        """Read a plan; raises Unsuitable or ConfigError unless it fits the site and its images."""
        try:
            found = json.loads(text)
            name, balance, sizes, new = found["run"], found["balance"], tuple(found["sizes"]), tuple(found["new"])
            config = TrainConfig.from_dict(found["config"])
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Unsuitable("the server's plan cannot be read") from error
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise Unsuitable(f"the plan names the run {name!r}; expected a name without folders")
        federation = config.federation
        if federation is None or site not in federation.sites or balance not in BALANCES:
            raise Unsuitable(f"the plan is not one for site {site}")
        if len(sizes) != len(federation.sites) or not all(type(size) is int and size > 0 for size in sizes):
            raise Unsuitable("the plan does not have a number of images for each site")
        here = facts
        expected = (here.num_images, here.resolution, here.channels, here.label_dim)
        there = (sizes[federation.sites.index(site)], config.dataset.resolution, config.dataset.channels,
                 config.dataset.c_dim)
        if there != expected:
            raise Unsuitable(f"the plan is for images, resolution, channels and classes {there}; expected those of the "
                             f"site, {expected}")
        return cls(run=name, balance=balance, config=config, sizes=sizes, new=new)

    def check_privacy(self, site: str, max_epsilon: float | None, sent: Sequence[SentUpdate] = ()) -> None:
        """Raise UserError if the whole run would spend more on the updates of a site than it allows.

        sent:  those that left the site in this run already; a round counts once for each, and once if it is to come
        """
        federation = self.config.federation
        if max_epsilon is None:
            return
        advice = "ask for a run with more noise, or start the site with another --max-epsilon"
        if not federation.dp:
            raise UserError(f"the run has no differential privacy, but --max-epsilon is {max_epsilon:g}; expected "
                            f"--dp=1: {advice}")
        if federation.dp_delta > MAX_DELTA:
            raise UserError(f"the run has --dp-delta={federation.dp_delta:g}, but --max-epsilon is {max_epsilon:g}; "
                            f"expected a delta of at most {MAX_DELTA:g}, with which that is meant: ask for such a run")
        schedule = self.schedule()
        first, last = schedule.first_round(site), schedule.last_round(site)
        left = last - first + 1 - len({update.round for update in sent if first <= update.round <= last})
        spent = epsilon_spent(federation.dp_noise, len(sent) + left, federation.dp_delta)
        if spent > max_epsilon:
            before = f", with {plural(len(sent), 'update')} that left the site already" if sent else ""
            raise UserError(f"the run spends epsilon {spent:.4g} (delta {federation.dp_delta:g}){before}, but "
                            f"--max-epsilon is {max_epsilon:g}; expected at most that: {advice}")

    def schedule(self) -> Schedule:
        return Schedule(self.config.federation, sizes=self.sizes, batch=self.config.batch)


_KEYS = ("pixels_sha256", "num_images", "num_groups")


def _numbers_of(training_data: Mapping[str, Any]) -> dict[str, Any]:
    """Return training data without what else the histories of synthetic images tell."""
    found = {key: training_data[key] for key in _KEYS}
    if "generated_from" in training_data:
        found["generated_from"] = [
            {key: entry[key] for key in _KEYS} if isinstance(entry, Mapping) and set(_KEYS) <= set(entry)
            else UNKNOWN_DATA for entry in training_data["generated_from"][:_HISTORY]]
    return found


def _check_facts(found: Mapping[str, Any]) -> None:
    """Raise Unsuitable unless each of the facts has a value of its kind."""
    if found["protocol"] != PROTOCOL_VERSION:
        raise Unsuitable(f"the protocol version is {found['protocol']!r} there and {PROTOCOL_VERSION} here; use the "
                         "same version of this project everywhere")
    for name, least, most in (("resolution", 1, _MOST_PIXELS), ("channels", 1, _MOST_CHANNELS),
                              ("num_images", 1, _MOST_IMAGES), ("label_dim", 0, FACTS_LIMIT)):
        _check_whole(name, found[name], least=least, most=most)
    for name, choices in (("device", ("cpu", "cuda")), ("label_kind", (None, CLASS, VECTOR)),
                          ("is_phantom", (True, False))):
        if found[name] not in choices or type(found[name]) not in (str, bool, type(None)):
            raise Unsuitable(f"the declared {name} is not one of {listed([str(each) for each in choices])}")
    if (found["label_kind"] is None) != (found["label_dim"] == 0):
        raise Unsuitable("the declared label_kind does not fit the declared label_dim")
    _check_classes(found["classes"], found["class_counts"], found["label_dim"],
                   found["num_images"] if found["label_kind"] == CLASS else None)
    _check_hash("content_hash", found["content_hash"])
    _check_training_data(found["training_data"])
    if found["training_data"]["num_images"] != found["num_images"]:
        raise Unsuitable("the declared num_images is not that of the declared training_data")


def _check_classes(names: Any, counts: Any, label_dim: int, num_images: int | None) -> None:
    """Check names and numbers of images of classes; num_images: None if labels are not classes."""
    if names is not None and (not isinstance(names, list) or len(names) != label_dim or not label_dim
                              or not all(isinstance(name, str) and _is_class_name(name) for name in names)):
        raise Unsuitable(f"the declared classes are not {plural(label_dim, 'name')} of at most {_CLASS_NAME} printable "
                         "characters")
    num_classes = 0 if num_images is None else label_dim
    if not isinstance(counts, list) or len(counts) != num_classes:
        raise Unsuitable(f"the declared class_counts are not {plural(num_classes, 'number')}")
    for count in counts:
        _check_whole("class_counts", count, most=num_images)
    if counts and sum(counts) != num_images:
        raise Unsuitable(f"the declared class_counts are of {sum(counts)} images; expected num_images, {num_images}")


def _is_class_name(name: str) -> bool:
    return len(name) <= _CLASS_NAME and name.isprintable()


def _check_training_data(found: Any) -> None:
    """Check hash and numbers of images and groups, with those of the data that synthetic images were made from."""
    if not isinstance(found, dict) or set(found) - {*_KEYS, "generated_from"}:
        raise Unsuitable("the declared training_data are not hash and numbers of images and groups")
    history = found.get("generated_from", [])
    if not isinstance(history, list) or len(history) > _HISTORY:
        raise Unsuitable(f"the declared generated_from is not a list of at most {_HISTORY} entries")
    for entry in [found, *(entry for entry in history if entry != UNKNOWN_DATA)]:
        if not isinstance(entry, dict) or not set(_KEYS) <= set(entry) or (
                entry is not found and len(entry) != 3):
            raise Unsuitable("the declared training_data are not hash and numbers of images and groups")
        _check_hash("pixels_sha256", entry["pixels_sha256"])
        _check_whole("num_images", entry["num_images"], least=1)
        if entry["num_groups"] is not None:
            _check_whole("num_groups", entry["num_groups"])


def _check_whole(name: str, value: Any, *, least: int = 0, most: int = LARGEST_COUNT) -> None:
    if type(value) is not int or not least <= value <= most:
        raise Unsuitable(f"the declared {name} is not a whole number from {least} to {most}")


def _check_hash(name: str, value: Any) -> None:
    if not isinstance(value, str) or not HASH.fullmatch(value):
        raise Unsuitable(f"the declared {name} is not a SHA-256")
