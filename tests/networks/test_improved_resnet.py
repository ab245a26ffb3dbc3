"""What normalizing the skip of improved ResNet layers changes, before any training (see the page improved_resnet)."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from medseg.networks import PreActResidual, UNet

RAW, NORMALIZED = None, "BATCH"
HU = 60.0  # about the spread of a CT which stays in HU within a window of 200


def network(norm: str | None, seed: int) -> UNet:
    torch.manual_seed(seed)
    return UNet(2, 2, 1, channels=(8, 16, 32, 64, 128), block=partial(PreActResidual, shortcut_norm=norm))


def image(seed: int) -> Tensor:
    return torch.randn(4, 2, 32, 32, generator=torch.Generator().manual_seed(seed))


def spreads(norm: str | None, seed: int, scale: float = 1.0) -> list[float]:
    """The root of the mean square of what each level of the encoder puts out, from the full size down."""
    x, seen = scale * image(seed), []
    for level in network(norm, seed).encoder:
        x = level(x)
        seen.append(x.square().mean().sqrt().item())
    return seen


def gradients(norm: str | None, seed: int, scale: float = 1.0) -> list[float]:
    """The norm of the loss's gradient for the kernels on the residual paths of each level, from the full size down."""
    model = network(norm, seed)
    truth = (torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(seed)) < 0.1).float()
    nn.functional.binary_cross_entropy_with_logits(model(scale * image(seed)), truth).backward()
    norms = []
    for level in model.encoder:
        layers = [layer for layer in level if isinstance(layer, PreActResidual)]
        kernels = [p.grad for layer in layers for p in layer.residual.parameters() if p.ndim == 4]
        norms.append(torch.cat([kernel.flatten() for kernel in kernels if kernel is not None]).norm().item())
    return norms


@pytest.mark.parametrize("seed", range(3))
class TestSkip:
    def test_raw_skips_hand_the_scale_of_the_image_to_every_level(self, seed: int) -> None:
        small, large = spreads(RAW, seed), spreads(RAW, seed, scale=1000 * HU)
        assert all(b / a > 100 * HU for a, b in zip(small, large, strict=True))

    def test_normalized_skips_do_not(self, seed: int) -> None:
        assert spreads(NORMALIZED, seed, scale=1000 * HU) == pytest.approx(spreads(NORMALIZED, seed), rel=0.01)

    def test_raw_skips_widen_the_spread_from_level_to_level(self, seed: int) -> None:
        seen = spreads(RAW, seed)
        assert all(deep > 1.1 * shallow for shallow, deep in pairwise(seen))
        assert seen[-1] > 3 * seen[0]

    def test_normalized_skips_keep_it(self, seed: int) -> None:
        seen = spreads(NORMALIZED, seed)
        assert 0.5 < seen[-1] / seen[0] < 1.5

    def test_raw_skips_and_a_ct_in_hu_starve_the_deep_levels_of_gradient(self, seed: int) -> None:
        norms = gradients(RAW, seed, scale=HU)
        assert all(deep < 0.1 * shallow for shallow, deep in pairwise(norms))
        assert norms[-1] < 1e-6 * norms[0]

    def test_normalized_skips_feed_them(self, seed: int) -> None:
        norms = gradients(NORMALIZED, seed, scale=HU)
        assert norms[-1] > 0.1 * norms[0]
