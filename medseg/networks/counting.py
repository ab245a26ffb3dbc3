"""How many numbers a network holds."""

from torch import nn


def count_parameters(network: nn.Module, running_statistics: bool = False) -> int:
    """Return the number of trainable parameters.

    Args:
        network: whose parameters are counted; one that is used twice counts once.
        running_statistics: whether batch normalization's running mean and variance count too. Keras' summary counts
            them, 4 numbers per channel with scale and shift, and so do works that quote it.

    Example:
        >>> layers = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))
        >>> count_parameters(layers), count_parameters(layers, running_statistics=True)
        (96, 112)
    """
    count = sum(p.numel() for p in network.parameters() if p.requires_grad)
    if running_statistics:
        names = ("running_mean", "running_var")
        count += sum(b.numel() for name, b in network.named_buffers() if name.rpartition(".")[2] in names)
    return count
