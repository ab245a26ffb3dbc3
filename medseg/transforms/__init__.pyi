from .channels import SelectChannels as SelectChannels
from .channels import SelectChannelsd as SelectChannelsd
from .dicom_window import DicomWindow as DicomWindow
from .dicom_window import DicomWindowd as DicomWindowd
from .dicom_window import RescaleTo8Bit as RescaleTo8Bit
from .dicom_window import RescaleTo8Bitd as RescaleTo8Bitd
from .intensity import HounsfieldWindow as HounsfieldWindow
from .intensity import HounsfieldWindowd as HounsfieldWindowd

__all__ = [
    "DicomWindow",
    "DicomWindowd",
    "HounsfieldWindow",
    "HounsfieldWindowd",
    "RescaleTo8Bit",
    "RescaleTo8Bitd",
    "SelectChannels",
    "SelectChannelsd",
]
