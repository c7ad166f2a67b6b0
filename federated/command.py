"""The commands of federate.py: their flags, and what they print."""

from collections.abc import Callable, Sequence
from typing import Any

import click

from dnnlib.cli import Flag, GroupedCommand, UserPath, join_values, split_paths
from federated.institutions import PreparedFederation, prepare_federation
from federated.simulation_plan import describe_simulation, is_large
from training.command import ChooseMetrics, print_plan, show_alerts
from training.config import (
    AGGREGATIONS,
    EMA_PLACES,
    LOCAL_LENGTHS,
    ON_REFUSED,
    PAYLOADS,
    SERVER_LR,
    SERVER_OPTIMIZERS,
    SHARED_NETWORKS,
    SITE_WEIGHTS,
    FederationConfig,
)
from training.options import DATA, DEFAULTS, MODEL, RUN, SPEED, make_flag, show_value
from training.options import FLAGS as TRAIN_FLAGS

GROUP_HELP = """Train one network at several institutions, whose images stay where they are.

\b
python federate.py simulate --data=a.zip,b.zip,c.zip --outdir=runs --rounds=100 --cond=1
python federate.py provision --sites=a,b,c --server=fl.example.org --outdir=kits

On one machine: simulate and compare. Between institutions: provision makes a kit for each, server and site run there,
and start, status, stop and logs are for whoever starts runs. docs/hospitals.md goes through it step by step.
"""

HELP = """Simulate decentralized training (federated learning) of a StyleGAN2 generator on one machine.

Each data set belongs to an institution, a "site". In each round every site trains the networks of the server on its own
images; then the server averages what the sites send back.

\b
python federate.py simulate --data=a.zip,b.zip,c.zip --outdir=runs --rounds=100 --cond=1 --mirror=1
python federate.py simulate --data=a.zip,b.zip --outdir=runs --rounds=20 --round-kimg=0.5 --cfg=tiny
python federate.py simulate --data=a.zip,b.zip,c.zip --outdir=runs --rounds=100 --cond=1 --dry-run

The same command again continues its run where it stopped. A finished run is left alone, unless --rounds is larger
than before. BOOL is 1 or 0, true or false, yes or no. Exit codes are those of train.py.
"""

ROUNDS, SERVER, PRIVACY = "Rounds and sites", "The server", "Differential privacy"


def _split_entries(context: click.Context, parameter: click.Parameter,
                   values: Sequence[str]) -> tuple[str, ...] | None:
    """Return the entries of an option that may be repeated and takes lists; None if it is not given."""
    joined = join_values(context, parameter, values)
    return None if joined is None else tuple(entry.strip() for entry in joined.split(","))


def _flag(name: str, kind: object, text: str, metavar: str | None = None, *, group: str = SERVER,
          standard: str | None = None, **attributes) -> Flag:
    """Declare an option that is a field of FederationConfig, with its default or that described by `standard`."""
    field = FederationConfig.__dataclass_fields__.get(name.removeprefix("--").replace("-", "_"))
    if standard is None and field is not None and field.default is not None:
        standard = show_value(field.default)
    return make_flag(name, kind, group, text, metavar, standard=standard, **attributes)


_OWN = [
    make_flag("--data", UserPath(), DATA, "Training data of each institution, separated by commas: zips or folders "
              "made by dataset_tool.py, of one size and with the same classes. Can be repeated. Required.", "PATH,...",
              multiple=True, callback=split_paths),
    _flag("--sites", str, "Names of the institutions, in the order of --data.", "NAME,...", group=ROUNDS,
          standard="the names of the files without .zip"),
    make_flag("--rounds", int, ROUNDS, "Number of rounds. A larger value continues a finished run. Required.", "N"),
    _flag("--round-kimg", float, "Thousands of images that each site sees in a round; with --local=proportional, the "
          "mean over sites.", "N", group=ROUNDS, standard="the smallest data set once; with --local=proportional, each "
          "data set once"),
    make_flag("--kimg", str, ROUNDS, "Refused: --rounds and --round-kimg set the length.", hidden=True),
    _flag("--local", click.Choice(LOCAL_LENGTHS), "Images of a site in a round: equal at all sites, or proportional to "
          "its number of images.", group=ROUNDS),
    _flag("--join", str, "First round of a site that does not take part from the start, such as c:5. Can be repeated.",
          "NAME:ROUND", group=ROUNDS, standard="all sites in round 1", multiple=True, callback=_split_entries),
    _flag("--leave", str, "Last round of a site that does not stay to the end, such as b:7. Can be repeated.",
          "NAME:ROUND", group=ROUNDS, standard="all sites in the last round", multiple=True, callback=_split_entries),

    _flag("--share", str, "Networks that are averaged: generator and discriminator, or the generator alone, so that "
          "each site keeps the discriminator, which knows most about its images.", "|".join(SHARED_NETWORKS)),
    _flag("--ema", click.Choice(EMA_PLACES), "Where the moving average of the generator is updated. sites: after each "
          "iteration, and averaged as well; server: after each round, which saves a third of the bytes.",
          standard="sites; server with --dp"),
    _flag("--weights", click.Choice(SITE_WEIGHTS), "Weight of a site in the mean: the images that it saw in the round, "
          "or equal.", standard="images; equal with --dp, and with --aggregation=median or trimmed-mean"),
    _flag("--aggregation", click.Choice(AGGREGATIONS), "What the sites' networks are joined by: their mean, or the "
          "median or trimmed mean of each weight, which a few faulty or hostile sites out of three or more cannot move "
          "far."),
    _flag("--trim", float, "Share of the sites that trimmed-mean leaves out at each end, rounded up: of 3 to 5 sites "
          "one, of 6 to 10 two.", "FLOAT"),
    _flag("--payload", click.Choice(PAYLOADS), "Type of the numbers that are sent; bfloat16 halves the bytes."),
    _flag("--server-optimizer", click.Choice(SERVER_OPTIMIZERS), "How the mean changes the networks. fedavg: replaces "
          "them; fedavgm: with momentum; fedadam: as a gradient of Adam."),
    _flag("--server-lr", float, "Learning rate of fedavgm and fedadam.", "FLOAT",
          standard=" or ".join(f"{lr:g} with {name}" for name, lr in SERVER_LR.items() if lr is not None)),
    _flag("--server-momentum", float, "Momentum of fedavgm; beta1 of fedadam.", "FLOAT"),
    _flag("--server-beta2", float, "Beta2 of fedadam.", "FLOAT"),
    _flag("--server-tau", float, "Added to the denominator of fedadam.", "FLOAT"),
    _flag("--fedprox-mu", float, "Weight of FedProx's term in the losses of the sites, which holds their networks near "
          "those of the server.", "FLOAT"),
    _flag("--max-update-norm", float, "Refuse an update whose norm, per local iteration, is more than this multiple of "
          "the median over the sites and the last five rounds.", "FLOAT"),
    _flag("--on-refused", click.Choice(ON_REFUSED), "When an update is refused: continue with the other sites, or "
          "stop."),

    _flag("--dp", bool, "Clip each site's update, and add noise to it at the site. The guarantee is for all of an "
          "institution's updates; with three institutions, noise that protects leaves little to learn.", "BOOL",
          group=PRIVACY),
    _flag("--dp-clip", float, "Largest norm of an update. Update/norm/NAME in stats.jsonl of a run without --dp on "
          "phantoms or public images shows what is usual. Required with --dp.", "C", group=PRIVACY),
    _flag("--dp-noise", float, "Standard deviation of the noise on each weight, in units of --dp-clip.", "Z",
          group=PRIVACY, standard="the smallest that --dp-epsilon allows"),
    _flag("--dp-epsilon", float, "Epsilon of all planned rounds of a site, from which --dp-noise follows.", "FLOAT",
          group=PRIVACY),
    _flag("--dp-delta", float, "Delta of the guarantee.", "FLOAT", group=PRIVACY),

    make_flag("--snap", int, RUN, "Save a network snapshot, and compute --metrics, every N rounds; a grid of sample "
              "images is made after each round.", "N", standard="1"),
    make_flag("--metrics", str, RUN, "Quality metrics to compute for each network snapshot, separated by commas, or "
              "none. They need --holdout or --share-statistics. Can be repeated.", "LIST", multiple=True,
              callback=join_values, standard="fid50k_full if its feature detector and one of the two are available, "
              "else none"),
    make_flag("--holdout", UserPath(), DATA, "Data set that --metrics compare with; no site trains on it.", "PATH"),
    make_flag("--share-statistics", bool, RUN, "Compare with feature statistics (number, mean and covariance) of "
              "the sites' images, which alone leave the sites: FID against their union, and against each.",
              is_flag=True, default=False),
    make_flag("--cond", bool, DATA, "Train conditional networks, on the classes of the data sets.", "BOOL",
              standard=show_value(DEFAULTS["cond"])),
    make_flag("--batch", int, MODEL, "Batch size of each site.", "INT", standard="from --cfg"),
    make_flag("--gpus", int, SPEED, "Number of processes that train sites at the same time: one per GPU, or several on "
              "a CPU. Each site is trained by one of them.", "INT", standard="1"),
]
_LEFT_OUT = {"subset"}  # a part of a data set is made with dataset_tool.py
_ORDER = (RUN, DATA, ROUNDS, SERVER, PRIVACY)  # the other groups follow as in train.py


def _simulate_flags() -> list[Flag]:
    """Return the flags of train.py, each once, and in their places those with a meaning of their own here."""
    own = {flag.name: flag for flag in _OWN}
    found = [own.pop(flag.name, flag) for flag in TRAIN_FLAGS if flag.name not in _LEFT_OUT] + [*own.values()]
    return sorted(found, key=lambda flag: _ORDER.index(flag.group) if flag.group in _ORDER else len(_ORDER))


FLAGS = _simulate_flags()


def make_simulate_command(run: Callable[[PreparedFederation], int], choose_metrics: ChooseMetrics) -> click.Command:
    """Return the command that simulates the institutions.

    run:             trains, and returns the exit code
    choose_metrics:  checks the given metrics, or chooses the default ones; raises UserError
    """
    def callback(dry_run: bool, **flags: Any) -> int:
        prepared = prepare_federation(flags, choose_metrics, dry_run=dry_run)
        show_alerts(prepared.alerts)
        if not dry_run:
            return run(prepared)
        if is_large(prepared.config):
            click.echo("timing an iteration to estimate the hours, which takes a moment", err=True)
        print_plan(describe_simulation(prepared), prepared.warnings, prepared.alerts)
        return 0

    return GroupedCommand("simulate", callback=callback, params=list(FLAGS), help=HELP,
                          short_help="Simulate the institutions on one machine.",
                          context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})


def make_group(**commands: click.Command) -> click.Group:
    """Return the command line of federate.py; commands by name."""
    return click.Group("federate", commands=commands, help=GROUP_HELP, no_args_is_help=False,  # which is no one line
                       context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
