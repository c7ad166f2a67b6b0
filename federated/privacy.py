"""Differential privacy of an institution's updates (--dp): clipping, noise from a secret of the site, and epsilon.

In each round a site sends base + clip(update) + noise, the Gaussian mechanism (Dwork & Roth 2014, appendix A):

    clip(u) = u * min(1, C / ||u||),    noise ~ N(0, (z * C)^2) for each number,    C = --dp-clip, z = --dp-noise

u is all that a site sends as ONE vector: every tensor that travels, after the round minus before. Two runs are
neighbors if they differ in the updates of one institution, in each round by any other update of norm <= C. So the
sensitivity is 2C, and the noise is z / 2 in units of it. Rounds compose adaptively; there is no amplification by
sampling, since the server sees each noisy update of each site. What the server and the others do with it, and the
networks that come out, are post-processing.

LIMIT: the noise is made of floating-point numbers, whose last bits may tell more than the theory allows (Mironov 2012).

A round may bring a further update, with noise of its own: if site and server both are set back to an earlier round, or
a site trains a round again on a GPU, where it ends differently. So each site counts in a file what left it, and its own
epsilon follows from that. LIMIT: the server counts one update per round, and a site that is set back as a whole, with
this file, counts from there.
"""

import hashlib
import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dnnlib.cli import UserError
from dnnlib.files import atomic_write, retrying
from federated.aggregate import update_norm
from federated.agreement import tensors_hash
from federated.schedule import Schedule
from training.config import FederationConfig

SECRET_NAME, SENT_NAME = "noise-secret.bin", "sent-updates.json"  # in the folder of a site
PROTECTED = ("epsilon and delta bound what all updates of one institution in this run tell about its images, compared "
             "with any other updates; they are not computed for a single image, and cover neither the numbers of "
             "images and classes that were declared nor what --resume was trained on")
_SECRET_BYTES = 32


# The mechanism


def protect(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor], *, clip: float, noise: float, secret: bytes,
            round: int, base_hash: str) -> dict[str, Tensor]:
    """Return base + clip(tensors - base) + noise, the formula above in float64, as float32 tensors on the CPU.

    tensors:    of the site after the round, float32
    base:       those that the round started from, float32, with the same names and shapes
    clip:       C, the largest 2-norm of the update over all tensors together
    noise:      z, the standard deviation of the noise in units of `clip`
    secret:     of the site, as `site_secret` returns it
    round:      its number
    base_hash:  as the round's message names `base`

    The noise follows from secret, round, base and the update itself. So a site that is killed and makes an update again
    sends the same bytes, and the noise does not average out; while two different updates never have equal noise, which
    their difference would reveal.
    """
    mine = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    norm = update_norm(mine, base, mine)
    scale = 1.0 if norm <= clip else clip / norm
    made_of = [round, base_hash, tensors_hash(mine)]
    found = {}
    for name, tensor in mine.items():
        start = base[name].double()
        normal = secret_normals(secret, json.dumps([*made_of, name]), tensor.numel()).reshape(tensor.shape)
        found[name] = (start + scale * (tensor.double() - start) + noise * clip * normal).float()
    return found


def secret_normals(secret: bytes, purpose: str, count: int) -> Tensor:
    """Return numbers of the standard normal distribution, [count] float64, equal for equal arguments.

    They are quantiles of 52-bit uniform numbers of SHAKE-256(secret, purpose): who does not know the secret cannot tell
    them from random ones. Their magnitude is at most 8.2.
    """
    from scipy.special import ndtri  # here: importing it takes 0.4 s

    digest = hashlib.shake_256(secret + purpose.encode()).digest(8 * count)
    uniform = ((np.frombuffer(digest, "<u8") >> np.uint64(12)) + 0.5) * 2.0**-52
    return torch.from_numpy(ndtri(uniform))


def site_secret(folder: Path, *, round: int) -> bytes:
    """Return the secret of a site's noise, 32 random bytes in a file of its folder that only its owner may read.

    round:  that the site has begun last; before the first, 0, the secret is drawn

    Raises UserError if the file is missing later: other noise on an update that was sent already would weaken both.
    """
    path = folder / SECRET_NAME
    if not _exists(path, round, "the secret that its noise follows from"):
        with atomic_write(path) as file:
            os.chmod(file.name, 0o600)
            file.write(secrets.token_bytes(_SECRET_BYTES))
    secret = retrying(path.read_bytes, path)
    if len(secret) != _SECRET_BYTES:
        raise UserError(f"{path} has {len(secret)} bytes; expected the {_SECRET_BYTES} that its site wrote: copy it "
                        "back, or start another run with --new")
    return secret


@dataclass(frozen=True, kw_only=True)
class SentUpdate:
    """An update that left a site. Equal ones, which tell nothing new, are one."""

    round: int
    base_hash: str  # of the networks that it started from
    hash: str  # of its tensors, after clipping and with noise


def sent_updates(folder: Path, *, round: int = 0) -> list[SentUpdate]:
    """Return the different updates that left a site, as `save_sent_updates` wrote them into its folder.

    round:  that the site has begun last; before the first, 0, there may be no file

    Raises UserError if the file is missing later, or damaged: what was spent is not known then.
    """
    path = folder / SENT_NAME
    if not _exists(path, round, "the list from which epsilon is counted"):
        return []
    try:
        return [SentUpdate(**entry) for entry in json.loads(retrying(path.read_bytes, path))]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged; expected the list that its site wrote: copy it back, or start another run "
                        "with --new") from error


def save_sent_updates(folder: Path, updates: Sequence[SentUpdate]) -> None:
    """Write the list of `sent_updates`, before the last of them leaves the site."""
    with atomic_write(folder / SENT_NAME, text=True) as file:
        file.write(json.dumps([vars(update) for update in updates], indent=1) + "\n")


def _exists(path: Path, round: int, what: str) -> bool:
    """Return whether a file of a site is there; raise UserError if it must be, as the site has begun a round."""
    if path.exists():
        return True
    if round > 0:
        raise UserError(f"{path} is missing, but the site has begun round {round} and may have sent its update; "
                        f"expected {what}: copy it back, or start another run with --new")
    return False


# Accounting
#
# T Gaussian mechanisms of one noise multiplier s are together exactly one of s / sqrt(T) (Dong et al. 2022, corollary
# 3.3), whose epsilon has a closed form (Balle & Wang 2018, theorem 8). dp-accounting computes that. Its PLD accountant
# finds the same numbers up to its grid, but needs memory in proportion to epsilon, and has none for the thousands at
# which training still works; its RDP accountant gives an upper bound, 7 to 8 % higher.


def epsilon_spent(noise: float, rounds: int, delta: float) -> float:
    """Return epsilon of an institution's updates in all of `rounds` rounds; 0 for no rounds.

    noise:  z, the standard deviation in units of the clip; half of that in units of the sensitivity

    Raises UserError without the package dp-accounting.
    """
    accounting = _import_accounting()
    if rounds == 0:
        return 0.0
    with np.errstate(divide="ignore"):  # of a logarithm, whose limit it takes
        return float(accounting.get_epsilon_gaussian(noise / 2 / math.sqrt(rounds), delta))


def find_noise(epsilon: float, rounds: int, delta: float) -> float:
    """Return the smallest z, rounded up to four digits, with which `rounds` rounds spend at most this epsilon.

    Raises UserError without the package dp-accounting.
    """
    accounting = _import_accounting()
    with np.errstate(divide="ignore"):
        exact = 2 * math.sqrt(rounds) * accounting.get_sigma_gaussian(epsilon, delta)
    digit = 10.0**(math.floor(math.log10(exact)) - 3)
    steps = math.ceil(exact / digit)
    while epsilon_spent(rounded := float(f"{steps * digit:.4g}"), rounds, delta) > epsilon:
        steps += 1
    return rounded


def epsilons(federation: FederationConfig, schedule: Schedule, number: int) -> dict[str, float]:
    """Return epsilon of the updates that each site sent up to a round, of the sites that sent some; {} without --dp.

    A refused update counts too: the server has seen it.
    """
    if not federation.dp:
        return {}
    rounds = {name: schedule.num_rounds(name, number) for name in sorted(federation.sites)}
    return {name: epsilon_spent(federation.dp_noise, count, federation.dp_delta)
            for name, count in rounds.items() if count > 0}


def describe_privacy(federation: FederationConfig, schedule: Schedule, number: int) -> dict[str, Any] | None:
    """Return what is guaranteed after a round, for network snapshots and --dry-run; None without --dp."""
    if not federation.dp:
        return None
    return {**federation.privacy(), "rounds": number, "epsilon": epsilons(federation, schedule, number),
            "protected": PROTECTED}


def _import_accounting() -> Any:
    try:
        import dp_accounting  # here: it is needed with --dp alone
    except ImportError as error:
        raise UserError('--dp needs the package dp-accounting, which is not installed: pip install -e ".[dp]"'
                        ) from error
    return dp_accounting
