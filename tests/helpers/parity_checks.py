"""Compare this project with reference vectors: numbers that the original networks and ops computed.

Each check reads the vectors in a folder and yields measurements; tests/end_to_end/test_parity.py asserts them on those
in tests/data, tests/end_to_end/check_parity.py prints them for a complete folder. T(seed, *shape) stands for
numpy.random.RandomState(seed).randn(*shape).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from dnnlib.typed_config import ConfigError
from imagesets.resize import PixelSpec, crop_and_resize, crop_box
from tests.helpers.generator_files import rounded_share
from torch_utils.ops import upfirdn2d as upfirdn2d_module
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.bias_act_ref import ACTIVATIONS
from training import loss as losses
from training.ada import next_p
from training.augment import AugmentPipe
from training.config import AdamConfig, DatasetFacts, EmaConfig, LossConfig, StepConfig
from training.dataset import choose_subset
from training.discriminator import Discriminator
from training.dry_run import describe_settings
from training.generator import Generator
from training.layers import modulated_conv2d
from training.nvidia_pickle import read_nvidia_pickle
from training.options import TrainOptions, resolve
from training.phases import PHASES, PhaseInputs, StepInputs
from training.snapshot import load_network
from training.state import TrainingState, ema_beta, lazy_adam
from training.step import train_step

NETWORK_FILE = "sample_32_c2.stripped.pkl"
# The network vectors were computed in float32. What is computed in float64 here differs from them by their own error
# alone, the same on every machine: 6.1e-7 of the outputs, 1.3e-5 of the first and second derivatives at most. Outputs
# are computed in float32 too, as programs do: there each CPU and number of threads adds up in its own order. Seen with
# five instruction sets and one or two threads: 2.0e-6 at most; five times that is allowed. Such errors move an image by
# 2e-3 of a level, and with it as large a share of pixels to the next level at most.
FLOAT32_OUTPUTS = 1e-5
FLOAT64_OUTPUTS = 1e-6
ROUNDED_PIXELS = 3e-3
FLOAT32_DERIVATIVES = 2e-5


class Measurement(NamedTuple):
    """How far a number is from its reference, and how far it may be."""

    name: str
    error: float
    tolerance: float


def randn(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape))


def relative(found: Tensor, reference) -> float:
    """Return the largest difference, relative to the reference's largest value."""
    reference = torch.as_tensor(reference).double()
    found = found.detach().double()
    if found.shape != reference.shape:
        return float("inf")
    difference = (found - reference).abs().max().item()
    largest = reference.abs().max().item()
    return difference / largest if largest else difference


def one_hot(classes) -> Tensor:
    return nn.functional.one_hot(torch.as_tensor(classes), 2).float()


def load(folder: Path, name: str) -> tuple[dict, np.lib.npyio.NpzFile]:
    return json.loads((folder / f"{name}.json").read_text()), np.load(folder / f"{name}.npz")


def upfirdn2d(folder: Path, impl: str = "auto") -> Iterator[Measurement]:
    """All ops of the family; y, its gradient, and the gradient of the gradient's square."""
    cases, arrays = load(folder, "upfirdn2d")
    for case, given in cases.items():
        given = dict(given)
        op, v_seed, taps = given.pop("op", "upfirdn2d"), given.pop("v_seed", None), given.pop("filter")
        f = None if taps == "none" else torch.from_numpy(arrays[f"filter/{taps}"])
        x = torch.from_numpy(arrays["x"]).requires_grad_()
        y = getattr(upfirdn2d_module, op)(x, f, impl=impl, **given)
        yield Measurement(f"{case}/y", relative(y, arrays[f"{case}/y"]), 1e-9)
        if v_seed is None:
            continue
        v = randn(v_seed, *y.shape)
        gx, = torch.autograd.grad((y * v).sum(), x, retain_graph=True)
        yield Measurement(f"{case}/gx", relative(gx, arrays[f"{case}/gx"]), 1e-9)
        g1, = torch.autograd.grad((y.sin() * v).sum(), x, create_graph=True)
        gg, = torch.autograd.grad(g1.square().sum(), x)
        yield Measurement(f"{case}/gg", relative(gg, arrays[f"{case}/gg"]), 1e-9)


def bias_activations(folder: Path) -> Iterator[Measurement]:
    """Nine activations; y, gradients, and both parts of the second derivative."""
    cases, arrays = load(folder, "bias_act")
    inputs = {"nchw": 1.5 * randn(21, 2, 4, 3, 5), "nc": 1.5 * randn(22, 3, 4), "dim0": 1.5 * randn(23, 4, 3)}
    for case, given in cases.items():
        given = dict(given)
        x = inputs[given.pop("x")].clone().requires_grad_()
        b = (0.5 * randn(24, 4)).requires_grad_() if given.pop("bias") else None
        y = bias_act(x, b, **given)
        v = randn(300, *y.shape).requires_grad_()
        gx, *gb = torch.autograd.grad((y * v).sum(), [x] if b is None else [x, b], create_graph=True)
        gg_v, gg_x = torch.autograd.grad((gx * randn(301, *x.shape)).sum(), [v, x], materialize_grads=True)
        found = {"y": y, "gx": gx, "gg_v": gg_v, "gg_x": gg_x} | ({"gb": gb[0]} if gb else {})
        for name, value in found.items():
            yield Measurement(f"{case}/{name}", relative(value, arrays[f"{case}/{name}"]), 1e-9)


def activation_defaults(folder: Path) -> Iterator[Measurement]:
    table = json.loads((folder / "bias_act_defaults.json").read_text())
    found = {name: {"def_alpha": item.alpha, "def_gain": item.gain} for name, item in ACTIVATIONS.items()}
    yield Measurement("table", float(found != table), 0)


def modulated(folder: Path) -> Iterator[Measurement]:
    """y, the gradients, and the gradient wrt w of the square of the styles' gradient."""
    cases, arrays = load(folder, "modulated_conv2d")
    for case, given in cases.items():
        x, w, styles = (torch.from_numpy(arrays[name]).requires_grad_() for name in
                        ("x", f"w/k{given['kernel']}", "styles"))
        resolution = x.shape[2] * given["up"] // given["down"]
        noise = 0.3 * randn(44, len(x), 1, resolution, resolution).float() if given["noise"] else None
        y = modulated_conv2d(x, w, styles, noise=noise, up=given["up"], down=given["down"], padding=given["padding"],
                             resample_filter=torch.from_numpy(arrays["f"]), demodulate=given["demodulate"],
                             flip_weight=given["flip_weight"], fused_modconv=given["fused"])
        loss = (y * randn(500, *y.shape).float()).sum()
        gx, gw, gs = torch.autograd.grad(loss, [x, w, styles], create_graph=True)
        ggw, = torch.autograd.grad(gs.square().sum(), w)
        for name, value in {"y": y, "gx": gx, "gw": gw, "gs": gs, "ggw_of_gs2": ggw}.items():
            yield Measurement(f"{case}/{name}", relative(value, arrays[f"{case}/{name}"]), 1e-5)


def augment(folder: Path) -> Iterator[Measurement]:
    """Every augmentation at its quantiles, the gradients of all of bgc, and the wavelet filters; absolute errors."""
    cases, arrays = load(folder, "augment")

    def pipe(augmentations, **settings):
        return AugmentPipe(**dict.fromkeys(augmentations, 1), **settings)

    def absolute(found: Tensor, name: str) -> float:
        return (found.detach() - torch.from_numpy(arrays[name])).abs().max().item()

    for case, given in cases.items():
        given = dict(given)
        images, quantile = torch.from_numpy(arrays[given.pop("image")]), given.pop("debug_percentile")
        y = pipe(given.pop("augmentations"), **given)(images, debug_percentile=quantile)
        yield Measurement(case, absolute(y, f"{case}/y"), 1e-4)
    bgc = pipe("xflip rotate90 xint scale rotate aniso xfrac brightness contrast lumaflip hue saturation".split())
    images = torch.from_numpy(arrays["base"]).requires_grad_()
    v = torch.from_numpy(arrays["grad_bgc_0.4/v"])
    g, = torch.autograd.grad((bgc(images, debug_percentile=0.4).sin() * v).sum(), images, create_graph=True)
    gg, = torch.autograd.grad(g.square().sum(), images)
    yield Measurement("grad_bgc_0.4/g", absolute(g, "grad_bgc_0.4/g"), 1e-4)
    yield Measurement("grad_bgc_0.4/gg", absolute(gg, "grad_bgc_0.4/gg"), 1e-4)
    for name in ("Hz_geom", "Hz_fbank"):
        yield Measurement(f"buffer/{name}", absolute(getattr(bgc, name), f"buffer/{name}"), 1e-6)


def augment_statistics(folder: Path) -> Iterator[Measurement]:
    """What each augmentation does to one image in 1000 draws, in standard errors of the difference of two samples.

    The share of images left unchanged is binomial; the spread of the mean change is measured on our draws. 4 standard
    errors are kept by 120 such numbers with a probability of 99 %, and the draws here are seeded. A few draws in 1000
    are so small that it depends on the threshold, which is not recorded, whether they count as changes.
    """
    count, few = 1000, 5
    table = json.loads((folder / "augment_statistics.json").read_text())
    image = torch.from_numpy(np.load(folder / "augment.npz")["base"])[:1, :, 4:28, 4:28]
    images = image.expand(count, -1, -1, -1)
    for name, row in table.items():
        augmentation, _, p = name.partition("_p")
        pipe = AugmentPipe(**{augmentation: 1})
        pipe.p.fill_(float(p))
        result = pipe(images, generator=torch.Generator().manual_seed(1))
        changes = (result - images).abs()
        share, expected = (changes.amax(dim=[1, 2, 3]) < 1e-3).double().mean().item(), row["share_unchanged"]
        spread = max((2 * expected * (1 - expected) / count) ** 0.5, few / count)
        yield Measurement(f"{name} share", abs(share - expected) / spread, 4)
        means = changes.double().mean(dim=[1, 2, 3])
        spread = max((2 / count) ** 0.5 * means.std().item(), 1e-6)  # the original's geometry moves values by 1e-7
        yield Measurement(f"{name} change", abs(means.mean().item() - row["mean_abs_change"]) / spread, 4)


def network_outputs(folder: Path) -> Iterator[Measurement]:
    """Latents, images and logits of the network file, in both precisions, and its pixels."""
    arrays = np.load(folder / "net_sample_32_c2.npz")
    networks = load_network(folder / NETWORK_FILE)
    G, D = networks.G_ema, networks.D
    with torch.no_grad():
        for name in (name for name in arrays.files if name.startswith("generate_uint8")):
            seed, psi = int(name.split("_")[2].removeprefix("seed")), float(name.rpartition("psi")[2])
            img = G(randn(seed, 1, G.z_dim), one_hot([1]), truncation_psi=psi, noise_mode="const")
            pixels = (img[0].permute(1, 2, 0) * 127.5 + 128).clamp(0, 255).to(torch.uint8)
            yield Measurement(f"{name} (share of values one level off)", rounded_share(pixels, arrays[name]),
                              ROUNDED_PIXELS)
        yield from _outputs(G, D, arrays, "", FLOAT32_OUTPUTS)
        yield from _outputs(G.double(), D.double(), arrays, " (float64)", FLOAT64_OUTPUTS)


def _outputs(G: Generator, D: Discriminator, arrays, note: str, tolerance: float) -> Iterator[Measurement]:
    dtype = G.mapping.w_avg.dtype
    z, c, D_img, D_c = (torch.from_numpy(arrays[name]).to(dtype) for name in ("z", "c", "D_img", "D_c"))
    found = {
        "w_psi1.0": G.mapping(z, c), "w_psi0.7": G.mapping(z, c, truncation_psi=0.7),
        "w_psi0.7_cutoff4": G.mapping(z, c, truncation_psi=0.7, truncation_cutoff=4),
        "img_const_psi1.0": G(z, c, noise_mode="const"), "img_none_psi1.0": G(z, c, noise_mode="none"),
        "img_const_psi0.7": G(z, c, truncation_psi=0.7, noise_mode="const"),
        "img_const_psi0.7_cutoff4": G(z, c, truncation_psi=0.7, truncation_cutoff=4, noise_mode="const"),
        "D_logits": D(D_img, D_c), "D_logits_on_G_psi1.0": D(G(z, c, noise_mode="const"), c),
        **{f"D_logits_first{n}": D(D_img[:n], D_c[:n]) for n in (4, 3, 1)},
    }
    for name, value in found.items():
        yield Measurement(name + note, relative(value, arrays[name]), tolerance)


def network_training(folder: Path) -> Iterator[Measurement]:
    """Losses of the network file with the gradients of its parameters, and the moving average of w, in float64."""
    arrays = np.load(folder / "net_sample_32_c2.npz")
    networks = load_network(folder / NETWORK_FILE)
    G, D = networks.G.double().train(), networks.D.double().eval()
    z, c, D_img, D_c, noise = (torch.from_numpy(arrays[name]).double() for name in
                               ("z", "c", "D_img", "D_c", "pl_noise"))

    mapping = networks.G_ema.double().mapping.train()
    yield Measurement("w_avg_before", relative(mapping.w_avg, arrays["w_avg_before"]), 0)
    mapping(z, c)
    after = relative(mapping.w_avg, arrays["w_avg_after_one_train_call"])
    yield Measurement("w_avg_after_one_train_call", after, FLOAT32_DERIVATIVES)

    G.requires_grad_(True)
    D.requires_grad_(True)
    ws = G.mapping(z, c, skip_w_avg_update=True)
    lengths = losses.path_lengths(G, ws, noise, noise_mode="const")
    penalty = losses.path_length_penalty(lengths, torch.zeros([]).double(), 0.01)
    mean_length = losses.path_length_mean(torch.zeros([]).double(), lengths.mean(), 0.01)
    pl_loss = 2 * penalty.mean()
    jacobian, = torch.autograd.grad((G.synthesis(ws, noise_mode="const") * noise).sum(), ws, retain_graph=True)
    found = {"pl_ws": ws, "pl_lengths": lengths, "pl_penalty": penalty, "pl_mean_after": mean_length,
             "pl_loss_weight2": pl_loss, "pl_grads": jacobian, "pl_img": G.synthesis(ws, noise_mode="const")}

    reals = D_img.clone().requires_grad_()
    squared_norms = losses.squared_gradient(D(reals, D_c), reals)
    r1 = losses.r1_penalty(squared_norms, gamma=10).mean()
    r1_grads, = torch.autograd.grad(D(reals, D_c).sum(), reals)
    fakes = G.synthesis(G.mapping(z, c, skip_w_avg_update=True), noise_mode="const")
    gmain = losses.generator_losses(D(fakes, c)).mean()
    dmain = losses.fake_losses(D(fakes.detach(), c)).mean() + losses.real_losses(D(D_img[:4], D_c[:4])).mean()
    found |= {"r1_penalty": squared_norms, "r1_loss_gamma10": r1, "r1_grads": r1_grads, "gmain_loss": gmain,
              "dmain_loss": dmain}
    for name, value in found.items():
        yield Measurement(name, relative(value, arrays[name]), FLOAT32_DERIVATIVES)
    yield from _parameter_gradients("pl", pl_loss, G, arrays)
    yield from _parameter_gradients("r1", r1, D, arrays)
    yield from _parameter_gradients("gmain", gmain, G, arrays)
    yield from _parameter_gradients("dmain", dmain, D, arrays)


def _parameter_gradients(prefix: str, loss: Tensor, network: nn.Module, arrays) -> Iterator[Measurement]:
    names, parameters = zip(*network.named_parameters())
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True, retain_graph=True)
    for name, gradient in zip(names, gradients):
        for kind, value in (("grad", gradient), ("gradnorm", gradient.norm())):
            if f"{prefix}_{kind}/{name}" in arrays.files:
                error = relative(value, arrays[f"{prefix}_{kind}/{name}"])
                yield Measurement(f"{prefix}_{kind}/{name}", error, FLOAT32_DERIVATIVES)


def trajectory(folder: Path) -> Iterator[Measurement]:
    """The golden run: 17 whole iterations in float64."""
    arrays = np.load(folder / "trajectory_32_c2.npz")
    state, config = golden_start(folder)
    for iteration in range(17):
        result = train_step(state, golden_inputs(iteration), config)
        for phase, stats in result.stats.items():
            for name, values in stats.items():
                expected = arrays[f"loss/{phase}/{name}"][iteration]
                yield Measurement(f"loss/{phase}/{name}[{iteration}]", relative(values.mean(), expected), 1e-8)
        ran = {phase for phase in PHASES for key in arrays.files if key.startswith(f"loss/{phase}/")
               and not np.isnan(arrays[key][iteration])}
        yield Measurement(f"phases[{iteration}]", float(ran != set(result.stats)), 0)
        if f"iter{iteration + 1}/pl_mean" in arrays.files:
            yield from compare_state(state, f"iter{iteration + 1}", arrays)


def golden_start(folder: Path) -> tuple[TrainingState, StepConfig]:
    """Return where the golden run starts, and its configuration."""
    networks = load_network(folder / NETWORK_FILE)
    loss = LossConfig(r1_gamma=0.0256, pl_weight=2, g_reg_interval=4, d_reg_interval=16, style_mixing_prob=0,
                      noise_mode="const")
    config = StepConfig(batch=8, micro_batch=8, loss=loss, ema=EmaConfig(kimg=2.5, rampup=0.05))
    adam = AdamConfig(lr=0.0025)
    state = TrainingState.from_networks(networks.G.double(), networks.D.double(), networks.G_ema.double(),
                                        g_adam=adam, d_adam=adam, loss=loss)
    return state, config


def golden_inputs(iteration: int) -> StepInputs:
    """Return what the golden run feeds to an iteration."""
    members = np.arange(8)
    phases = {phase: PhaseInputs(z=randn(10000 + 10 * iteration + j, 8, 64),
                                 c=one_hot((members + iteration + j) % 2).double(),
                                 pl_noise=randn(30000 + iteration, 4, 3, 32, 32) if phase == "Greg" else None)
              for j, phase in enumerate(PHASES)}
    return StepInputs(reals=(0.5 * randn(20000 + iteration, 8, 3, 32, 32)).clamp(-1, 1),
                      labels=one_hot((members + iteration) % 2).double(), phases=phases)


def compare_state(state: TrainingState, prefix: str, arrays) -> Iterator[Measurement]:
    """Compare a state with what is stored of the golden run under "iterN", after iteration N."""
    for role in ("G", "D", "G_ema"):
        network = getattr(state, role)
        tensors = dict(network.named_parameters())
        tensors |= {name: buffer for name, buffer in network.named_buffers() if name.endswith("w_avg")}
        for name, tensor in tensors.items():
            key = f"{prefix}/{role}/{name}"
            yield Measurement(f"{key}/norm", relative(tensor.norm(), arrays[f"{key}/norm"]), 1e-8)
            # Sums can cancel: their error is compared with 1e-6 of themselves.
            yield Measurement(f"{key}/sum", relative(tensor.sum(), arrays[f"{key}/sum"]), 1e-6)
            if key in arrays.files:
                yield Measurement(key, relative(tensor, arrays[key]), 1e-8)
    yield Measurement(f"{prefix}/pl_mean", relative(state.pl_mean, arrays[f"{prefix}/pl_mean"]), 1e-8)
    with torch.no_grad():
        img = state.G_ema(randn(7, 2, 64), torch.eye(2), noise_mode="const")
    yield Measurement(f"{prefix}/G_ema_image", relative(img, arrays[f"{prefix}/G_ema_image"]), 1e-8)
    beta = ema_beta(8, state.nimg - 8, 2.5, 0.05)
    yield Measurement(f"{prefix}/ema_beta", abs(beta - arrays[f"{prefix}/ema_beta"].item()), 1e-12)


def architectures(folder: Path) -> Iterator[Measurement]:
    """Names, order, shapes and kinds of every parameter and buffer; the error is the number of rows that differ."""
    table = json.loads((folder / "state_architectures.json").read_text())
    frozen = table.pop("D_freeze_layers3_res32_buffers")
    for key, expected in table.items():
        architecture, c_dim, channels, resolution = key.split("_")
        c_dim, channels, resolution = (int(text.lstrip("chres")) for text in (c_dim, channels, resolution))
        sizes = {"channel_base": 1024, "channel_max": 64, "architecture": architecture}
        G = Generator(64, c_dim, 64, resolution, channels, {"num_layers": 3}, sizes)
        D = Discriminator(c_dim, resolution, channels, **sizes)
        for role, network in (("G", G), ("D", D)):
            yield Measurement(f"{key}/{role}", _different_rows(_layout(network), expected[role]), 0)
        yield Measurement(f"{key}/num_ws", abs(G.num_ws - expected["num_ws"]), 0)
    D = Discriminator(0, 32, 3, channel_base=1024, channel_max=64, block_kwargs={"freeze_layers": 3})
    yield Measurement("freeze_layers3", _different_rows([name for name, _ in D.named_buffers()], frozen), 0)


def auto_networks(folder: Path, resolution: int) -> Iterator[Measurement]:
    """The networks of cfg=auto at full size, on the meta device: names, sizes, and which blocks run in half."""
    table = json.loads((folder / f"state_res{resolution}_c2_auto.json").read_text())
    with torch.device("meta"):
        networks = {"G": Generator(**table["G_init_kwargs"]), "D": Discriminator(**table["D_init_kwargs"])}
    for role, network in networks.items():
        expected = [[row["name"], row["shape"], row["kind"]] for row in table[f"{role}_state"]]
        yield Measurement(f"{role}_state", _different_rows(_layout(network), expected), 0)
        number = sum(parameter.numel() for parameter in network.parameters())
        yield Measurement(f"{role}_num_params", abs(number - table[f"{role}_num_params"]), 0)
        half = [name for name, module in network.named_modules() if getattr(module, "half_dtype", None) is not None]
        yield Measurement(f"{role}_fp16_blocks", _different_rows(half, table[f"{role}_fp16_blocks"]), 0)
    order = [name for name, _ in [*networks["G"].named_parameters(), *networks["G"].named_buffers()]]
    yield Measurement("G_named_order", _different_rows(order, table["G_named_order"]), 0)
    yield Measurement("G_num_ws", abs(networks["G"].num_ws - table["G_num_ws"]), 0)


def _layout(network: nn.Module) -> list[list]:
    parameters = dict(network.named_parameters())
    return [[name, list(tensor.shape), "param" if name in parameters else "buffer"]
            for name, tensor in network.state_dict().items()]


def _different_rows(found: list, expected: list) -> int:
    return abs(len(found) - len(expected)) + sum(a != b for a, b in zip(found, expected))


def schedules(folder: Path) -> Iterator[Measurement]:
    """Moving average, augmentation steps, and Adam corrected for lazy regularization."""
    arrays = np.load(folder / "framework.npz")
    for nimg, beta in arrays["ema_beta/kimg10_batch32_ramp0.05_at_nimg"]:
        yield Measurement(f"ema_beta at {nimg:g}", abs(ema_beta(32, int(nimg), 10, 0.05) - beta), 1e-12)
    beta = arrays["ema_beta/kimg10_batch32_noramp"].item()
    yield Measurement("ema_beta without ramp-up", abs(ema_beta(32, 0, 10, None) - beta), 1e-12)
    for kimg in (500, 100):
        step = arrays[f"ada/adjust_per_update_batch32_interval4_kimg{kimg}"].item()
        for sign in (1, -1):
            error = abs(next_p(0.5, 0.6 + 0.1 * sign, 0.6, 32, 4, kimg) - (0.5 + sign * step))
            yield Measurement(f"ada kimg {kimg} {sign:+d}", error, 1e-12)
    for name, interval in (("G", 4), ("D", 16)):
        found = lazy_adam(AdamConfig(lr=0.0025), interval)
        expected = arrays[f"lazyreg/{name}_lr0.0025_interval{interval}"]
        error = np.abs(np.array([found["lr"], *found["betas"]]) - expected).max()
        yield Measurement(f"lazy Adam of {name}", error, 1e-12)
    filters = AugmentPipe(xflip=1)
    yield Measurement("wavelet/sym6", relative(filters.Hz_geom, arrays["wavelet/sym6_filter"]), 1e-6)


def transforms(folder: Path) -> Iterator[Measurement]:
    """Crops and resizes of an image; the error is the largest difference of two pixels."""
    arrays = np.load(folder / "framework.npz")
    image = PIL.Image.fromarray(arrays["transform/src"])
    for name in (name for name in arrays.files if name.startswith("transform/") and name != "transform/src"):
        kind, size, resize_filter = name.removeprefix("transform/").split("_")
        width, height = map(int, size.split("x"))
        spec = PixelSpec(width=width, height=height, transform=None if kind == "scale" else kind,
                         resize_filter=resize_filter, channels=3, exact=True)
        found = np.asarray(crop_and_resize(image, crop_box(image.size, spec), spec)).astype(int)
        yield Measurement(name, float(np.abs(found - arrays[name].astype(int)).max()), 0)


def subsets(folder: Path) -> Iterator[Measurement]:
    """Which images a subset takes; the error is the number of rows that differ."""
    arrays = np.load(folder / "framework.npz")
    for name in (name for name in arrays.files if name.startswith("subset/")):
        count, size, seed = (int(part.strip("nmaxsed")) for part in name.removeprefix("subset/").split("_"))
        yield Measurement(name, _different_rows(choose_subset(count, size, seed).tolist(), arrays[name].tolist()), 0)


def constructor_arguments(folder: Path) -> Iterator[Measurement]:
    """What the network file says of its networks; the error is 1 where it differs."""
    networks = read_nvidia_pickle(folder / NETWORK_FILE)
    for role, expected in json.loads((folder / "sample_32_c2.init.json").read_text()).items():
        yield Measurement(role, float(getattr(networks, role).arguments != expected["kwargs"]), 0)


def presets(folder: Path) -> Iterator[Measurement]:
    """Every row of the preset table; the error is 1 where a row differs."""
    for index, row in enumerate(json.loads((folder / "preset_table.json").read_text())):
        flags = {"cond": True, **row["flags"]}
        facts = DatasetFacts(name=f"ds{flags.pop('resolution')}", resolution=row["flags"]["resolution"], channels=3,
                             num_images=2, c_dim=2)
        if "metrics" in flags:
            flags["metrics"] = tuple(flags["metrics"])
        try:
            found = describe_settings(resolve(TrainOptions(**flags), facts))
        except ConfigError:
            found = {"error": True}
        yield Measurement(f"row {index}", float(found != row["resolved"]), 0)


def auto_presets(folder: Path) -> Iterator[Measurement]:
    """cfg=auto at every resolution and number of GPUs."""
    names = {"batch": "batch", "batch_gpu": "batch_gpu", "mbstd": "mbstd_group", "channel_base": "channel_base",
             "lr": "lr", "r1_gamma": "r1_gamma", "ema_kimg": "ema_kimg"}
    for row in json.loads((folder / "auto_config_table.json").read_text()):
        facts = DatasetFacts(name="ds", resolution=row["res"], channels=3, num_images=2, c_dim=2)
        found = describe_settings(resolve(TrainOptions(cfg="auto", gpus=row["gpus"], cond=True), facts))
        different = [name for name, ours in names.items() if found[ours] != row[name]]
        yield Measurement(f"{row['res']} on {row['gpus']}", len(different), 0)


# file -> its checks
CHECKS = {
    "upfirdn2d.npz": {"composed": upfirdn2d, "ref": lambda folder: upfirdn2d(folder, impl="ref")},
    "bias_act.npz": {"": bias_activations},
    "bias_act_defaults.json": {"": activation_defaults},
    "modulated_conv2d.npz": {"": modulated},
    "augment.npz": {"": augment},
    "augment_statistics.json": {"": augment_statistics},
    "net_sample_32_c2.npz": {"outputs": network_outputs, "training": network_training},
    "trajectory_32_c2.npz": {"": trajectory},
    "state_architectures.json": {"": architectures},
    "state_res32_c2_auto.json": {"": lambda folder: auto_networks(folder, 32)},
    "state_res256_c2_auto.json": {"": lambda folder: auto_networks(folder, 256)},
    "framework.npz": {"schedules": schedules, "transforms": transforms, "subsets": subsets},
    "sample_32_c2.init.json": {"": constructor_arguments},
    "preset_table.json": {"": presets},
    "auto_config_table.json": {"": auto_presets},
}
