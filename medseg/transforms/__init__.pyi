from .channels import SelectChannels as SelectChannels
from .channels import SelectChannelsd as SelectChannelsd
from .intensity import HounsfieldWindow as HounsfieldWindow
from .intensity import HounsfieldWindowd as HounsfieldWindowd

__all__ = ["HounsfieldWindow", "HounsfieldWindowd", "SelectChannels", "SelectChannelsd"]
