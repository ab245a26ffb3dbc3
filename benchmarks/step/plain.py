"""The networks that measure.py times, written plainly in torch: no parts to choose, no checks, fixed sizes.

Their layers stand in the order of medseg's, so that weights are copied one by one.
"""

import torch
from torch import Tensor, nn

LAYERS = {
    2: (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.ConvTranspose2d, nn.Dropout2d),
    3: (nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d, nn.ConvTranspose3d, nn.Dropout3d),
}


class PlainUNet(nn.Module):
    """The U-Net of table 4.3 of the PET/CT thesis, for images that halve evenly."""

    def __init__(self, dims: int, in_channels: int, out_channels: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        conv, norm, pool, transposed, _ = LAYERS[dims]

        def double(a: int, b: int) -> nn.Sequential:
            return nn.Sequential(
                conv(a, b, 3, padding=1),
                nn.ReLU(inplace=True),
                norm(b),
                conv(b, b, 3, padding=1),
                nn.ReLU(inplace=True),
                norm(b),
            )

        def up(a: int, b: int) -> nn.Sequential:
            return nn.Sequential(
                transposed(a, b, 3, stride=2, padding=1, output_padding=1), nn.ReLU(inplace=True), norm(b)
            )

        self.pool = pool(2)
        self.down = nn.ModuleList(double(a, b) for a, b in zip((in_channels, *channels), channels, strict=False))
        self.up = nn.ModuleList()
        for wide, narrow in zip(channels[:0:-1], channels[-2::-1], strict=True):
            self.up.append(nn.ModuleList([up(wide, narrow), double(2 * narrow, narrow)]))
        self.head = conv(channels[0], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        skips = []
        for level, blocks in enumerate(self.down):
            x = blocks(self.pool(x) if level else x)
            skips.append(x)
        skips.pop()
        for up, blocks in self.up:
            x = blocks(torch.cat((up(x), skips.pop()), 1))
        return self.head(x)


class PlainDenseUNet(nn.Module):
    """The small DenseUNet of the KiTS work, for images that halve evenly."""

    def __init__(self, dims: int, in_channels: int, out_channels: int, growth: int = 4, levels: int = 5) -> None:
        super().__init__()
        conv, norm, pool, _, dropout = LAYERS[dims]

        def layer(a: int, b: int, kernel: int = 3) -> nn.Sequential:
            parts = [norm(a), nn.ReLU(inplace=True), conv(a, b, kernel, padding=kernel // 2)]
            return nn.Sequential(*parts, dropout(0.05)) if kernel == 3 else nn.Sequential(*parts)

        def dense(a: int) -> nn.ModuleList:
            return nn.ModuleList(layer(a + i * (a // 4), a // 4) for i in range(4))

        width = 4 * growth
        self.pool = pool(2)
        self.repeat = nn.Upsample(scale_factor=2)
        self.stem = nn.Sequential(conv(in_channels, width, 3, padding=1), norm(width))
        self.down = nn.ModuleList(dense(width * 2**level) for level in range(levels))
        self.up = nn.ModuleList()
        for level in reversed(range(levels - 1)):
            b = width * 2 ** (level + 1)
            self.up.append(nn.ModuleList([layer(2 * b, b, 1), layer(2 * b, b // 2, 1), dense(b // 2)]))
        self.head = conv(2 * width, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.stem(x)
        skips = []
        for level, block in enumerate(self.down):
            x = run_dense(block, self.pool(x) if level else x)
            skips.append(x)
        skips.pop()
        for halve, quarter, block in self.up:
            x = run_dense(block, quarter(torch.cat((self.repeat(halve(x)), skips.pop()), 1)))
        return self.head(x)


def run_dense(block: nn.ModuleList, x: Tensor) -> Tensor:
    """Each layer sees the input and all features before it."""
    for layer in block:
        x = torch.cat((x, layer(x)), 1)
    return x


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy parameters and running statistics one by one, in their order."""
    pairs = zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    with torch.no_grad():
        for a, b in pairs:
            if a.shape != b.shape:
                raise ValueError(f"{tuple(a.shape)} does not go into {tuple(b.shape)}: the networks differ")
            b.copy_(a)
