"""The commands of federate.py that set up a federation over a network: provision, server, site, revoke."""

from pathlib import Path
from typing import Any

import click

from dnnlib.cli import GroupedCommand, UserError, UserPath, check_outdir
from dnnlib.text import listed_with_and
from federated.command import PRIVACY
from federated.deployment import kits
from federated.deployment.job import SITE_TIMEOUT, ServerSettings, SiteSettings
from training.config import FederationConfig
from training.dataset import ImageDataset
from training.options import DATA, RUN, SPEED, make_flag

KITS, SERVER = "Kits", "The server"
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}

PROVISION_HELP = """Make the start-up kits of a federation: for its server, its sites and the admin who starts runs.

\b
python federate.py provision --sites=a,b,c --server=fl.example.org --outdir=kits
python federate.py provision --sites=d --outdir=kits

Give each machine the folder of its kit, over a channel that you trust: it holds a private key. The folder "ca" stays
with you; whoever has it can join the federation. The second form adds a site later.

With --csr no private key travels. Each site makes its own, and sends a request for a certificate; it copies the kit
that it gets back into the same folder:

\b
python federate.py provision --csr --sites=a --outdir=kit-a
python federate.py provision --sites=a,b,c --server=fl.example.org --requests=FOLDER --outdir=kits
cp -r kits/a/. kit-a
"""

SERVER_HELP = """Run the server of a federation, in the foreground.

\b
python federate.py server --kit=kits/server --outdir=runs

Sites and admins connect to the port of `provision --port`; sites need no open port. Runs are started with
`federate.py start`. Ctrl-C stops the server and its runs.
"""

SITE_HELP = """Run a site of a federation, in the foreground: it waits for runs and trains on its own images.

\b
python federate.py site --kit=kits/a --data=a.zip

The path and the images stay on this machine. The site waits for a server that is not there, and connects again when
the connection is lost. Ctrl-C stops it.
"""

REVOKE_HELP = """Refuse a site, although its certificate is valid, or readmit it. At the server, also while it runs.

\b
python federate.py revoke --kit=kits/server --site=b
python federate.py revoke --kit=kits/server --site=b --readmit

A run that the site takes part in goes on without it. A site that was refused is started again after it is readmitted.
"""


def make_provision_command() -> click.Command:
    """Return the command that makes kits."""
    flags = [
        make_flag("--sites", str, KITS, "Names of the sites; with --csr that of this site. Required.", "NAME,..."),
        make_flag("--server", str, KITS, "Host name or IPv4 address at which sites reach the server. Required the "
                  "first time.", "HOST"),
        make_flag("--port", int, KITS, "Port of the server, for sites and admins.", "INT", standard=str(kits.PORT)),
        make_flag("--outdir", UserPath(), KITS, "Where to save the kits. Required.", "DIR"),
        make_flag("--federation", str, KITS, "Name of the federation.", "NAME", standard=kits.FEDERATION),
        make_flag("--days", int, KITS, "Validity of the certificates.", "N", standard=str(kits.DAYS)),
        make_flag("--csr", bool, KITS, "Make the private key of this site, and a request for its certificate.",
                  is_flag=True, default=False),
        make_flag("--requests", UserPath(), KITS, "Folder with requests, NAME.csr, of sites that keep their key.",
                  "DIR"),
    ]

    def callback(sites: str | None, server: str | None, port: int | None, outdir: str | None, federation: str | None,
                 days: int | None, csr: bool, requests: str | None) -> int:
        _require(sites=sites, outdir=outdir)
        names = [name.strip() for name in sites.split(",")]
        if csr:
            given = [flag for flag, value in (("--server", server), ("--port", port), ("--federation", federation),
                                              ("--days", days), ("--requests", requests)) if value is not None]
            if given or len(names) != 1:
                raise UserError(f"--csr is given with {given[0] if given else f'--sites={sites}'}; expected --csr "
                                "--sites=NAME --outdir=DIR alone, at the site")
            file = kits.request_certificate(names[0], Path(outdir))
            click.echo(f"{file}: send it to whoever provisions the federation; the private key stays in {outdir}")
            return 0
        made = kits.provision(names, server, Path(outdir), port=port, name=federation,
                              days=kits.DAYS if days is None else days,
                              requests=None if requests is None else Path(requests))
        if not made:
            click.echo(f"all of --sites have kits in {outdir}")
            return 0
        click.echo(f"{outdir}: made {listed_with_and(made)}; folder {kits.CA} stays here")
        if kits.SERVER not in made:
            click.echo(f"if the server runs elsewhere, copy {outdir}/{kits.SERVER}/startup/federation.json to its kit "
                       "and start it again: it lists the sites")
        return 0

    return make_command("provision", callback, flags, PROVISION_HELP, "Make the start-up kits of a federation.")


def make_server_command() -> click.Command:
    """Return the command that runs the server."""
    flags = [
        make_flag("--kit", UserPath(), KITS, "Folder of the server's kit. Required.", "DIR"),
        make_flag("--outdir", UserPath(), RUN, "Where to save the runs. Required.", "DIR"),
        make_flag("--site-timeout", float, SERVER, "Seconds without a sign of life after which a site is lost.", "N",
                  standard=f"{SITE_TIMEOUT:g}"),
        make_flag("--holdout", UserPath(), DATA, "Data set that --metrics compare with; no site trains on it.", "PATH"),
        make_flag("--valid", UserPath(), DATA, "Validation set.", "PATH"),
        make_flag("--detector-weights", UserPath(named=True), RUN, "File of a feature detector's weights. Can be "
                  "repeated.", "[NAME=]PATH", multiple=True),
        make_flag("--device", str, SPEED, "Where to compute metrics.", "auto|cpu|cuda", standard="auto"),
    ]

    def callback(kit: str | None, outdir: str | None, site_timeout: float | None, holdout: str | None,
                 valid: str | None, detector_weights: tuple[str, ...], device: str | None) -> int:
        _require(kit=kit, outdir=outdir)
        found = kits.read_kit(kit, kits.SERVER)
        timeout = SITE_TIMEOUT if site_timeout is None else site_timeout
        if not 15 <= timeout <= 86400:  # three signs of life
            raise UserError(f"--site-timeout is {timeout:g}; expected 15 to 86400 seconds")
        check_outdir(outdir)
        if detector_weights and holdout is None:
            raise UserError("--detector-weights is given without --holdout; expected images that metrics compare with: "
                            "add --holdout=SET, or leave --detector-weights out")
        for path in (holdout, valid):
            if path is not None:
                ImageDataset(path)  # a mistake is reported here, not in the first run
        from federated.deployment.processes import run_server

        return run_server(found, ServerSettings(
            outdir=_absolute(outdir), sites=found.sites, site_timeout=timeout, device=device or "auto",
            holdout=_absolute(holdout), valid=_absolute(valid), detector_weights=tuple(detector_weights)))

    return make_command("server", callback, flags, SERVER_HELP, "Run the server of a federation.")


def make_site_command() -> click.Command:
    """Return the command that runs a site."""
    flags = [
        make_flag("--kit", UserPath(), KITS, "Folder of the site's kit. Required.", "DIR"),
        make_flag("--data", UserPath(), DATA, "Training data: a zip or folder made by dataset_tool.py. Required.",
                  "PATH"),
        make_flag("--outdir", UserPath(), RUN, "Where to save the site's own state of each run.", "DIR",
                  standard="the folder runs of the kit"),
        make_flag("--device", str, SPEED, "Where to train.", "auto|cpu|cuda", standard="auto"),
        make_flag("--workers", int, SPEED, "Number of data loading workers.", "INT", standard="as the run says"),
        make_flag("--max-epsilon", float, PRIVACY, "Take part only in runs with --dp that spend at most this epsilon "
                  "on the site's updates. Each run counts by itself. Runs with a larger --dp-delta than "
                  f"{FederationConfig.dp_delta:g} are refused.", "N", standard="take part in all runs"),
    ]

    def callback(kit: str | None, data: str | None, outdir: str | None, device: str | None,
                 workers: int | None, max_epsilon: float | None) -> int:
        _require(kit=kit, data=data)
        if max_epsilon is not None and not max_epsilon > 0:
            raise UserError(f"--max-epsilon is {max_epsilon:g}; expected a number > 0")
        found = kits.read_kit(kit, kits.SITE)
        place = str(found.path / "runs") if outdir is None else outdir
        from federated.deployment.processes import run_site

        return run_site(found, SiteSettings(data=_absolute(data), outdir=_absolute(place), device=device or "auto",
                                            workers=workers, max_epsilon=max_epsilon))

    return make_command("site", callback, flags, SITE_HELP, "Run a site of a federation.")


def make_revoke_command() -> click.Command:
    """Return the command that refuses a site."""
    flags = [
        make_flag("--kit", UserPath(), KITS, "Folder of the server's kit. Required.", "DIR"),
        make_flag("--site", str, KITS, "Name of the site. Required.", "NAME"),
        make_flag("--readmit", bool, KITS, "Accept the site again.", is_flag=True, default=False),
    ]

    def callback(kit: str | None, site: str | None, readmit: bool) -> int:
        _require(kit=kit, site=site)
        kits.revoke_site(kits.read_kit(kit, kits.SERVER), site, readmit=readmit)
        click.echo(f"site {site} is {'accepted again' if readmit else 'refused'}, also by a server that runs now")
        return 0

    return make_command("revoke", callback, flags, REVOKE_HELP, "Refuse a site, or readmit it.")


def make_command(name: str, callback: Any, flags: list[click.Option], text: str, short: str) -> click.Command:
    """Return a command of federate.py."""
    return GroupedCommand(name, callback=callback, params=list(flags), help=text, short_help=short,
                          context_settings=_CONTEXT)


def _require(**given: str | None) -> None:
    for name, value in given.items():
        if value is None:
            raise UserError(f"--{name} is missing; see --help")


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).absolute())
