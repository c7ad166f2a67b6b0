"""The command line of federate.py: flags and their defaults, refusals, --dry-run and the start of processes."""

import json
import math
import os
import sys
from dataclasses import fields
from types import SimpleNamespace

import click
import pytest
import torch

import federate
from dnnlib.cli import run
from federated import simulation_plan
from federated.agreement import Agreement, bytes_of
from federated.command import make_simulate_command
from federated.institutions import make_evaluate
from federated.privacy import epsilon_spent, find_noise
from federated.simulation import collect_statistics
from metrics.evaluation import Evaluator
from metrics.names import choose_metrics
from tests.helpers.simulate_commands import BASE, enter_folder, prepare, refuse, site, with_base
from torch_utils.distributed import Processes
from training.config import FederationConfig
from training.dry_run import describe_settings, meta_state, state_bytes
from training.options import FLAGS as TRAIN_FLAGS
from training.options import show_value
from training.snapshot import Networks, save_network
from training.state import TrainingState

METRICS = ("--metrics=kid5", "--detector=random-conv")


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """Working folder with the sets of two institutions; there is no GPU."""
    return enter_folder(tmp_path, monkeypatch)


@pytest.fixture
def at_once(monkeypatch):
    """An iteration counts as 3.6 seconds, without being timed."""
    monkeypatch.setattr(simulation_plan, "time_iteration", lambda config, device: 3.6)


def dry_run(capsys, *arguments):
    """Return the JSON that is printed, and standard error."""
    before = sorted(os.listdir())
    code = run(make_simulate_command(None, choose_metrics), [*with_base(arguments), "--dry-run"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert sorted({*os.listdir()} - {"cache"}) == [name for name in before if name != "cache"]
    return json.loads(captured.out), captured.err


# Flags


@pytest.mark.parametrize(("flag", "name", "value"), [
    ("--round-kimg=0.5", "round_kimg", 0.5), ("--local=proportional", "local", "proportional"),
    ("--share=G", "share", "G"), ("--ema=server", "ema", "server"), ("--weights=equal", "weights", "equal"),
    ("--payload=bfloat16", "payload", "bfloat16"), ("--server-optimizer=fedadam", "server_optimizer", "fedadam"),
    ("--server-lr=0.5 --server-optimizer=fedavgm", "server_lr", 0.5),
    ("--server-momentum=0.5 --server-optimizer=fedadam", "server_momentum", 0.5),
    ("--server-beta2=0.5 --server-optimizer=fedadam", "server_beta2", 0.5),
    ("--server-tau=0.1 --server-optimizer=fedadam", "server_tau", 0.1), ("--fedprox-mu=0.01", "fedprox_mu", 0.01),
    ("--max-update-norm=5", "max_update_norm", 5.0), ("--on-refused=stop", "on_refused", "stop"),
    ("--join=b:2", "join", ("b:2",)), ("--leave=b:2", "leave", ("b:2",)), ("--rounds=7", "rounds", 7),
    ("--sites=x,y", "sites", ("x", "y"))])
def test_flag_reaches_the_federation(flag, name, value, inside, capsys):
    length = [] if "round-kimg" in flag else ["--round-kimg=0.1"]
    federation = prepare(capsys, *length, *flag.split()).config.federation
    assert getattr(federation, name) == value
    others = {field: getattr(federation, field) for field in ("share", "ema", "weights", "payload", "fedprox_mu")
              if field != name}
    assert others == {field: FederationConfig.__dataclass_fields__[field].default for field in others}


def test_privacy_implies_the_average_at_the_server_equal_weights_and_noise_for_the_longest_site(inside, capsys):
    for number, name in ((60, "c"), (90, "d")):
        site(name, range(number, number + 20))
    flags = ["--data=a.zip,b.zip,c.zip", "--dp=1", "--dp-clip=2", "--rounds=9", "--leave=a:4", "--join=b:3,c:5"]
    found = prepare(capsys, *flags).config.federation
    assert (found.ema, found.weights, found.dp_epsilon, found.dp_delta) == ("server", "equal", 10, 1e-5)
    assert found.dp_noise == find_noise(10, 7, 1e-5)  # of b, which takes part in 7 rounds
    found = prepare(capsys, *flags, "--dp-epsilon=2", "--dp-delta=0.001").config.federation
    assert found.dp_noise == find_noise(2, 7, 0.001)
    found = prepare(capsys, *flags, "--dp-noise=3").config.federation
    assert (found.dp_noise, found.dp_epsilon) == (3, None)
    assert found.privacy() == {"clip": 2, "noise": 3, "delta": 1e-5}
    assert prepare(capsys).config.federation.privacy() is None


def test_privacy_without_its_package_says_what_to_install(inside, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    for noise in ([], ["--dp-noise=3"]):
        assert refuse(capsys, "--dp=1", "--dp-clip=1", *noise) == (
            '--dp needs the package dp-accounting, which is not installed: pip install -e ".[dp]"')


def test_robust_aggregation_implies_equal_weights_and_says_where_it_is_the_mean(inside, capsys):
    for number, name in ((60, "c"), (90, "d")):
        site(name, range(number, number + 20))
    flags = ["--data=a.zip,b.zip,c.zip,d.zip", "--aggregation=trimmed-mean", "--trim=0.3"]
    prepared = prepare(capsys, *flags)
    found = prepared.config.federation
    assert (found.aggregation, found.trim, found.weights, found.ema) == ("trimmed-mean", 0.3, "equal", "sites")
    assert prepared.warnings == (
        "note: with --aggregation=trimmed-mean, that of the sites' moving averages of the generator is only "
        "approximately the moving average of the server's generator; with --ema=server it is updated once per round",)
    prepared = prepare(capsys, *flags, "--ema=server", "--rounds=5", "--join=c:3,d:4")
    assert prepared.warnings == (
        "note: --aggregation=trimmed-mean is the mean in 2 rounds (the first is round 1), where fewer than three sites "
        "take part",)


def test_joins_may_be_listed_or_repeated(inside, capsys):
    site("c", range(60, 80))
    for flags in (["--join=b:2,c:3"], ["--join=b:2", "--join=c:3"]):
        schedule = prepare(capsys, "--data=a.zip,b.zip,c.zip", *flags).schedule
        assert [schedule.members(number) for number in (1, 2, 3)] == [["a"], ["a", "b"], ["a", "b", "c"]]


def test_default_length_of_a_round_is_the_smallest_set_or_the_mean(inside, capsys):
    assert prepare(capsys).config.federation.round_kimg == 0.02
    assert prepare(capsys, "--local=proportional").config.federation.round_kimg == 0.025


@pytest.mark.parametrize(("flags", "message"), [
    ("--outdir=", "--outdir is empty; expected PATH"),
    ("--data=a.zip,,b.zip", "--data has an empty path; expected data sets separated by commas, such as "
     "--data=a.zip,b.zip"),
    ("--data=a.zip,gone.zip", "gone.zip does not exist; expected a data set: a zip or a folder of images"),
    ("--kimg=5", "--kimg is 5; expected --rounds and --round-kimg, which set the length of the training: leave --kimg "
     "out"),
    ("--rounds=0", "--rounds is 0; expected a number >= 1"),
    ("--round-kimg=0", "--round-kimg is 0.0; expected a number > 0"),
    ("--round-kimg=0.015", "--round-kimg is 0.015, so site a would see 15 images in a round; expected at least one "
     "iteration of --batch=16: try --round-kimg=0.016"),
    ("--sites=a", "--sites=a has 1 name for 2 data sets; expected one name for each data set of --data"),
    ("--sites=a,A", "--sites=a,A names two sites A; expected different names, also without regard to case"),
    ("--sites=a,../b", "--sites=a,../b names a site '../b'; expected letters, digits, '.', '_' and '-', starting with "
     "a letter or digit"),
    ("--share=D", "--share is 'D'; expected one of G,D, G"),
    ("--gpus=0", "--gpus is 0; expected at least 1"),
    ("--gpus=3", "--gpus is 3 for 2 sites; expected at most 2: one process trains a site"),
    ("--join=c:2", "--join names c, which is not a site; expected one of a, b"),
    ("--join=b:5", "--join has b:5, but --rounds is 3; expected a round from 1 to 3"),
    ("--server-lr=0.5", "--server-lr is 0.5 with --server-optimizer=fedavg; expected fedavgm or fedadam: set it, or "
     "leave --server-lr out"),
    ("--server-momentum=0.5", "--server-momentum is 0.5 with --server-optimizer=fedavg; expected fedavgm or fedadam: "
     "set it, or leave --server-momentum out"),
    ("--server-tau=0.1 --server-optimizer=fedavgm", "--server-tau is 0.1 with --server-optimizer=fedavgm; expected "
     "fedadam: set it, or leave --server-tau out"),
    ("--server-beta2=0.9 --server-optimizer=fedavgm", "--server-beta2 is 0.9 with --server-optimizer=fedavgm; expected "
     "fedadam: set it, or leave --server-beta2 out"),
    ("--trim=0.2", "--trim is 0.2 with --aggregation=mean; expected trimmed-mean: set it, or leave --trim out"),
    ("--trim=0.5 --aggregation=trimmed-mean", "--trim is 0.5; expected a number > 0 and < 0.5"),
    ("--aggregation=median", "--aggregation is median for 2 sites; expected at least 3 sites, since of fewer it is the "
     "mean: leave it out"),
    ("--aggregation=median --weights=images --data=a.zip,b.zip,c.zip", "--weights is 'images'; expected equal with "
     "--aggregation=median, which has no weights"),
    ("--dp-clip=1", "--dp-clip is 1 without --dp=1; expected differential privacy: add --dp=1, or leave --dp-clip out"),
    ("--dp-noise=2.5", "--dp-noise is 2.5 without --dp=1; expected differential privacy: add --dp=1, or leave "
     "--dp-noise out"),
    ("--dp-epsilon=8 --dp=0", "--dp-epsilon is 8 without --dp=1; expected differential privacy: add --dp=1, or leave "
     "--dp-epsilon out"),
    ("--dp-delta=0.001", "--dp-delta is 0.001 without --dp=1; expected differential privacy: add --dp=1, or leave "
     "--dp-delta out"),
    ("--dp=1", "--dp-clip is missing; expected it with --dp=1: Update/norm/NAME in server/stats.jsonl of a run without "
     "--dp, on phantoms or public images, shows which norms are usual"),
    ("--dp=1 --dp-clip=0", "--dp-clip is 0.0; expected a number > 0"),
    ("--dp=1 --dp-clip=1 --dp-noise=inf", "--dp-noise is inf; expected a finite number or null"),
    ("--dp=1 --dp-clip=1 --dp-epsilon=-1", "--dp-epsilon is -1.0; expected a number > 0"),
    ("--dp=1 --dp-clip=1 --dp-delta=1", "--dp-delta is 1.0; expected a number > 0 and < 1"),
    ("--dp=1 --dp-clip=1 --dp-noise=2 --dp-epsilon=8", "--dp-epsilon is 8 with --dp-noise=2; expected one of the two, "
     "since either follows from the other: leave one out"),
    ("--dp=1 --dp-clip=1 --ema=sites", "--ema is 'sites'; expected server with --dp, so that less is sent that needs "
     "noise"),
    ("--dp=1 --dp-clip=1 --weights=images", "--weights is 'images'; expected equal with --dp, since the others depend "
     "on the data"),
    ("--dp=1 --dp-clip=1 --local=proportional", "--local is 'proportional'; expected equal with --dp, since the other "
     "tells numbers of images"),
    ("--dp=1 --dp-clip=1 --share-statistics", "--share-statistics is given with --dp=1, which does not cover what it "
     "sends; expected --holdout=SET in its place, or no --dp"),
    ("--max-update-norm=1", "--max-update-norm is 1.0; expected a number > 1"),
    ("--freezed=2", "--freezed is 2 without --resume; expected a network to start from: add --resume, or leave "
     "--freezed out"),
    ("--metrics=fid50k_full", "--metrics is given without images to compare with; expected --holdout=SET, a data set "
     "that no site trains on, or --share-statistics: add one, or leave --metrics out"),
    ("--per-class=1 --cond=1", "--per-class is given without images to compare with; expected --holdout=SET, a data "
     "set that no site trains on, or --share-statistics: add one, or leave --per-class out"),
    ("--detector=random-conv --metrics=none", "--detector is given without images to compare with; expected "
     "--holdout=SET, a data set that no site trains on, or --share-statistics: add one, or leave --detector out"),
    ("--holdout=h.zip --metrics=none", "--holdout=h.zip is given with --metrics=none; expected metrics that use it, "
     "such as --metrics=fid50k_full: leave out one of the two"),
    ("--holdout=h.zip --share-statistics", "--share-statistics is given with --holdout=h.zip; expected one of the two, "
     "since --metrics compare with either"),
    ("--per-class=1 --share-statistics", "--per-class is true with --share-statistics, which are of all classes "
     "together; expected --holdout=SET in its place, or no --per-class"),
    ("--metrics=kid5 --detector=random-conv --share-statistics", "--metrics has kid5, which cannot be computed from "
     "--share-statistics; expected fid metrics alone, such as fid50k_full: leave out the others, or "
     "--share-statistics"),
    ("--metrics=fid5_full --detector=random-conv --share-statistics", "--data: a.zip (site a) has 20 images; expected "
     "at least 100 with --share-statistics, since the statistics of fewer tell too much about each"),
    ("--metrics=kid5 --detector=random-conv --holdout=h.zip --per-class=1", "--per-class is true without --cond=1; "
     "expected networks that know the classes: add --cond=1, or leave --per-class out"),
])
def test_mistake_is_refused_by_name(flags, message, inside, capsys):
    site("h", range(60, 70))
    assert refuse(capsys, *flags.split()) == message


@pytest.mark.parametrize("name", ["outdir", "data", "rounds"])
def test_missing_flags_are_named(name, inside, capsys):
    code = run(federate.main, ["simulate", *(flag for flag in BASE if not flag.startswith(f"--{name}="))])
    assert (code, capsys.readouterr().err) == (2, (
        f"error: --{name} is missing; expected --outdir, --data and --rounds, such as --outdir=runs "
        "--data=a.zip,b.zip,c.zip --rounds=100: see --help\n"))


def test_command_has_to_be_named(capsys):
    assert run(federate.main, []) == 2
    assert capsys.readouterr() == ("", "error: Missing command.\n")


def test_file_names_that_name_no_site_ask_for_names(inside, capsys):
    (inside / "more").mkdir()
    (inside / "a.zip").rename(inside / "more/b.zip")
    assert refuse(capsys, "--data=b.zip,more/b.zip") == (
        "--data names two sites b; expected different names, also without regard to case: name the sites with --sites, "
        "such as --sites=a,b,c")
    (inside / "b.zip").rename(inside / "my b.zip")
    assert refuse(capsys, "--data=more/b.zip,my b.zip") == (
        "--data names a site 'my b'; expected letters, digits, '.', '_' and '-', starting with a letter or digit: name "
        "the sites with --sites, such as --sites=a,b,c")
    assert prepare(capsys, "--data=more/b.zip,my b.zip", "--sites=a,b").config.federation.sites == ("a", "b")


def test_metrics_compare_with_the_holdout_and_are_left_out_without(inside, capsys):
    site("h", range(60, 70))
    assert prepare(capsys).config.metrics == prepare(capsys, "--metrics=none").config.metrics == ()
    prepared = prepare(capsys, *METRICS, "--holdout=h.zip")
    assert (prepared.config.metrics, prepared.holdout) == (("kid5",), "h.zip")
    for name, images in (("c", range(100, 200)), ("d", range(200, 300))):
        site(name, images, size=8)
    prepared = prepare(capsys, "--data=c.zip,d.zip", "--share-statistics", "--metrics=fid5_full", METRICS[1])
    assert (prepared.config.metrics, prepared.share_statistics) == (("fid5_full",), True)


def test_flags_are_those_of_train_and_more(inside):
    command = federate.main.commands["simulate"]
    flags = {flag.name: flag for flag in command.params}
    assert len(flags) == len(command.params)
    theirs = {flag.name: flag for flag in TRAIN_FLAGS}
    assert theirs.keys() - flags.keys() == {"subset"}
    other = {name for name in theirs.keys() & flags.keys() if flags[name] is not theirs[name]}
    assert other == {"data", "cond", "kimg", "snap", "gpus", "metrics", "batch"}
    names = {field.name for field in fields(FederationConfig)}
    assert flags.keys() - theirs.keys() == names | {"holdout", "share_statistics"}


def test_help_shows_groups_and_the_defaults_that_are_used(inside, capsys):
    assert run(federate.main, ["simulate", "--help"]) == 0
    text = capsys.readouterr().out
    titles = [line.rstrip(":") for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["What and where", "Data", "Rounds and sites", "The server", "Differential privacy",
                      "Networks and training", "Augmentation", "Starting from a trained network", "Speed and devices",
                      "Other"]
    words = " ".join(text.split())
    assert "--kimg " not in words
    context = click.Context(federate.main.commands["simulate"])
    for flag in context.command.params:
        field = FederationConfig.__dataclass_fields__.get(flag.name)
        if field is not None and isinstance(field.default, (str, int, float)):
            assert f" [default: {show_value(field.default)}" in flag.help
    assert "--server-lr FLOAT Learning rate of fedavgm and fedadam. [default: 1 with fedavgm or 0.01 with fedadam]" in (
        words)
    assert run(federate.main, ["--help"]) == 0
    assert "simulate Simulate the institutions on one machine." in " ".join(capsys.readouterr().out.split())


# --dry-run


def test_dry_run_prints_rounds_and_images_of_each_site(inside, capsys, at_once):
    found, err = dry_run(capsys, "--cond=1", "--mirror=1", "--rounds=10", "--leave=b:4", "--join=b:2")
    assert err == ""
    prepared = prepare(capsys, "--cond=1", "--mirror=1", "--rounds=10", "--leave=b:4", "--join=b:2")
    settings = json.loads(json.dumps(describe_settings(prepared.config)))
    assert {name: found[name] for name in settings} == settings
    # 20 images a round at batch 16: iterations end at 32, 48, 64, 80, 112, ..., 208
    a, b = found["sites"]
    assert a == {"name": "a", "data": "a.zip", "images": 20, "items": 40, "classes": ["nv", "mel"], "rounds": 10,
                 "first_round": 1, "last_round": 10, "images_of_a_round": [16, 32], "images_in_all": 208}
    assert (b["rounds"], b["first_round"], b["last_round"], b["images_in_all"]) == (3, 2, 4, 80 - 32)
    assert (found["images"], found["rounds"], found["federation"]["round_kimg"]) == (256, 10, 0.02)
    assert found["federation"] == prepared.config.federation.to_dict() | {"join": ["b:2"], "leave": ["b:4"],
                                                                          "sites": ["a", "b"]}
    assert (found["run_folder"], found["continues"], found["already_finished"]) == (
        "runs/00000-2sites-cond-mirror-tiny", False, False)


@pytest.mark.parametrize("flags", [[], ["--share=G", "--ema=server"], ["--payload=bfloat16", "--cond=1"]])
def test_dry_run_counts_the_bytes_that_travel(flags, inside, capsys, at_once):
    sent, _ = dry_run(capsys, *flags, "--rounds=5", "--leave=b:2")
    config = prepare(capsys, *flags).config
    agreement = Agreement.of(meta_state(config), share=config.federation.share, ema=config.federation.ema,
                             payload=config.federation.payload, classes=("nv", "mel") if config.dataset.c_dim else None,
                             label_kind="class" if config.dataset.c_dim else None)
    each = agreement.num_bytes
    assert sent["bytes"] == {"to_a_site_in_a_round": each, "from_a_site_in_a_round": each, "to_a_site_at_its_start": 0,
                             "in_all": 2 * (5 + 2) * each}


def test_dry_run_shows_epsilon_and_how_much_larger_than_an_update_the_noise_is(inside, capsys, at_once):
    found, _ = dry_run(capsys, "--dp=1", "--dp-clip=0.5", "--rounds=8", "--leave=b:2")
    shown, agreement = found["privacy"], Agreement.of(
        meta_state(prepare(capsys).config), share="G,D", ema="server", payload="float32", classes=None, label_kind=None)
    count, noise = agreement.num_bytes // 4, find_noise(10, 8, 1e-5)
    assert shown.pop("protected").startswith("epsilon and delta bound what all updates of one institution")
    assert shown == {
        "clip": 0.5, "noise": noise, "delta": 1e-5, "rounds": 8, "noise_std": 0.5 * noise, "num_weights": count,
        "epsilon": {"a": epsilon_spent(noise, 8, 1e-5), "b": epsilon_spent(noise, 2, 1e-5)},
        "noise_norm": pytest.approx(0.5 * noise * count**0.5), "noise_to_update": pytest.approx(noise * count**0.5),
        "noise_to_update_in_the_mean": pytest.approx(noise * (count / 2)**0.5)}
    assert shown["epsilon"]["a"] == pytest.approx(10, abs=0.01)
    assert dry_run(capsys)[0]["privacy"] is None


def test_dry_run_counts_the_constants_of_a_network_to_start_from(inside, capsys, at_once):
    config = prepare(capsys).config
    state = TrainingState.create(config, "cpu")
    save_network("network.safetensors", Networks(G=state.G, D=state.D, G_ema=state.G_ema, config={}))
    found, _ = dry_run(capsys, "--resume=network.safetensors")
    agreement = Agreement.of(state, share="G,D", ema="sites", payload="float32", classes=None, label_kind=None)
    start = bytes_of(agreement.start, torch.float32)
    assert found["bytes"]["to_a_site_at_its_start"] == start > 0
    assert found["bytes"]["in_all"] == 2 * (2 * 3 * agreement.num_bytes + start)
    assert found["resume"] == "network.safetensors"


def test_dry_run_estimates_hours_in_turn_and_with_processes(inside, capsys, at_once):
    hours = dry_run(capsys, "--rounds=4", "--round-kimg=0.016")[0]["hours"]
    assert hours["seconds_per_kimg"] == pytest.approx(3.6 / 16 * 1000)
    assert hours["in_turn"] == hours["with_gpus"] == pytest.approx(2 * 4 * 0.001)  # of 3.6 seconds
    found, _ = dry_run(capsys, "--rounds=4", "--round-kimg=0.016", "--gpus=2", "--leave=b:1")
    hours = found["hours"]
    assert (hours["in_turn"], hours["with_gpus"]) == (pytest.approx(5 * 0.001), pytest.approx(4 * 0.001))
    assert found["gpus"] == 2
    assert hours["basis"].endswith("; processes on a CPU share its cores and save less time")


def test_dry_run_times_iterations_on_this_device(inside, capsys, one_thread):
    found, err = dry_run(capsys)
    assert found["hours"]["seconds_per_kimg"] > 0
    assert err == ""


def test_dry_run_says_that_timing_large_networks_takes_a_moment(inside, capsys, at_once):
    _, err = dry_run(capsys, "--cfg=stylegan2", "--round-kimg=0.032")
    assert err == "timing an iteration to estimate the hours, which takes a moment\n"


def test_iteration_is_timed_with_regularization_as_often_as_it_is_due(inside, capsys, monkeypatch):
    """Gmain and Dmain take a second, Greg two more, Dreg eight more: 1 + 2 / 4 + 8 / 16, for each of two passes."""
    clock = [0.0]

    def step(state, inputs, config):
        assert len(inputs.reals) == config.batch == config.micro_batch == 8
        clock[0] += 1 + 2 * ("Greg" in inputs.phases) + 8 * ("Dreg" in inputs.phases)

    monkeypatch.setattr(simulation_plan, "train_step", step)
    monkeypatch.setattr(simulation_plan, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    config = prepare(capsys, "--batch-gpu=8").config
    assert simulation_plan.time_iteration(config, "cpu") == 4.0

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(simulation_plan, "train_step", fail)
    assert simulation_plan.time_iteration(config, "cpu") is None


def test_dry_run_names_files_and_their_bytes(inside, capsys, at_once):
    found, _ = dry_run(capsys, "--rounds=200", "--snap=10", "--server-optimizer=fedadam")
    state = meta_state(prepare(capsys).config)
    sizes, files = state_bytes(state), found["files"]
    # 20 snapshots, of which those in the same thousand of images replace each other
    ends = {2 * 16 * math.ceil(rounds * 20 / 16) // 1000 for rounds in range(10, 201, 10)}
    assert files["server/network-snapshot-KKKKKK.safetensors"] == {
        "written": f"after every 10 rounds, and at the end; {len(ends)} in all", "bytes": sizes["network-snapshot"]}
    weights = sum(parameter.nbytes for network in (state.G, state.D) for parameter in network.parameters())
    assert files["server/training-state.pt"]["bytes"] == sizes["network-snapshot"] + 2 * weights
    assert files["site-NAME/training-state.pt"] == {"written": "after each round, and at least every 10 minutes",
                                                    "bytes": sizes["training-state"]}
    memory = found["memory_per_process"]
    assert memory["total"] == sum(memory[name] for name in (
        "weights", "averaged_generator", "adam", "gradients", "activations", "other_sites", "server"))


def test_dry_run_compares_files_if_pixel_hashes_are_not_recorded(inside, capsys, at_once):
    site("c", range(60, 80), hashes=False)
    found, err = dry_run(capsys, "--data=a.zip,c.zip")
    line = ("--data: institutions are compared file by file only, since pixel hashes are not recorded; training "
            "decodes all images, and rejects equal images in different files")
    assert err == f"{line}\n"
    assert line in found["notes"]
    site("c", [3, *range(60, 80)], hashes=False)
    assert refuse(capsys, "--data=a.zip,c.zip", "--dry-run").startswith(
        "--data: 1 of 21 images of c.zip (site c) are also in a.zip (site a), such as 00000/img00000000.png, which is "
        "00000/img00000003.png there")


# The start


def test_script_launches_several_processes_or_trains(inside, capsys, monkeypatch):
    done, prepared = [], prepare(capsys, "--gpus=2")
    monkeypatch.setattr(federate, "make_ready", lambda device: done.append(f"operators for {device}"))
    monkeypatch.setattr(federate, "launch", lambda count: done.append("launched") or 10 + count)
    monkeypatch.setitem(sys.modules, "federated.simulation",
                        SimpleNamespace(simulate=lambda *arguments: done.append(arguments) or 1))
    assert prepared.num_processes == 2
    assert federate.simulate(prepared) == 12
    assert done == ["operators for cpu", "launched"]  # built once, before the processes start
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert federate.simulate(prepared) == 1
    assert done[2:] == ["operators for cpu", (prepared, None)]


def test_work_is_shared_out_evenly_among_processes(inside, capsys):
    for name, start, count in (("c", 100, 60), ("d", 200, 20)):
        site(name, range(start, start + count))
    flags = ["--data=a.zip,b.zip,c.zip,d.zip", "--local=proportional"]
    assert prepare(capsys, *flags).sites_of_processes() == [["a", "b", "c", "d"]]
    # 60, 30, 20 and 20 images: c alone, then b, a and d
    assert prepare(capsys, *flags, "--gpus=2").sites_of_processes() == [["c"], ["a", "b", "d"]]
    assert prepare(capsys, *flags, "--gpus=4").sites_of_processes() == [["c"], ["b"], ["a"], ["d"]]


def test_run_is_identified_by_the_images_of_its_first_round(inside, capsys):
    site("c", range(60, 80))
    both = prepare(capsys).content_hash
    assert prepare(capsys, "--data=b.zip,a.zip").content_hash == both
    assert prepare(capsys, "--data=a.zip,b.zip,c.zip", "--join=c:2").content_hash == both
    assert prepare(capsys, "--data=a.zip,b.zip,c.zip").content_hash != both
    assert prepare(capsys, "--data=a.zip,c.zip").content_hash != both
    assert prepare(capsys, "--sites=a,x").content_hash != both


def test_alerts_are_shown_once_by_the_process_that_starts_the_others(inside, capsys, monkeypatch):
    site("c", range(60, 80), groups=["p1", "p2"] * 10)
    site("h", range(80, 90), groups=["p2"] * 10)
    command = make_simulate_command(lambda prepared: 7, choose_metrics)
    arguments = with_base(["--data=a.zip,c.zip", "--valid=h.zip"])
    assert run(command, arguments) == 7
    assert capsys.readouterr().err.startswith("warning: 1 groups (patients or lesions) of --valid=h.zip are also in")
    monkeypatch.setattr("torch_utils.distributed.find_launcher", lambda: 1)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run(command, arguments) == 7
    assert capsys.readouterr().err == ""


def test_metrics_of_the_server_compare_with_the_holdout(inside, capsys):
    site("h", range(60, 70))
    prepared = prepare(capsys, "--holdout=h.zip", "--metrics=kid8_full", "--detector=random-conv", "--cond=1")
    evaluate = make_evaluate(prepared.config, prepared.settings, prepared.holdout)
    state = TrainingState.create(prepared.config, "cpu")
    assert evaluate(state.G_ema, stop=lambda: False)["kid8_full"]["num_real"] == 10


def test_metrics_compare_with_shared_statistics_of_all_sites_and_of_each(inside, capsys):
    """The value against the union is that against the pooled images."""
    for name, images in (("c", range(100, 200)), ("d", range(200, 320)), ("pooled", range(100, 320))):
        site(name, images, labels=[image % 2 for image in images])
    flags = ["--data=c.zip,d.zip", "--metrics=fid50_full", "--detector=random-conv"]
    prepared = prepare(capsys, *flags, "--share-statistics")
    state = TrainingState.create(prepared.config, "cpu")
    alone = Processes(rank=0, count=1, device=torch.device("cpu"))
    found = collect_statistics(prepared, alone).evaluate(state.G_ema, stop=lambda: False)["fid50_full"]
    pooled = Evaluator("fid50_full", data="pooled.zip", detector="random-conv").evaluate(state.G_ema)["fid50_full"]
    assert found["results"]["fid50_full"] == pytest.approx(pooled["results"]["fid50_full"], rel=1e-9)
    assert (found["num_real"], found["num_real_of_sites"], sorted(found["sites"])) == (
        220, {"c": 100, "d": 120}, ["c", "d"])


def test_help_states_no_default_where_there_is_none(capsys):
    assert run(make_simulate_command(None, choose_metrics), ["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Required with --dp." in text
    assert "[default: None]" not in text
