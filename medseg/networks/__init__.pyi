from .batch_renorm import BatchRenorm as BatchRenorm
from .blocks import Concatenate as Concatenate
from .blocks import ConvActNorm as ConvActNorm
from .blocks import Head as Head
from .blocks import Heads as Heads
from .blocks import InterpolateConv as InterpolateConv
from .blocks import MaxPool as MaxPool
from .blocks import PreActResidual as PreActResidual
from .blocks import TransposedConv as TransposedConv
from .blocks import glorot_uniform as glorot_uniform
from .blocks import he_normal as he_normal
from .counting import count_parameters as count_parameters
from .deeplab import ASPP as ASPP
from .deeplab import DeepLabV3Plus as DeepLabV3Plus
from .deeplab import kits_deeplab as kits_deeplab
from .dense_blocks import AddProjected as AddProjected
from .dense_blocks import BottleneckLayer as BottleneckLayer
from .dense_blocks import DenseBlock as DenseBlock
from .dense_blocks import NormActConv as NormActConv
from .dense_blocks import ReducedConcatenate as ReducedConcatenate
from .dense_blocks import TransitionDown as TransitionDown
from .dense_blocks import TransitionUp as TransitionUp
from .dense_unet import DenseNetUNet as DenseNetUNet
from .dense_unet import DenseUNet as DenseUNet
from .dilated import DilatedCNN as DilatedCNN
from .encoders import BottleneckResNet as BottleneckResNet
from .encoders import InvertedResidual as InvertedResidual
from .encoders import MobileNetV2 as MobileNetV2
from .fc_densenet import FCDenseNet as FCDenseNet
from .fc_densenet import he_uniform as he_uniform
from .gcn import GCN as GCN
from .gcn import BoundaryRefinement as BoundaryRefinement
from .gcn import GlobalConv as GlobalConv
from .learnable_window import LearnableWindow as LearnableWindow
from .patch_classifiers import PatchByPatch as PatchByPatch
from .patch_classifiers import PatchClassifier as PatchClassifier
from .patch_classifiers import TriplanarClassifier as TriplanarClassifier
from .pspnet import KitsEncoder as KitsEncoder
from .pspnet import PSPNet as PSPNet
from .pspnet import PyramidPooling as PyramidPooling
from .pspnet import kits_pspnet_big as kits_pspnet_big
from .pspnet import kits_pspnet_small as kits_pspnet_small
from .receptive import receptive_field as receptive_field
from .unet import UNet as UNet
from .unet_presets import kits_unet2d as kits_unet2d
from .unet_presets import kits_unet3d as kits_unet3d
from .unet_presets import knee_unet as knee_unet
from .unet_presets import petct_unet as petct_unet
from .vnet import VNet as VNet
from .voxel_patches import patches_around as patches_around

__all__ = [
    "ASPP",
    "GCN",
    "AddProjected",
    "BatchRenorm",
    "BottleneckLayer",
    "BottleneckResNet",
    "BoundaryRefinement",
    "Concatenate",
    "ConvActNorm",
    "DeepLabV3Plus",
    "DenseBlock",
    "DenseNetUNet",
    "DenseUNet",
    "DilatedCNN",
    "FCDenseNet",
    "GlobalConv",
    "Head",
    "Heads",
    "InterpolateConv",
    "InvertedResidual",
    "KitsEncoder",
    "LearnableWindow",
    "MaxPool",
    "MobileNetV2",
    "NormActConv",
    "PSPNet",
    "PatchByPatch",
    "PatchClassifier",
    "PreActResidual",
    "PyramidPooling",
    "ReducedConcatenate",
    "TransitionDown",
    "TransitionUp",
    "TransposedConv",
    "TriplanarClassifier",
    "UNet",
    "VNet",
    "count_parameters",
    "glorot_uniform",
    "he_normal",
    "he_uniform",
    "kits_deeplab",
    "kits_pspnet_big",
    "kits_pspnet_small",
    "kits_unet2d",
    "kits_unet3d",
    "knee_unet",
    "patches_around",
    "petct_unet",
    "receptive_field",
]
