"""Sum the gradients of several losses."""

import torch
from torch import Tensor


class GradientSum:
    """Gradients of the parameters of a network, added up over losses.

    As `backward` adds them up, in fewer operators, and without the gradients of what else the losses depend on: the
    images of a gradient penalty have one, which takes a pass through the whole augmentation.
    """

    def __init__(self, parameters: list[Tensor]):
        self.parameters = parameters
        self.sums: list[Tensor | None] = [None] * len(parameters)

    def add(self, loss: Tensor) -> None:
        """Add the gradients of a loss, and let go of its graph."""
        seen = set()  # two parameters may get one tensor, e.g. two biases of a sum
        places, values = [], []
        for i, gradient in enumerate(torch.autograd.grad(loss, self.parameters, allow_unused=True)):
            if gradient is None:
                continue
            if self.sums[i] is not None:
                places.append(self.sums[i])
                values.append(gradient)
            elif gradient.data_ptr() in seen or gradient.stride() != self.parameters[i].stride():
                self.sums[i] = torch.empty_like(self.parameters[i]).copy_(gradient)
            else:
                self.sums[i] = gradient
                seen.add(gradient.data_ptr())
        if places:
            torch._foreach_add_(places, values)

    def hand_over(self) -> None:
        """Let each parameter have its sum as its `grad`."""
        for parameter, total in zip(self.parameters, self.sums):
            # None for e.g. the last bias in a gradient penalty: its second moment decays all the same
            parameter.grad = torch.zeros_like(parameter) if total is None else total
