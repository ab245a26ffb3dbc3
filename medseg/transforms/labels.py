"""What MONAI lacks for labels; to select, merge or renumber the values of a label map is its ``MapLabelValued``."""

from collections.abc import Hashable, Mapping

from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, convert_to_dst_type, convert_to_tensor


class MergeMasks(Transform):
    """Unite masks that lie in channels: 1 where any of them is not 0.

    It makes one mask of the channels that a :class:`medseg.data.SliceDataset` gives, or of femur, tibia and fibula. Put
    :class:`SelectChannels` before it to unite some of them.

    Shape:
        ``(M, *spatial)`` -> ``(1, *spatial)``, in the type of the masks; array for array, tensor for tensor, and a
        MetaTensor keeps its affine and meta.

    Source:
        Pröve 2017, the merged-bone model.

    Example:
        >>> import numpy as np
        >>> MergeMasks()(np.array([[0, 1, 0], [0, 1, 1]], np.uint8))
        array([[0, 1, 1]], dtype=uint8)
    """

    backend = (TransformBackends.TORCH, TransformBackends.NUMPY)

    def __call__(self, img: NdarrayOrTensor) -> NdarrayOrTensor:
        """Return the union."""
        united = (convert_to_tensor(img, track_meta=False) != 0).any(0, keepdim=True)
        return convert_to_dst_type(united, dst=img, dtype=img.dtype)[0]


class MergeMasksd(MapTransform):
    """Dictionary twin of :class:`MergeMasks`.

    Args:
        keys: the masks.
        allow_missing_keys: whether a key may be absent.

    Example:
        >>> import numpy as np
        >>> MergeMasksd("label")({"label": np.array([[1, 0, 0], [0, 0, 1]])})
        {'label': array([[1, 0, 1]])}
    """

    backend = MergeMasks.backend

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.merge = MergeMasks()

    def __call__(self, data: Mapping[Hashable, NdarrayOrTensor]) -> dict[Hashable, NdarrayOrTensor]:
        """Return the dictionary with its masks united."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.merge(result[key])
        return result
