"""Registration of one channel to another: rigid, affine or B-spline, by multi-resolution mutual information."""

import json
import math
import tempfile
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends

from medseg.errors import ConfigError, GeometryError, ReadError
from medseg.transforms.registration_quality import BINS, MINIMUM_SIZE, SEED, Probe, require_better

if TYPE_CHECKING:
    import SimpleITK as sitk

KINDS = ("rigid", "affine", "bspline")
MODES = ("bilinear", "nearest")

_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_LINEAR_LEVELS = (8.0, 4.0, 2.0, 0.0)  # mm of a voxel; 0: as stored
_REFINING_LEVELS = (2.0, 0.0)
_BSPLINE_LEVELS = (4.0, 2.0)
_BSPLINE_STEPS = 100
_SAMPLES = 100_000
_STEP_SAMPLES = 5_000
_COMMENT = "#medseg "


@dataclass(frozen=True)
class Registration:
    r"""A transform that brings a moving image onto a fixed one, and how good it is.

    Attributes:
        kind: ``"rigid"``, ``"affine"``, ``"bspline"``; empty where a file of another program does not tell.
        transform: ITK's text format (``.tfm``). It maps points of the fixed image to points of the moving one, in LPS
            millimeters, as everywhere in ITK.
        figures: quality, by name; empty where a file of another program does not tell.

            - ``mutual_information_before``, ``mutual_information_after``: nats beyond what chance gives, of 32 × 32
              bins, over the points where both images are, with the headers alone and with the transform;
            - ``overlap``: the volume where both images are, as a share of the smaller image;
            - ``rotation_deg``: the angle of the rotation nearest to the transform;
            - ``translation_mm``: how far the center of the fixed grid is moved;
            - ``displacement_mean_mm``, ``displacement_max_mm``: how far points of the overlap are moved;
            - ``jacobian_min``: the smallest local change of volume; below 0 the transform folds space.

    Example:
        >>> shift = "#Insight Transform File V1.0\n#Transform 0\nTransform: TranslationTransform_double_3_3\n"
        >>> moved = Registration.from_bytes((shift + "Parameters: 2 0 0\nFixedParameters: \n").encode())
        >>> image = MetaTensor(torch.arange(5.0).reshape(1, 5, 1, 1), affine=np.diag([-1.0, -1, 1, 1]))
        >>> moved.apply(image, image).flatten().tolist()
        [2.0, 3.0, 4.0, 0.0, 0.0]
    """

    kind: str
    transform: str
    figures: dict[str, float] = field(default_factory=dict)

    def columns(self, prefix: str = "") -> dict[str, str]:
        """Return kind and figures as text, for the columns of a table, each name with the prefix before it.

        Example:
            >>> Registration("rigid", "", {"overlap": 0.9}).columns("t1_")
            {'t1_kind': 'rigid', 't1_overlap': '0.9'}
        """
        return {
            f"{prefix}kind": self.kind,
            **{f"{prefix}{name}": f"{value:.6g}" for name, value in self.figures.items()},
        }

    def to_bytes(self) -> bytes:
        r"""Return a ``.tfm`` file that SimpleITK, ITK-SNAP and 3D Slicer read; a comment in it holds kind and figures.

        Example:
            >>> Registration("rigid", "#Insight Transform File V1.0\n").to_bytes().decode().splitlines()
            ['#Insight Transform File V1.0', '#medseg {"kind": "rigid", "figures": {}}']
        """
        first, _, rest = self.transform.partition("\n")
        quality = json.dumps({"kind": self.kind, "figures": self.figures})
        return f"{first}\n{_COMMENT}{quality}\n{rest}".encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Registration":
        """Read what `to_bytes` wrote, or any 3D transform in ITK's text format.

        Raises:
            ReadError: not such a file.
        """
        kind, figures, lines = "", {}, []
        try:
            for line in content.decode("ascii").splitlines(keepends=True):
                if line.startswith(_COMMENT):
                    quality = json.loads(line.removeprefix(_COMMENT))
                    kind, figures = str(quality["kind"]), {k: float(v) for k, v in quality["figures"].items()}
                else:
                    lines.append(line)
            result = cls(kind, "".join(lines), figures)
            parsed = _parsed(result.transform)
            # ITK makes the identity of a transform with too few parameters.
            counts = [len(line.split()) - 1 for line in lines if line.startswith("Parameters:")]
            if counts != _parameter_counts(parsed):
                raise ValueError("parameters are missing")
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ReadError("not a transform in ITK's text format: expected the content of a .tfm file") from error
        if parsed.GetDimension() != 3:
            raise ReadError(f"a transform of {parsed.GetDimension()} dimensions: expected 3")
        return result

    def apply(self, image: MetaTensor, fixed: MetaTensor, mode: str = "bilinear") -> MetaTensor:
        """Bring another image of the moving one's space, or a mask, onto the grid of the fixed one.

        Args:
            image: [C, X, Y, Z], on any grid of its own.
            fixed: [C, X, Y, Z]; only its shape and affine matter.
            mode: ``"bilinear"`` for images: float32, and what lies outside the image becomes its lowest value;
                ``"nearest"`` for masks: values and type are kept, and outside is 0.

        Returns:
            [C, X, Y, Z] of the fixed grid, with the affine of `fixed` and the other metadata of `image`.

        Raises:
            ConfigError: for another mode.
            GeometryError: for an image without geometry, not in 3D, or with a sheared affine.
        """
        import SimpleITK as sitk

        if mode not in MODES:
            raise ConfigError(f"mode {mode!r}: expected one of {', '.join(MODES)}")
        transform = _parsed(self.transform)
        grid = _grid(fixed, "the fixed image")
        _grid(image, "the image to bring over")
        nearest = mode == "nearest"
        values = image.as_tensor().cpu()
        kind = values.dtype if nearest else torch.float32
        if not nearest or kind in (torch.bool, torch.float16, torch.bfloat16):  # of which ITK has none
            values = values.float()
        moved = []
        for channel in values.numpy():
            outside = 0.0 if nearest else float(channel.min())
            resampled = sitk.Resample(
                _itk(channel, image), grid, transform, sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear, outside
            )
            moved.append(sitk.GetArrayFromImage(resampled).transpose(2, 1, 0))
        result = torch.from_numpy(np.stack(moved)).to(kind)
        meta = dict(image.meta) | {"spatial_shape": np.asarray(result.shape[1:])}
        meta.pop("affine", None)
        return MetaTensor(result, affine=fixed.affine.clone(), meta=meta)


class Register(Transform):
    """Register a moving image to a fixed one of the same body, of any two contrasts, and bring it onto that grid.

    SimpleITK's registration: mutual information of 32 × 32 bins (Mattes), from coarse to full resolution, at 100,000
    random points; for a B-spline at 5,000 new ones in each step, to a voxel of 2 mm. It starts where the headers say;
    or, where that has more mutual information, with the centers of mass on each other. An affine or B-spline transform
    starts from the rigid one. Seeds are fixed, and sums are made in one order: the same images give the same result,
    bit for bit, whatever the number of threads.

    Args:
        kind: ``"rigid"`` (6 parameters): the same patient in one session; ``"affine"`` (12): also scale and shear;
            ``"bspline"``: rigid, and then a free deformation, for organs that moved or changed shape.
        control_spacing: distance of the control points of a B-spline, in mm.

    Shape:
        moving [1, X, Y, Z] and fixed [1, X', Y', Z'], MetaTensors with an affine -> [1, X', Y', Z'], float32, linearly
        interpolated; what lies outside the moving image gets its lowest value.

    Raises:
        ConfigError: for an unknown kind and a spacing which is not positive.
        GeometryError: for an image without geometry, not in 3D, of several channels, with fewer than 4 voxels along an
            axis, with a sheared affine, constant, or with values that are not finite; and for a result that is not
            to be trusted: less mutual information than with the headers alone (where points moved by more than half
            a voxel), or less than 0.02 nats, an overlap of less than 0.25 of the smaller image, or a local volume less
            than 0.1 of what it was (folding).

    Source:
        Mattes et al. 2003, PET-CT image registration in the chest using free-form deformations, IEEE TMI 22, 120-128;
        for the B-spline's steps Klein, Staring and Pluim 2007, Evaluation of optimization methods for nonrigid medical
        image registration using mutual information and B-splines, IEEE TIP 16, 2879-2890.

    Example:
        >>> x, y, z = np.mgrid[-1:1:24j, -1:1:24j, -1:1:24j]
        >>> body = (1.0 * (x**2 + 2 * y**2 + z**2 < 0.6) + (np.hypot(x - 0.3, z) < 0.2))[None]
        >>> fixed = MetaTensor(torch.from_numpy(body).float(), affine=np.diag([4.0, 4, 4, 1]))
        >>> table = np.diag([4.0, 4, 4, 1])
        >>> table[0, 3] = 6  # the same body, 6 mm further to the right
        >>> moved, registration = Register("rigid")(MetaTensor(torch.from_numpy(2 - body).float(), affine=table), fixed)
        >>> moved.shape, round(registration.figures["translation_mm"])
        (torch.Size([1, 24, 24, 24]), 6)
    """

    backend = (TransformBackends.TORCH,)

    def __init__(self, kind: str = "rigid", control_spacing: float = 60.0) -> None:
        if kind not in KINDS:
            raise ConfigError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")
        if not 0 < control_spacing < math.inf:
            raise ConfigError(f"control_spacing {control_spacing}: expected a positive number of mm")
        self.kind = kind
        self.control_spacing = control_spacing

    def __call__(self, moving: MetaTensor, fixed: MetaTensor) -> tuple[MetaTensor, Registration]:
        """Return the moving image on the grid of the fixed one, and the registration."""
        scaled_moving, scaled_fixed = _scaled(moving, "the moving image"), _scaled(fixed, "the fixed image")
        probe = Probe(scaled_fixed, scaled_moving)
        try:
            transform = self._search(scaled_fixed, scaled_moving, probe)
        except RuntimeError as error:
            raise GeometryError(
                "the registration failed, as it does where the images lose their overlap on the way; check that both "
                "show the same part of the body, or bring them closer first"
            ) from error
        figures = probe.figures(transform)
        require_better(figures, min(scaled_fixed.GetSpacing()) / 2)
        registration = Registration(self.kind, _written(transform), figures)
        return registration.apply(moving, fixed), registration

    def _search(self, fixed: "sitk.Image", moving: "sitk.Image", probe: "Probe") -> "sitk.Transform":
        import SimpleITK as sitk

        rigid = _optimized(fixed, moving, probe.start(), _LINEAR_LEVELS)
        if self.kind == "rigid":
            return rigid
        if self.kind == "affine":
            affine = sitk.AffineTransform(3)
            affine.SetCenter(rigid.GetCenter())
            affine.SetMatrix(rigid.GetMatrix())
            affine.SetTranslation(rigid.GetTranslation())
            return _optimized(fixed, moving, affine, _REFINING_LEVELS)
        # The transform added last acts first: a point is deformed in the fixed space, then taken to the moving one.
        return sitk.CompositeTransform([rigid, _deformation(fixed, moving, rigid, self.control_spacing)])


class Registerd(MapTransform):
    """Dictionary twin of :class:`Register`: bring images onto the grid of one of them, and their masks with them.

    Each key's :class:`Registration` is left in ``data[f"{key}_registration"]``.

    Args:
        keys: the images to bring over.
        reference_key: the image that stays.
        kind: as there.
        control_spacing: as there.
        mask_keys: for a key, the masks which lie in its space; they follow it with nearest neighbor.
        allow_missing_keys: whether a key or a mask may be absent.

    Raises:
        ConfigError: as there; where the reference is among the keys, `mask_keys` names an image that is not, or a key
            would be moved twice.
        GeometryError: as there, with the keys before the reason.

    Example:
        >>> Registerd(["t1", "adc"], reference_key="t2", kind="rigid", mask_keys={"t1": ["tumor"]}).keys
        ('t1', 'adc')
    """

    backend = Register.backend

    def __init__(
        self,
        keys: KeysCollection,
        reference_key: Hashable,
        kind: str = "rigid",
        control_spacing: float = 60.0,
        mask_keys: Mapping[Hashable, Sequence[Hashable]] | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.register = Register(kind, control_spacing)
        self.reference_key = reference_key
        self.mask_keys = dict(mask_keys or {})
        if reference_key in self.keys:
            raise ConfigError(f"reference_key {reference_key!r} is among keys: expected the image that stays apart")
        for key, masks in self.mask_keys.items():
            if key not in self.keys or isinstance(masks, str):
                raise ConfigError(
                    f"mask_keys {{{key!r}: {masks!r}}}: expected one of keys and a list of its masks, such as "
                    f"{{{self.keys[0]!r}: ['mask']}}"
                )
        moved = [*self.keys, *(mask for masks in self.mask_keys.values() for mask in masks)]
        for key in moved:
            if key == reference_key or moved.count(key) > 1:
                raise ConfigError(f"mask_keys: {key!r} would be moved twice, or is the reference: expected it once")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the dictionary with its images and masks on the reference's grid, and the registrations."""
        result = dict(data)
        fixed = result[self.reference_key]
        for key in self.key_iterator(result):
            try:
                result[key], registration = self.register(result[key], fixed)
                for mask in self.mask_keys.get(key, ()):
                    if mask in result or not self.allow_missing_keys:
                        result[mask] = registration.apply(result[mask], fixed, mode="nearest")
            except GeometryError as error:
                raise GeometryError(f"{key} to {self.reference_key}: {error}") from error
            result[f"{key}_registration"] = registration
        return result


def _optimized(fixed: "sitk.Image", moving: "sitk.Image", start: Any, levels: Sequence[float]) -> Any:
    """Return the linear transform with most mutual information near `start`."""
    for level in levels:
        coarse = _coarse(fixed, level)
        method = _method(coarse, _SAMPLES, SEED)
        step = level or 1.0
        method.SetOptimizerAsRegularStepGradientDescent(
            step / 2, step / 500, 100, relaxationFactor=0.7, gradientMagnitudeTolerance=1e-8
        )
        method.SetOptimizerScalesFromPhysicalShift()
        method.SetInitialTransform(start, inPlace=True)
        method.Execute(coarse, _coarse(moving, level))
    return start


def _deformation(fixed: "sitk.Image", moving: "sitk.Image", rigid: "sitk.Transform", spacing: float) -> Any:
    """Return the B-spline that, with `rigid` after it, has most mutual information.

    By stochastic gradient descent: each step looks at points of its own. A B-spline has enough parameters to fit the
    chance of any one set of points, and a set large enough to prevent that takes ten times as long.
    """
    import SimpleITK as sitk

    extent = [size * side for size, side in zip(fixed.GetSize(), fixed.GetSpacing(), strict=True)]
    bspline = sitk.BSplineTransformInitializer(fixed, [max(1, round(length / spacing)) for length in extent])
    for level in _BSPLINE_LEVELS:
        coarse, coarse_moving = _coarse(fixed, level), _coarse(moving, level)
        for step in range(_BSPLINE_STEPS):
            method = _method(coarse, _STEP_SAMPLES, SEED + step)
            method.SetMovingInitialTransform(rigid)
            # The length of a step, over all parameters; the root of the mean square of each is in mm.
            length = level / 16 / (1 + step / 20) ** 0.7 * math.sqrt(bspline.GetNumberOfParameters())
            method.SetOptimizerAsRegularStepGradientDescent(length, 0.0, 1, gradientMagnitudeTolerance=0.0)
            method.SetInitialTransform(bspline, inPlace=True)
            method.Execute(coarse, coarse_moving)
    return bspline


def _method(fixed: "sitk.Image", samples: int, seed: int) -> "sitk.ImageRegistrationMethod":
    """Return SimpleITK's registration with mutual information at that many random points of the fixed image."""
    import SimpleITK as sitk

    method = sitk.ImageRegistrationMethod()
    # More than one work unit sums in whatever order the threads finish: results would differ from run to run.
    method.SetNumberOfWorkUnits(1)
    method.SetMetricAsMattesMutualInformation(BINS)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(min(1.0, samples / fixed.GetNumberOfPixels()), seed=seed)
    # Gradients at the points themselves: those of ITK's filter are of a smoothed image, and led 1 mm astray.
    method.SetMetricUseFixedImageGradientFilter(False)
    method.SetMetricUseMovingImageGradientFilter(False)
    method.SetInterpolator(sitk.sitkLinear)
    return method


def _coarse(image: "sitk.Image", level: float) -> "sitk.Image":
    """Average voxels into bins of about `level` mm, with 16 of them left along each axis that has as many."""
    import SimpleITK as sitk

    sizes = zip(image.GetSize(), image.GetSpacing(), strict=True)
    return sitk.BinShrink(image, [max(1, min(int(level / spacing + 0.01), size // 16)) for size, spacing in sizes])


def _grid(image: MetaTensor, name: str) -> "sitk.Image":
    """Return an image's grid in ITK's terms, without its voxels."""
    import SimpleITK as sitk

    if not isinstance(image, MetaTensor) or not image.meta.get("has_geometry", True):
        raise GeometryError(f"{name} has no geometry: expected a MetaTensor with the affine of a scan")
    if image.ndim != 4:
        raise GeometryError(f"{name} has the shape {tuple(image.shape)}: expected 3D, [C, X, Y, Z]")
    affine = image.affine.cpu().numpy().astype(float)
    with np.errstate(all="ignore"):
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        direction = affine[:3, :3] / spacing
    if not np.abs(direction.T @ direction - np.eye(3)).max() < 1e-3:
        raise GeometryError(f"{name} has an affine whose axes are not at right angles (shear): resample it first")
    lps = _LPS @ affine
    grid = sitk.Image([int(n) for n in image.shape[1:]], sitk.sitkUInt8)
    grid.SetSpacing(spacing.tolist())
    grid.SetOrigin(lps[:3, 3].tolist())
    grid.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    return grid


def _itk(channel: np.ndarray, image: MetaTensor) -> "sitk.Image":
    """Return one channel [X, Y, Z] of an image as ITK's."""
    import SimpleITK as sitk

    result = sitk.GetImageFromArray(np.ascontiguousarray(channel.transpose(2, 1, 0)))
    result.CopyInformation(_grid(image, "the image"))
    return result


def _scaled(image: MetaTensor, name: str) -> "sitk.Image":
    """Return an image for comparison: values from 0 to 1, the highest and lowest 0.5 % clipped."""
    _grid(image, name)
    if image.shape[0] != 1:
        raise GeometryError(f"{name} has {image.shape[0]} channels: expected one; choose it with SelectChannels")
    if min(image.shape[1:]) < MINIMUM_SIZE:
        raise GeometryError(
            f"{name} has the shape {tuple(image.shape[1:])}: expected at least {MINIMUM_SIZE} voxels along each axis"
        )
    voxels = image.as_tensor().cpu()[0].float().numpy()
    if not np.isfinite(voxels).all():
        raise GeometryError(f"{name} holds {np.count_nonzero(~np.isfinite(voxels)):,} values that are not finite")
    low, high = np.percentile(voxels, [0.5, 99.5])
    if not low < high:
        low, high = float(voxels.min()), float(voxels.max())
    if not low < high:
        raise GeometryError(f"{name} is constant ({low:g}): there is nothing to register")
    return _itk(np.clip((voxels - low) / (high - low), 0, 1).astype(np.float32), image)


def _written(transform: "sitk.Transform") -> str:
    """Return a transform in ITK's text format."""
    import SimpleITK as sitk

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "transform.tfm"
        sitk.WriteTransform(transform, str(path))
        return path.read_text("ascii")


def _parameter_counts(transform: "sitk.Transform") -> list[int]:
    import SimpleITK as sitk

    parts = sitk.CompositeTransform(transform)
    return [parts.GetNthTransform(index).GetNumberOfParameters() for index in range(parts.GetNumberOfTransforms())]


def _parsed(text: str) -> "sitk.Transform":
    import SimpleITK as sitk

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "transform.tfm"
        path.write_text(text, "ascii")
        return sitk.ReadTransform(str(path))
