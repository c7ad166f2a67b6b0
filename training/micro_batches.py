"""Cut the inputs of a phase into micro-batches, and refuse those that do not fit."""

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_utils.seeding import generator_for
from training.config import StepConfig
from training.step_inputs import PhaseInputs, StepInputs, path_length_images


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one forward and backward pass takes."""

    reals: Tensor  # [n, C, R, R]
    labels: Tensor  # [n, c_dim]
    inputs: PhaseInputs  # its tensors cut to this micro-batch
    cutoff: int  # ws from here on come from the second latents; L mixes nothing
    rng: torch.Generator | None  # for layer noise and whatever has many numbers, on the training device
    host_rng: torch.Generator | None  # for what augmentation decides about each image: `rng` itself where that will do


def cut(phase: str, batch: StepInputs, config: StepConfig, *, num_ws: int, augments: bool,
        device: torch.device) -> list[MicroBatch]:
    """Return the micro-batches of a phase. Raises ValueError for inputs that do not fit."""
    size, inputs, images = config.micro_batch, batch.phases[phase], len(batch.reals)
    if images == 0 or images % size:
        raise ValueError(f"a step got {images} images; expected a multiple of micro_batch, {size}")
    num = images // size
    rows = {"z": images, "c": images, "mix_z": images, "pl_noise": num * path_length_images(size, config.loss)}
    _check_rows(phase, batch, rows)
    _check_mixing(phase, inputs, num, num_ws)
    draws_noise = config.loss.noise_mode == "random" and phase != "Dreg"
    _check_seeds(phase, inputs, num, needed=augments or draws_noise)

    columns = {name: [None] * num if getattr(inputs, name) is None else getattr(inputs, name).chunk(num)
               for name in rows}
    generators = [_generators(seed, device) for seed in inputs.seeds] or [(None, None)] * num
    return [MicroBatch(
        reals=batch.reals[index * size:(index + 1) * size], labels=batch.labels[index * size:(index + 1) * size],
        inputs=PhaseInputs(**{name: values[index] for name, values in columns.items()}),
        cutoff=num_ws if inputs.mix_z is None else inputs.mix_cutoffs[index],
        rng=rng, host_rng=host_rng) for index, (rng, host_rng) in enumerate(generators)]


def _generators(seed: int, device: torch.device) -> tuple[torch.Generator, torch.Generator]:
    """Return a generator of the device and one of the host; they are one where the device is the host."""
    rng = generator_for(seed, device)
    return rng, rng if device.type == "cpu" else generator_for(seed)


def _check_rows(phase: str, batch: StepInputs, rows: dict[str, int]) -> None:
    inputs = batch.phases[phase]
    needed = {"Gmain": ["z", "c"], "Greg": ["z", "c", "pl_noise"], "Dmain": ["z", "c"], "Dreg": []}[phase]
    for name in needed:
        if getattr(inputs, name) is None:
            raise ValueError(f"{phase}: {name} is missing; expected {rows[name]} rows")
    found = {"labels": batch.labels, **{name: getattr(inputs, name) for name in rows}}
    for name, value in found.items():
        expected = rows.get(name, len(batch.reals))
        if value is not None and len(value) != expected:
            raise ValueError(f"{phase}: {name} has {len(value)} rows; expected {expected}")


def _check_mixing(phase: str, inputs: PhaseInputs, num: int, num_ws: int) -> None:
    if inputs.mix_z is None:
        return
    if len(inputs.mix_cutoffs) != num or not all(1 <= cutoff <= num_ws for cutoff in inputs.mix_cutoffs):
        raise ValueError(f"{phase}: mix_cutoffs are {list(inputs.mix_cutoffs)}; expected {num} from 1 to {num_ws}")


def _check_seeds(phase: str, inputs: PhaseInputs, num: int, *, needed: bool) -> None:
    if len(inputs.seeds) != num and (inputs.seeds or needed):
        raise ValueError(f"{phase}: there are {len(inputs.seeds)} seeds; expected {num}: layer noise and augmentation "
                         "draw from them")
