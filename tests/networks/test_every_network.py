"""What every network of medseg promises, whatever it is made of."""

import copy
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from monai.losses import DiceCELoss
from monai.networks import convert_to_torchscript
from torch import Tensor, nn

from medseg.networks import (
    GCN,
    BottleneckResNet,
    ConvActNorm,
    DeepLabV3Plus,
    DenseNetUNet,
    DenseUNet,
    DilatedCNN,
    FCDenseNet,
    Heads,
    KitsEncoder,
    LearnableWindow,
    MobileNetV2,
    PatchByPatch,
    PatchClassifier,
    PreActResidual,
    PSPNet,
    TriplanarClassifier,
    UNet,
    VNet,
    kits_deeplab,
    kits_pspnet_small,
    kits_unet2d,
    kits_unet3d,
    knee_unet,
)


@dataclass(frozen=True)
class Case:
    """A network, small enough to be tried in seconds, and images for it.

    Attributes:
        build: makes the network, for logits of `classes` channels.
        size: of an image that suits it, along each axis.
        odd: of one that does not, along each axis: odd, no multiple of anything.
        channels: of the image.
        classes: channels of the output.
        learning_rate, steps: with which it learns four images.
    """

    build: Callable[[], nn.Module]
    size: Sequence[int] = (32, 32)
    odd: Sequence[int] = (29, 37)
    channels: int = 1
    classes: int = 2
    learning_rate: float = 0.01
    steps: int = 60


NARROW_MOBILENET = partial(MobileNetV2, width=0.25)
NARROW_RESNET = partial(BottleneckResNet, layers=(1, 1, 1, 1), width=0.125)


def learnable_window_and_unet() -> nn.Module:
    window = LearnableWindow([(0, 4), (1, 2)], channel=1, scale=True, unit=10)
    return nn.Sequential(window, UNet(2, 3, 2, channels=(8, 16, 32)))


#: One line for each network, and for each variant that is made of other parts.
CASES = {
    "UNet 2d": Case(partial(UNet, 2, 1, 2, channels=(8, 16, 32))),
    "UNet 3d": Case(partial(UNet, 3, 1, 2, channels=(8, 16)), size=(16, 16, 8), odd=(13, 15, 7)),
    "UNet 2d, residual": Case(
        partial(UNet, 2, 1, 2, channels=(8, 16, 32), block=partial(PreActResidual, shortcut_norm="BATCH"))
    ),
    "UNet 2d, batch renormalization": Case(
        partial(
            UNet,
            2,
            1,
            2,
            channels=(8, 16),
            block=partial(ConvActNorm, norm=("BATCH_RENORM", {"momentum": 0.1, "r_ramp": (5, 30), "d_ramp": (5, 20)})),
        )
    ),
    "UNet 2d, two heads": Case(partial(UNet, 2, 1, 2, channels=(8, 16, 32), head=Heads)),
    "UNet 3d, deep supervision": Case(
        partial(UNet, 3, 1, 2, channels=(8, 16, 32), deep_supervision=1), size=(16, 16, 8), odd=(13, 15, 7)
    ),
    "kits_unet2d": Case(partial(kits_unet2d, 1, 2, channels=(8, 16, 32))),
    "kits_unet3d": Case(partial(kits_unet3d, 1, 2, channels=(8, 16, 32)), size=(16, 16, 8), odd=(13, 15, 7)),
    "knee_unet 2d": Case(partial(knee_unet, 2, 1, 2, width=16, depth=3)),
    "knee_unet 3d": Case(
        partial(knee_unet, 3, 1, 2, width=8, depth=2),
        size=(16, 16, 8),
        odd=(13, 15, 7),
        learning_rate=0.005,
        steps=80,
    ),
    "LearnableWindow and UNet": Case(learnable_window_and_unet, channels=2),
    "DeepLabV3Plus 2d": Case(
        partial(DeepLabV3Plus, 2, 1, 2, encoder=NARROW_MOBILENET, output_stride=8, channels=16, low_level_channels=8),
        size=(48, 48),
        odd=(45, 53),
        steps=30,
    ),
    "DeepLabV3Plus 3d, ResNet": Case(
        partial(DeepLabV3Plus, 3, 1, 2, encoder=NARROW_RESNET, channels=16, low_level_channels=8),
        size=(32, 32, 24),
        odd=(29, 35, 15),
        steps=90,
    ),
    "kits_deeplab": Case(partial(kits_deeplab, 2, 1, 2, encoder=NARROW_MOBILENET, channels=16), size=(48, 48)),
    "PSPNet 2d": Case(
        partial(PSPNet, 2, 1, 2, encoder=NARROW_RESNET, channels=16), size=(64, 64), odd=(45, 53), steps=45
    ),
    "kits_pspnet_small": Case(
        partial(kits_pspnet_small, 2, 1, 2, encoder=partial(KitsEncoder, channels=(8, 16, 32)), pyramid_channels=8)
    ),
    "kits_pspnet_small 3d": Case(
        partial(
            kits_pspnet_small,
            3,
            1,
            2,
            encoder=partial(KitsEncoder, channels=(4, 8, 16)),
            pyramid_channels=4,
            channels=16,
            dropout=0,
        ),
        size=(32, 32, 24),
        odd=(29, 35, 15),
        steps=75,
    ),
    "DenseUNet 2d": Case(partial(DenseUNet, 2, 1, 2, growth=2, layers=2, levels=3)),
    "DenseUNet 3d": Case(partial(DenseUNet, 3, 1, 2, growth=2, layers=2, levels=2), size=(16, 16, 8), odd=(13, 15, 7)),
    "DenseNetUNet 2d": Case(
        partial(DenseNetUNet, 2, 1, 2, growth=4, layers=(2, 2), stem_channels=8, channels=(32, 24, 16, 8))
    ),
    "DenseNetUNet 3d": Case(
        partial(DenseNetUNet, 3, 1, 2, growth=4, layers=(2,), stem_channels=8, channels=(16, 12, 8)),
        size=(16, 16, 8),
        odd=(13, 15, 7),
    ),
    "FCDenseNet 2d": Case(partial(FCDenseNet, 2, 1, 2, growth=4, layers=(2, 3), stem_channels=8)),
    "FCDenseNet 3d": Case(
        partial(FCDenseNet, 3, 1, 2, growth=4, layers=(2, 2), stem_channels=8), size=(16, 16, 8), odd=(13, 15, 7)
    ),
    "GCN 2d": Case(partial(GCN, 2, 1, 2, kernel_size=7, channels=(8, 16), layers=(1, 1)), steps=120),
    "GCN 3d": Case(
        partial(GCN, 3, 1, 2, kernel_size=5, channels=(8, 16), layers=(1, 1)), size=(16, 16, 8), odd=(13, 15, 7)
    ),
    "VNet 2d": Case(partial(VNet, 2, 1, 2, channels=(8, 16), layers=(1, 2))),
    "VNet 3d": Case(partial(VNet, 3, 1, 2, channels=(4, 8), layers=(1, 2)), size=(16, 16, 8), odd=(13, 15, 7)),
    "DilatedCNN 2d": Case(partial(DilatedCNN, 2, 1, 2, channels=8, features=16)),
    "DilatedCNN 3d": Case(
        partial(DilatedCNN, 3, 1, 2, channels=4, features=16, dilations=(1, 2, 4)), size=(16, 16, 8), odd=(13, 15, 7)
    ),
    "PatchClassifier 2d, two scales": Case(
        partial(PatchClassifier, 2, 1, 2, scales=[(9, 1), (5, 3)], convolutions=[(8, 3, 1), (8, 3, 1)], hidden=[16])
    ),
    "PatchClassifier 2d, MLP": Case(
        partial(PatchClassifier, 2, 1, 2, scales=[(11, 1)], convolutions=(), hidden=[32], act="RELU")
    ),
    "PatchClassifier 3d": Case(
        partial(PatchClassifier, 3, 1, 2, scales=[(7, 1)], convolutions=[(8, 3, 2)], hidden=[32], pool="AVG"),
        size=(16, 16, 8),
        odd=(13, 15, 7),
        learning_rate=0.02,
        steps=100,
    ),
    "TriplanarClassifier": Case(
        partial(TriplanarClassifier, 2, 2, [(7, 1), (3, 3)], convolutions=[(8, 3, 1)], hidden=[16], features=1),
        size=(16, 16, 8),
        odd=(13, 15, 7),
        channels=2,
        learning_rate=0.02,
    ),
    "PatchByPatch, planes as channels": Case(
        lambda: PatchByPatch(PatchClassifier(2, 3, 2, scales=[(7, 1)], convolutions=[(8, 3, 2)], hidden=[16]), True),
        size=(9, 10, 8),
        odd=(7, 9, 5),
        learning_rate=0.02,
        steps=100,
    ),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def make(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.build()


def settled(case: Case) -> nn.Module:
    """The network in eval mode, its running statistics those of images."""
    network = make(case)
    with torch.no_grad():
        for seed in range(3):
            network.train()(images(case, batch=4, seed=seed))
    return network.eval()


def images(case: Case, size: Sequence[int] | None = None, batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, case.channels, *(size or case.size), generator=generator)


def four_images(case: Case) -> tuple[Tensor, Tensor]:
    """Bright ellipsoids in noise, each elsewhere, and where they are: (4, C, *size), (4, 1, *size)."""
    generator = torch.Generator().manual_seed(3)
    axes = [torch.linspace(-1, 1, n) for n in case.size]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    masks = []
    for _ in range(4):
        center = (torch.rand(len(axes), generator=generator) - 0.5) * 0.8
        radii = 0.3 + 0.3 * torch.rand(len(axes), generator=generator)
        shape = (-1, *[1] * len(axes))
        masks.append((((grid - center.view(shape)) / radii.view(shape)) ** 2).sum(0) < 1)
    truth = torch.stack(masks)[:, None]
    noise = torch.randn(4, case.channels, *case.size, generator=generator)
    return noise + 2 * truth, truth.long()


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal up to a share of the largest number."""
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    scale = expected.abs().max().item()
    assert scale > 0, "a network that says nothing compares equal to anything"
    torch.testing.assert_close(found.float(), expected, atol=tolerance * scale, rtol=0)


def test_odd_sizes_are_kept(case):
    network = make(case)
    for size in (case.size, case.odd):
        for mode in (True, False):
            assert network.train(mode)(images(case, size)).shape[-len(size) :] == tuple(size)
    assert network(images(case, case.odd)).shape == (2, case.classes, *case.odd)


def test_every_parameter_learns(case):
    network = make(case).train()
    network(images(case, batch=4)).square().mean().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not without


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision(case, dtype, tolerance):
    network = settled(case)
    with torch.no_grad():
        expected = network(images(case))
        found = copy.deepcopy(network).to(dtype)(images(case).to(dtype))
        assert found.dtype == dtype
        close(found, expected, tolerance)
        with torch.autocast("cpu", dtype=dtype):
            close(network(images(case)), expected, tolerance)


def test_channels_last(case):
    network = settled(case)
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    image = images(case)
    kernels = {p.ndim for p in network.parameters()} & layouts.keys()  # a network of planes has kernels in 2D
    with torch.no_grad():
        expected = network(image)
        for ndim in kernels:
            network.to(memory_format=layouts[ndim])
        close(network(image.to(memory_format=layouts[image.ndim])), expected, 1e-4)


def test_compiles_as_one_graph(case):
    """With the whole of dynamo and autograd's tracing, but without the C++ compiler that inductor needs."""
    torch._dynamo.reset()
    network = settled(case)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    found = compiled(images(case))
    close(found.detach(), network(images(case)).detach(), 1e-4)
    found.square().mean().backward()
    by_dynamo = {name for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    network(images(case)).square().mean().backward()
    assert by_dynamo == {name for name, p in network.named_parameters() if p.grad is not None} != set()


def test_torchscript(case):
    network = settled(case)
    saved = io.BytesIO()
    torch.jit.save(convert_to_torchscript(network), saved)
    saved.seek(0)
    with torch.no_grad():
        for size in (case.size, case.odd):
            close(torch.jit.load(saved)(images(case, size)), network(images(case, size)), 1e-4)
            saved.seek(0)


def test_onnx(case, tmp_path):
    import onnxruntime

    network = settled(case)
    path = tmp_path / "network.onnx"
    torch.onnx.export(network, (images(case),), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: images(case, seed=9).numpy()})
    with torch.no_grad():
        close(torch.from_numpy(np.asarray(found)), network(images(case, seed=9)), 1e-3)


def test_learns_four_images(case):
    network = make(case).train()
    image, truth = four_images(case)
    optimizer = torch.optim.Adam(network.parameters(), lr=case.learning_rate)
    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    for _ in range(case.steps):
        optimizer.zero_grad()
        logits = network(image)
        heads = logits.unbind(1) if logits.ndim > image.ndim else [logits]
        sum(loss(head, truth) for head in heads).backward()
        optimizer.step()
    with torch.no_grad():
        for _ in range(20):  # let the running statistics come to rest
            network(image)
        found = network.eval()(image).argmax(1, keepdim=True)
    overlap = (found * truth).sum()
    assert 2 * overlap / (found.sum() + truth.sum()) > 0.95
