"""Small networks and configurations that several tests train."""

import torch

from training.config import AdaConfig, AdamConfig, EmaConfig, LossConfig, StepConfig
from training.discriminator import Discriminator
from training.generator import Generator
from training.phases import StepInputs, draw_phases
from training.sampling import LabelDistribution
from training.state import TrainingState

CLASSES = 2


def small_generator(resolution=16, channels=3, c_dim=CLASSES, seed=0, **synthesis):
    torch.manual_seed(seed)
    sizes = {"channel_base": 128, "channel_max": 16, **synthesis}
    G = Generator(8, c_dim, 12, resolution, channels, {"num_layers": 2}, sizes)
    for name, parameter in G.named_parameters():
        if name.endswith("noise_strength"):  # 0 at first, which would hide the noise from every test
            torch.nn.init.constant_(parameter, 0.3)
    return G


def small_discriminator(resolution=16, channels=3, c_dim=CLASSES, seed=1, **kwargs):
    torch.manual_seed(seed)
    return Discriminator(c_dim, resolution, channels, **{"channel_base": 128, "channel_max": 16, **kwargs})


def random_labels(count, c_dim=CLASSES):
    return torch.nn.functional.one_hot(torch.arange(count) % c_dim, c_dim).float()


def small_config(batch=8, micro_batch=8, ada=None, **loss):
    return StepConfig(batch=batch, micro_batch=micro_batch, ema=EmaConfig(kimg=0.1, rampup=0.5), ada=ada,
                      loss=LossConfig(**{"gamma": 0.5, "g_reg_interval": 2, "d_reg_interval": 3, **loss}))


def small_state(config, augment=None, dtype=torch.float32, **networks):
    G, D, G_ema = (network.to(dtype) for network in
                   (small_generator(**networks), small_discriminator(**networks), small_generator(**networks)))
    adam = AdamConfig(lr=0.002)
    return TrainingState.from_networks(G, D, G_ema, g_adam=adam, d_adam=adam, loss=config.loss, augment_pipe=augment)


def small_inputs(state, config, seed=0, microbatches=None, c_dim=CLASSES):
    """Draw the inputs of the next iteration of `state`, for all micro-batches or a range of them."""
    total = config.batch // config.micro_batch
    microbatches = range(total) if microbatches is None else microbatches
    G, dtype = state.G, state.pl_mean.dtype
    shape = (G.img_channels, G.img_resolution, G.img_resolution)
    rng = torch.Generator().manual_seed(1000 * seed + state.iteration)
    reals = (torch.randn(config.batch, *shape, generator=rng) * 0.4).clamp(-1, 1).to(dtype)
    labels = random_labels(config.batch, c_dim)
    rows = slice(microbatches.start * config.micro_batch, microbatches.stop * config.micro_batch)
    phases = draw_phases(config, seed=seed, nimg=state.nimg, iteration=state.iteration, microbatches=microbatches,
                         z_dim=G.z_dim, num_ws=G.num_ws, label_law=LabelDistribution(labels), image_shape=shape)
    return StepInputs(reals=reals[rows], labels=labels[rows], phases=phases)


def ada_config(**settings):
    return AdaConfig(**{"target": 0.6, "kimg": 0.5, "interval": 2, **settings})


