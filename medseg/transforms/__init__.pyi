from .augmentation import LesionVariant as LesionVariant
from .augmentation import LesionVariantd as LesionVariantd
from .augmentation import kits_augmentation as kits_augmentation
from .augmentation import knee_augmentation as knee_augmentation
from .augmentation import petct_augmentation as petct_augmentation
from .augmentation import prostate_augmentation as prostate_augmentation
from .augmentation import tutorial_augmentation as tutorial_augmentation
from .bias_field import N4BiasFieldCorrection as N4BiasFieldCorrection
from .bias_field import N4BiasFieldCorrectiond as N4BiasFieldCorrectiond
from .centroids import CentroidDistances as CentroidDistances
from .centroids import CentroidDistancesd as CentroidDistancesd
from .centroids import mean_centroids as mean_centroids
from .centroids import region_centroids as region_centroids
from .channels import SelectChannels as SelectChannels
from .channels import SelectChannelsd as SelectChannelsd
from .dense_crf import DenseCRF as DenseCRF
from .dense_crf import DenseCRFd as DenseCRFd
from .dicom_window import DicomWindow as DicomWindow
from .dicom_window import DicomWindowd as DicomWindowd
from .dicom_window import RescaleTo8Bit as RescaleTo8Bit
from .dicom_window import RescaleTo8Bitd as RescaleTo8Bitd
from .intensity import HounsfieldWindow as HounsfieldWindow
from .intensity import HounsfieldWindowd as HounsfieldWindowd
from .joint_center import CropToJointCenter as CropToJointCenter
from .joint_center import CropToJointCenterd as CropToJointCenterd
from .joint_center import JointCenter as JointCenter
from .joint_center import find_joint_center as find_joint_center
from .joint_center import joint_center_of_bones as joint_center_of_bones
from .labels import MergeMasks as MergeMasks
from .labels import MergeMasksd as MergeMasksd
from .normalization import PopulationZScore as PopulationZScore
from .normalization import PopulationZScored as PopulationZScored
from .patch_sampling import RandVoxelPatches as RandVoxelPatches
from .patch_sampling import RandVoxelPatchesd as RandVoxelPatchesd
from .patches import CropFraction as CropFraction
from .patches import CropFractiond as CropFractiond
from .patches import LesionPatch as LesionPatch
from .patches import LesionPatchd as LesionPatchd
from .registration import Register as Register
from .registration import Registerd as Registerd
from .registration import Registration as Registration
from .slices import PadAndStrideSlices as PadAndStrideSlices
from .slices import PadAndStrideSlicesd as PadAndStrideSlicesd
from .slices import ResizeSlices as ResizeSlices
from .slices import ResizeSlicesd as ResizeSlicesd

__all__ = [
    "CentroidDistances",
    "CentroidDistancesd",
    "CropFraction",
    "CropFractiond",
    "CropToJointCenter",
    "CropToJointCenterd",
    "DenseCRF",
    "DenseCRFd",
    "DicomWindow",
    "DicomWindowd",
    "HounsfieldWindow",
    "HounsfieldWindowd",
    "JointCenter",
    "LesionPatch",
    "LesionPatchd",
    "LesionVariant",
    "LesionVariantd",
    "MergeMasks",
    "MergeMasksd",
    "N4BiasFieldCorrection",
    "N4BiasFieldCorrectiond",
    "PadAndStrideSlices",
    "PadAndStrideSlicesd",
    "PopulationZScore",
    "PopulationZScored",
    "RandVoxelPatches",
    "RandVoxelPatchesd",
    "Register",
    "Registerd",
    "Registration",
    "RescaleTo8Bit",
    "RescaleTo8Bitd",
    "ResizeSlices",
    "ResizeSlicesd",
    "SelectChannels",
    "SelectChannelsd",
    "find_joint_center",
    "joint_center_of_bones",
    "kits_augmentation",
    "knee_augmentation",
    "mean_centroids",
    "petct_augmentation",
    "prostate_augmentation",
    "region_centroids",
    "tutorial_augmentation",
]
