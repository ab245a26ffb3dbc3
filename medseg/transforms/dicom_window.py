"""The window of the DICOM standard, and 8 bits for pictures."""

import math
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import MapTransform, Transform
from monai.transforms.utils_pytorch_numpy_unification import percentile
from monai.utils import TransformBackends, convert_to_dst_type, convert_to_tensor

from medseg.errors import ConfigError, MedsegError, MissingTagError

#: VOI LUT Function (0028,1056), and the least width that each allows (LINEAR) or must exceed.
_LEAST_WIDTH = {"LINEAR": 1.0, "LINEAR_EXACT": 0.0, "SIGMOID": 0.0}


class DicomWindow(Transform):
    """Map values to gray levels through a window, exactly as the DICOM standard says.

    With center ``c``, width ``w`` and the gray levels ``low`` and ``high``:

    - ``LINEAR``: ``low`` where ``x <= c - 0.5 - (w - 1) / 2``, ``high`` where ``x > c - 0.5 + (w - 1) / 2``, else
      ``((x - (c - 0.5)) / (w - 1) + 0.5) * (high - low) + low``. A width of 1 is a step.
    - ``LINEAR_EXACT``: ``low`` where ``x <= c - w / 2``, ``high`` where ``x > c + w / 2``, else
      ``((x - c) / w + 0.5) * (high - low) + low``.
    - ``SIGMOID``: ``(high - low) / (1 + exp(-4 * (x - c) / w)) + low``.

    The window applies to rescaled values (HU), as `medseg.io.read_image` gives them. The result is not rounded. NaN
    stays NaN; infinite values become ``low`` and ``high``. :class:`HounsfieldWindow`, the window of the PET/CT thesis,
    is ``LINEAR_EXACT`` from 0 to 1.

    Args:
        center: in the units of the image. Without center and width, they are the image's own: ``meta["window"]``, which
            `medseg.io.read_image` takes from the tags WindowCenter and WindowWidth.
        width: at least 1 for ``LINEAR``, else above 0.
        function: ``"LINEAR"``, ``"LINEAR_EXACT"`` or ``"SIGMOID"``. By default ``LINEAR`` for a given window, and what
            the tag VOILUTFunction says (``meta["window_function"]``) for the image's own.
        low: gray level below the window.
        high: gray level above the window.

    Shape:
        any -> the same, float32; array for array, tensor for tensor, and a MetaTensor keeps its affine and meta.

    Raises:
        ConfigError: a window that the function does not allow, center or width without the other.
        MissingTagError: neither is given, and the image has no window of its own, or an unusable one.

    Source:
        DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3; LINEAR is equation 4.2 of the prostate transfer learning thesis.

    Example:
        >>> DicomWindow(center=40, width=5)(torch.tensor([37.0, 38.5, 39.5, 40.5, 41.5, 90.0]))
        tensor([  0.0000,  63.7500, 127.5000, 191.2500, 255.0000, 255.0000])
        >>> from monai.data import MetaTensor
        >>> DicomWindow(high=1)(MetaTensor([0.0, 50.0, 100.0], meta={"window": (50.5, 101)})).as_tensor()
        tensor([0.0000, 0.5000, 1.0000])
    """

    backend = (TransformBackends.TORCH, TransformBackends.NUMPY)

    def __init__(
        self,
        center: float | None = None,
        width: float | None = None,
        function: str | None = None,
        low: float = 0,
        high: float = 255,
    ) -> None:
        if (center is None) != (width is None):
            raise ConfigError("a window needs center and width: give both, or neither for the image's own window")
        if function is not None and function not in _LEAST_WIDTH:
            raise ConfigError(f"window function {function!r}: expected one of {', '.join(_LEAST_WIDTH)}")
        if center is not None and (fault := _fault(center, width, function or "LINEAR")):
            raise ConfigError(fault)
        self.center, self.width, self.function = center, width, function
        self.low, self.high = low, high

    def __call__(self, img: NdarrayOrTensor) -> NdarrayOrTensor:
        """Return the gray levels, unrounded."""
        center, width, function = self._window(img)
        x = convert_to_tensor(img, dtype=torch.float64, track_meta=False)
        if function == "SIGMOID":
            gray = torch.sigmoid(4 * (x - center) / width)
        else:
            if function == "LINEAR":
                center, width = center - 0.5, width - 1
            # A width of 0, which is LINEAR's step, leaves nothing between the two bounds but NaN.
            gray = (x - center) / width + 0.5 if width else x * math.nan
            gray[x <= center - width / 2] = 0
            gray[x > center + width / 2] = 1
        gray = gray * (self.high - self.low) + self.low
        return convert_to_dst_type(gray, dst=img, dtype=torch.float32)[0]

    def _window(self, img: Any) -> tuple[float, float, str]:
        if self.center is not None and self.width is not None:
            return float(self.center), float(self.width), self.function or "LINEAR"
        meta: Mapping[str, Any] = getattr(img, "meta", {})
        center, width = (float(value) for value in meta.get("window", (math.nan, math.nan)))
        function = self.function or meta.get("window_function") or "LINEAR"
        file = f" of {meta['filename_or_obj']}" if meta.get("filename_or_obj") else ""
        if math.isnan(center) or math.isnan(width):
            raise MissingTagError(
                f"the image{file} has no window of its own (WindowCenter (0028,1050) and WindowWidth (0028,1051)): "
                "give center and width"
            )
        if fault := _fault(center, width, function):
            raise MissingTagError(f"the window of the image{file} is unusable: {fault}; give center and width")
        return center, width, function


class DicomWindowd(MapTransform):
    """Dictionary twin of :class:`DicomWindow`.

    Args:
        keys: the images.
        center: as there.
        width: as there.
        function: as there.
        low: as there.
        high: as there.
        allow_missing_keys: whether a key may be absent.

    Raises:
        ConfigError, MissingTagError: as there; the message names the key.

    Example:
        >>> DicomWindowd("image", 40, 5, high=1)({"image": torch.tensor([37.0, 39.5, 90.0])})
        {'image': tensor([0.0000, 0.5000, 1.0000])}
        >>> DicomWindowd("image")({"image": torch.zeros(1)})
        Traceback (most recent call last):
        medseg.errors.MissingTagError: image: the image has no window of its own ...: give center and width
    """

    backend = DicomWindow.backend

    def __init__(
        self,
        keys: KeysCollection,
        center: float | None = None,
        width: float | None = None,
        function: str | None = None,
        low: float = 0,
        high: float = 255,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.window = DicomWindow(center, width, function, low, high)

    def __call__(self, data: Mapping[Hashable, NdarrayOrTensor]) -> dict[Hashable, NdarrayOrTensor]:
        """Return the dictionary with its images as gray levels."""
        return _each(self, self.window, data)


class RescaleTo8Bit(Transform):
    """Rescale values linearly to 0 to 255, as ``uint8``: ``(p - min) * 255 / (max - min)``.

    The published formula divides by zero on a constant image; here that is 0 everywhere. NaN and infinite values do not
    count for the bounds; NaN becomes 0, and values beyond the bounds, infinite ones too, become 0 or 255. Halves are
    rounded to even (numpy's ``rint``).

    Args:
        a_min: the value that becomes 0. Without a_min and a_max, they are the percentiles ``lower`` and ``upper``.
        a_max: the value that becomes 255.
        lower: percentile, 0 for the minimum.
        upper: percentile, 100 for the maximum. Where both percentiles are the same value, as in a mask of few voxels,
            minimum and maximum stand in for them.
        channel_wise: whether every channel (first axis) has its own bounds; else the image has one pair.

    Shape:
        any -> the same, uint8; array for array, tensor for tensor, and a MetaTensor keeps its affine and meta.

    Raises:
        ConfigError: one bound without the other, bounds or percentiles that are not in ascending order.

    Source:
        Equation 4.4 of the prostate transfer learning thesis, with the guard that it lacks.

    Example:
        >>> RescaleTo8Bit()(torch.tensor([[-1000, 0, 1000], [1000, 1000, 1000]]))
        tensor([[  0, 128, 255],
                [255, 255, 255]], dtype=torch.uint8)
        >>> RescaleTo8Bit(channel_wise=True)(torch.tensor([[-1000, 0, 1000], [1000, 1000, 1000]]))
        tensor([[  0, 128, 255],
                [  0,   0,   0]], dtype=torch.uint8)
    """

    backend = (TransformBackends.TORCH, TransformBackends.NUMPY)

    def __init__(
        self,
        a_min: float | None = None,
        a_max: float | None = None,
        lower: float = 0,
        upper: float = 100,
        channel_wise: bool = False,
    ) -> None:
        if (a_min is None) != (a_max is None):
            raise ConfigError("a_min and a_max go together: give both, or neither for percentiles of the image")
        if a_min is not None and a_max is not None and not -math.inf < a_min < a_max < math.inf:
            raise ConfigError(f"a_min {a_min}, a_max {a_max}: expected two numbers, the first below the second")
        if not 0 <= lower < upper <= 100:
            raise ConfigError(f"lower {lower}, upper {upper}: expected percentiles, 0 <= lower < upper <= 100")
        self.a_min, self.a_max, self.lower, self.upper = a_min, a_max, lower, upper
        self.channel_wise = channel_wise

    def __call__(self, img: NdarrayOrTensor) -> NdarrayOrTensor:
        """Return the image with 8 bits."""
        values = convert_to_tensor(img, dtype=torch.float64, track_meta=False)
        if self.channel_wise and len(values):
            result = torch.stack([self._rescale(channel) for channel in values])
        else:
            result = self._rescale(values)
        return convert_to_dst_type(result, dst=img, dtype=torch.uint8)[0]

    def _rescale(self, values: torch.Tensor) -> torch.Tensor:
        low, high = self.bounds(values)
        if not low < high:
            return torch.zeros_like(values)
        return ((values - low) * 255 / (high - low)).clamp(0, 255).nan_to_num().round()

    def bounds(self, values: NdarrayOrTensor) -> tuple[float, float]:
        """Return the values that become 0 and 255; they are the same for a constant image.

        Example:
            >>> RescaleTo8Bit().bounds(torch.tensor([-3.0, 8.0, math.nan]))
            (-3.0, 8.0)
        """
        if self.a_min is not None and self.a_max is not None:
            return float(self.a_min), float(self.a_max)
        finite = convert_to_tensor(values, track_meta=False)
        if finite.is_floating_point():
            known = finite.isfinite()
            finite = finite if known.all() else finite[known]  # no copy of a whole volume where none is needed
        else:
            finite = finite.double()
        if not finite.numel():
            return 0.0, 0.0
        least, most = float(finite.min()), float(finite.max())
        low = float(percentile(finite, self.lower)) if self.lower > 0 else least
        high = float(percentile(finite, self.upper)) if self.upper < 100 else most
        return (least, most) if low == high else (low, high)


class RescaleTo8Bitd(MapTransform):
    """Dictionary twin of :class:`RescaleTo8Bit`.

    Args:
        keys: the images.
        a_min: as there.
        a_max: as there.
        lower: as there.
        upper: as there.
        channel_wise: as there.
        allow_missing_keys: whether a key may be absent.

    Example:
        >>> RescaleTo8Bitd("image")({"image": torch.tensor([2.0, 3.0, 7.0])})
        {'image': tensor([  0,  51, 255], dtype=torch.uint8)}
    """

    backend = RescaleTo8Bit.backend

    def __init__(
        self,
        keys: KeysCollection,
        a_min: float | None = None,
        a_max: float | None = None,
        lower: float = 0,
        upper: float = 100,
        channel_wise: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.rescale = RescaleTo8Bit(a_min, a_max, lower, upper, channel_wise)

    def __call__(self, data: Mapping[Hashable, NdarrayOrTensor]) -> dict[Hashable, NdarrayOrTensor]:
        """Return the dictionary with its images in 8 bits."""
        return _each(self, self.rescale, data)


def _each(
    mapped: MapTransform, transform: Transform, data: Mapping[Hashable, NdarrayOrTensor]
) -> dict[Hashable, NdarrayOrTensor]:
    result = dict(data)
    for key in mapped.key_iterator(result):
        try:
            result[key] = transform(result[key])
        except MedsegError as error:
            raise type(error)(f"{key}: {error}") from error
    return result


def _fault(center: float, width: float | None, function: str) -> str:
    """Return what is wrong with a window, nothing where it is sound."""
    if function not in _LEAST_WIDTH:
        return f"VOI LUT function {function!r}: expected one of {', '.join(_LEAST_WIDTH)}"
    least = _LEAST_WIDTH[function]
    if width is not None and math.isfinite(center) and (width >= least if least else width > 0) and width < math.inf:
        return ""
    return (
        f"window center {center}, width {width}: expected two numbers, the width "
        f"{'at least 1' if least else 'above 0'} for {function}"
    )
