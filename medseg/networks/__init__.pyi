from .blocks import Concatenate as Concatenate
from .blocks import ConvActNorm as ConvActNorm
from .blocks import Head as Head
from .blocks import InterpolateConv as InterpolateConv
from .blocks import MaxPool as MaxPool
from .blocks import PreActResidual as PreActResidual
from .blocks import TransposedConv as TransposedConv
from .blocks import he_normal as he_normal
from .unet import UNet as UNet

__all__ = [
    "Concatenate",
    "ConvActNorm",
    "Head",
    "InterpolateConv",
    "MaxPool",
    "PreActResidual",
    "TransposedConv",
    "UNet",
    "he_normal",
]
