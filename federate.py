"""Train one network at several institutions, whose images stay where they are."""

import sys

import torch

from dnnlib.cli import run
from federated.command import make_group, make_simulate_command
from federated.compare_arms import make_compare_command
from federated.deployment.admin_command import (
    make_logs_command,
    make_start_command,
    make_status_command,
    make_stop_command,
)
from federated.deployment.command import (
    make_provision_command,
    make_revoke_command,
    make_server_command,
    make_site_command,
)
from federated.institutions import PreparedFederation, make_evaluate
from metrics.names import choose_metrics
from torch_utils.distributed import Place
from torch_utils.launch import launch
from torch_utils.ops.compiled import make_ready


def simulate(prepared: PreparedFederation) -> int:
    """Run the simulation, launching the other processes if there are several, and return the exit code."""
    evaluate = make_evaluate(prepared.config, prepared.settings, prepared.holdout)
    make_ready(torch.device(prepared.settings.device).type)  # before other processes start, so that it is built once
    if prepared.num_processes > 1 and not Place.from_environment().is_started:
        return launch(prepared.num_processes)
    from federated.simulation import simulate as simulate_here

    return simulate_here(prepared, evaluate)


# Each command is registered here, under its name.
main = make_group(simulate=make_simulate_command(simulate, choose_metrics), compare=make_compare_command(),
                  provision=make_provision_command(), server=make_server_command(), site=make_site_command(),
                  start=make_start_command(), status=make_status_command(), stop=make_stop_command(),
                  logs=make_logs_command(), revoke=make_revoke_command())

if __name__ == "__main__":
    sys.exit(run(main))
