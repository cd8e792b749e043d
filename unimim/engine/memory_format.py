"""The order in memory of a network's weights."""

import torch
from torch import nn


@torch.no_grad()
def channels_last_weights(network: nn.Module) -> int:
    """Puts the kernels of all convolutions in channels-last order, which saves cuDNN a copy of each
    in every step, and returns how many there were.

    To be called before the optimizer is made, whose state takes the order of the weights.
    """
    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    kernels = [module.weight for module in network.modules() if isinstance(module, kinds)]
    for kernel in kernels:
        kernel.data = kernel.data.contiguous(memory_format=torch.channels_last)
    return len(kernels)
