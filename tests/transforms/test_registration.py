"""Registration finds motions that are known, refuses what went wrong, and keeps to the geometry of the headers."""

import inspect
import pickle

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from scipy import ndimage

from medseg.errors import ConfigError, GeometryError, ReadError
from medseg.transforms import Register, Registerd, Registration
from medseg.transforms import registration as module
from medseg.transforms import registration_quality as quality

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def phantom(shape=(44, 40, 24), affine=None, contrast="t1", seed=3) -> MetaTensor:
    """A head of smooth tissues, blurred at random, in one of two contrasts."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    tissue = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), [n / 11 for n in shape])
    head = (grid**2).sum(0) < 0.7
    values = np.where(head, 1 + (tissue > 0) + (tissue > tissue.std()), 0)
    look = {"t1": [0, 300, 600, 900], "t2": [10, 800, 500, 200]}[contrast]
    image = ndimage.gaussian_filter(np.array(look, float)[values], 0.7)
    affine = oblique() if affine is None else affine
    return MetaTensor(torch.from_numpy(image[None].astype(np.float32)), affine=torch.from_numpy(affine))


def oblique(angles=(10.0, -7.0, 20.0), spacing=(2.0, 2.2, 4.0), origin=(-35.0, -50.0, 20.0)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = rotation(*angles) @ np.diag(spacing)
    affine[:3, 3] = origin
    return affine


def rotation(x: float, y: float, z: float) -> np.ndarray:
    result = np.eye(3)
    for axis, angle in enumerate((x, y, z)):
        c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        turn = np.eye(3)
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn[i, i], turn[i, j], turn[j, i], turn[j, j] = c, -s, s, c
        result = turn @ result
    return result


def centers(image: MetaTensor) -> np.ndarray:
    """Voxel centers in RAS mm, [n, 3]; by numpy alone."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in image.shape[1:]], indexing="ij"), -1).reshape(-1, 3)
    affine = image.affine.numpy()
    return index @ affine[:3, :3].T + affine[:3, 3]


def sampled(image: MetaTensor, points: np.ndarray, order=1) -> np.ndarray:
    """An image's values at points in RAS mm; by scipy."""
    return ndimage.map_coordinates(image[0].numpy(), indices(image, points).T, order=order, mode="constant")


def within(image: MetaTensor, points: np.ndarray) -> np.ndarray:
    index = indices(image, points)
    return ((index >= 0) & (index <= np.array(image.shape[1:]) - 1)).all(1)


def indices(image: MetaTensor, points: np.ndarray) -> np.ndarray:
    return (np.c_[points, np.ones(len(points))] @ np.linalg.inv(image.affine.numpy()).T)[:, :3]


def around_center(image: MetaTensor, matrix, shift) -> np.ndarray:
    """A 4 × 4 affine motion about the center of an image, RAS mm."""
    center = centers(image).mean(0)
    motion = np.eye(4)
    motion[:3, :3] = matrix
    motion[:3, 3] = center + shift - motion[:3, :3] @ center
    return motion


def carried(registration: Registration, points: np.ndarray) -> np.ndarray:
    """Where a registration takes points in RAS mm."""
    transform = module._parsed(registration.transform)
    return np.array([transform.TransformPoint(p.tolist()) for p in points * [-1, -1, 1]]) * [-1, -1, 1]


def inner(image: MetaTensor) -> np.ndarray:
    """Every seventh voxel center in the head."""
    return centers(image)[(image[0].numpy() > 100).ravel()][::7]


RIGID = (rotation(4, -3, 5), [5.0, -4.0, 6.0])
AFFINE = (rotation(2, 3, -3) @ np.diag([1.06, 0.95, 1.04]), [3.0, 2.0, -4.0])


@pytest.mark.parametrize(
    ("kind", "motion", "tolerance"),
    [("rigid", RIGID, 0.5), ("affine", AFFINE, 0.9)],
    ids=["rigid", "affine"],
)
def test_a_known_motion_is_found_between_contrasts_on_different_oblique_grids(kind, motion, tolerance):
    fixed = phantom()
    matrix = around_center(fixed, *motion)
    # moving(matrix · p) shows what fixed(p) shows: the patient lies elsewhere, on a table whose grid is another.
    sharp = phantom(contrast="t2")
    table = oblique((-3, 4, 0), (2.1, 1.9, 3.6))
    table[:3, 3] = (matrix @ [*centers(fixed).mean(0), 1])[:3] - table[:3, :3] @ [24.5, 23.5, 14.5]
    grid = MetaTensor(torch.zeros(1, 50, 48, 30), affine=table)
    back = np.c_[centers(grid), np.ones(50 * 48 * 30)] @ np.linalg.inv(matrix).T
    values = sampled(sharp, back[:, :3]).reshape(1, 50, 48, 30)
    moving = MetaTensor(torch.from_numpy(values.astype(np.float32)), affine=grid.affine)

    image, registration = Register(kind)(moving, fixed)

    points = inner(fixed)
    expected = points @ matrix[:3, :3].T + matrix[:3, 3]
    error = np.linalg.norm(carried(registration, points) - expected, axis=1)
    start = np.linalg.norm(points - expected, axis=1)
    assert start.mean() > 5
    assert error.max() < tolerance, (error.mean(), error.max())
    # The image that came out is the moving one at those points.
    np.testing.assert_array_equal(image.affine, fixed.affine)
    assert image.shape == fixed.shape
    found = carried(registration, centers(fixed))
    inside = within(moving, found)
    assert inside.mean() > 0.8
    np.testing.assert_allclose(image[0].numpy().ravel()[inside], sampled(moving, found)[inside], atol=0.5)
    figures = registration.figures
    angle = np.degrees(np.arccos((np.trace(np.linalg.svd(motion[0])[0] @ np.linalg.svd(motion[0])[2]) - 1) / 2))
    assert figures["rotation_deg"] == pytest.approx(angle, abs=0.5)
    assert figures["translation_mm"] == pytest.approx(np.linalg.norm(motion[1]), abs=0.5)
    assert figures["jacobian_min"] == pytest.approx(np.linalg.det(motion[0]), abs=0.03)
    assert figures["mutual_information_after"] > 1.5 * figures["mutual_information_before"]


def test_a_known_deformation_is_found():
    fixed_still = phantom((48, 44, 24), oblique(spacing=(2.0, 2.0, 4.0)))
    moving = phantom((48, 44, 24), oblique(spacing=(2.0, 2.0, 4.0)), contrast="t2")
    bspline = sitk.BSplineTransformInitializer(module._grid(fixed_still, "it"), [2, 2, 2])
    rng = np.random.default_rng(0)
    bspline.SetParameters(rng.uniform(-9, 9, bspline.GetNumberOfParameters()).tolist())
    truth = Registration("bspline", module._written(bspline))
    fixed = truth.apply(fixed_still, fixed_still)

    image, registration = Register("bspline", control_spacing=45)(moving, fixed)

    points = inner(fixed)
    expected = carried(truth, points)
    start = np.linalg.norm(points - expected, axis=1)
    error = np.linalg.norm(carried(registration, points) - expected, axis=1)
    assert start.mean() > 2
    assert error.mean() < 0.8, (start.mean(), error.mean())
    assert 0.1 < registration.figures["jacobian_min"] < 1
    assert image.shape == fixed.shape


def test_where_the_headers_share_nothing_the_centers_of_mass_do():
    fixed = phantom(affine=oblique((0, 0, 0)))
    far = oblique((0, 0, 0), origin=(500.0, 700.0, -900.0))
    _, registration = Register("rigid")(phantom(affine=far, contrast="t2"), fixed)
    expected = inner(fixed) + (far - fixed.affine.numpy())[:3, 3]
    assert np.abs(carried(registration, inner(fixed)) - expected).max() < 0.3
    assert registration.figures["mutual_information_before"] == 0


def test_masks_keep_their_values_and_type_and_the_image_is_linear():
    image = phantom()
    moved = Registration("rigid", shift_of(7.3, 0, 0))
    mask = MetaTensor((image.as_tensor() > 400).to(torch.uint8) * 3, affine=image.affine)
    carried_mask = moved.apply(mask, image, mode="nearest")
    assert carried_mask.dtype == torch.uint8
    assert set(np.unique(carried_mask)) == {0, 3}
    np.testing.assert_array_equal(carried_mask.affine, image.affine)
    assert carried_mask.meta["spatial_shape"].tolist() == list(image.shape[1:])
    points = centers(image) + np.array([-7.3, 0, 0])  # ITK's x runs to the left
    np.testing.assert_array_equal(carried_mask[0].numpy().ravel(), sampled(mask, points, order=0))
    inside = within(image, points)
    linear = moved.apply(image, image)[0].numpy().ravel()
    np.testing.assert_allclose(linear[inside], sampled(image, points)[inside], atol=0.05)
    for kind in (torch.bool, torch.float16, torch.bfloat16, torch.int16, torch.int64):
        other = moved.apply(MetaTensor(mask.as_tensor().to(kind), affine=image.affine), image, mode="nearest")
        assert other.dtype == kind
        assert torch.equal(other.as_tensor(), carried_mask.as_tensor().to(kind))
    weights = moved.apply(MetaTensor(mask.as_tensor().bool(), affine=image.affine), image)
    assert weights.dtype == torch.float32
    assert bool(((weights > 0.1) & (weights < 0.9)).any())


def test_outside_the_moving_image_is_its_lowest_value_and_no_label():
    ct = MetaTensor(torch.full((2, 4, 4, 4), -1000.0), affine=np.eye(4))
    ct[:, 1:3] = 40
    away = Registration("rigid", shift_of(100, 0, 0))
    assert (away.apply(ct, ct) == -1000).all()
    assert (away.apply(ct + 2000, ct, mode="nearest") == 0).all()


def shift_of(x: float, y: float, z: float) -> str:
    return module._written(sitk.TranslationTransform(3, (x, y, z)))


def test_the_dictionary_brings_images_and_their_masks_and_leaves_the_rest():
    fixed, moving = phantom(), phantom(affine=oblique(origin=(-30.0, -52.0, 20.0)), contrast="t2")
    mask = MetaTensor((moving.as_tensor() > 600).to(torch.uint8), affine=moving.affine)
    data = {
        "t1": fixed,
        "t2": moving,
        "lesion": mask,
        "gland": MetaTensor(mask.as_tensor() * 2, affine=mask.affine),
        "name": "A",
    }
    result = Registerd("t2", reference_key="t1", mask_keys={"t2": ["lesion", "gland"]})(data)
    image, registration = Register()(moving, fixed)
    assert result["t2_registration"] == registration
    np.testing.assert_array_equal(result["t2"], image)
    np.testing.assert_array_equal(result["lesion"], registration.apply(mask, fixed, mode="nearest"))
    np.testing.assert_array_equal(result["gland"], 2 * result["lesion"])
    np.testing.assert_array_equal(result["t1"], fixed)
    assert result["name"] == "A"
    assert data["t2"] is moving
    assert data.keys() == {"t1", "t2", "lesion", "gland", "name"}


def test_twins_share_their_arguments():
    own = inspect.signature(Register).parameters
    twin = inspect.signature(Registerd).parameters
    assert [twin[name] for name in own] == list(own.values())


def test_missing_keys():
    fixed = phantom()
    with pytest.raises(KeyError):
        Registerd("t2", reference_key="t1")({"t1": fixed})
    assert Registerd("t2", reference_key="t1", allow_missing_keys=True)({"t1": fixed}).keys() == {"t1"}


def test_bytes_hold_the_transform_and_the_figures_and_sitk_reads_them(tmp_path):
    figures = {"overlap": 0.1 + 0.2, "mutual_information_after": 1e-9}
    turn = sitk.Euler3DTransform((1.0, 2.0, 3.0), 0.1, 0.2, 0.3, (1 / 3, 1e-12, 7.0))
    bspline = sitk.BSplineTransformInitializer(module._grid(phantom(), "it"), [2, 2, 2])
    bspline.SetParameters(np.random.default_rng(0).normal(size=bspline.GetNumberOfParameters()).tolist())
    for transform in (turn, sitk.CompositeTransform([turn, bspline])):
        registration = Registration("bspline", module._written(transform), figures)
        path = tmp_path / "transform.tfm"
        path.write_bytes(registration.to_bytes())
        again = Registration.from_bytes(path.read_bytes())
        assert again == registration
        assert again.to_bytes() == registration.to_bytes()
        for reader in (sitk.ReadTransform(str(path)), module._parsed(again.transform)):
            for point in ((0.1, 2.0, 5.0), (8.0, 1.0, 3.3)):
                assert reader.TransformPoint(point) == transform.TransformPoint(point)
    assert pickle.loads(pickle.dumps(registration)) == registration


def test_columns():
    columns = Registration("affine", "", {"overlap": 1 / 3, "jacobian_min": 1.0}).columns("t1_")
    assert columns == {"t1_kind": "affine", "t1_overlap": "0.333333", "t1_jacobian_min": "1"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"not a transform",
        b"#Insight Transform File V1.0\n#medseg [1]\n",
        b"#Insight Transform File V1.0\n#medseg {\n",
        b"#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\nParameters: 1 0\n",
        b"#Insight Transform File V1.0\n#Transform 0\nTransform: NoTransform_double_3_3\nParameters: 1\n",
    ],
)
def test_what_is_no_transform_is_refused(content):
    with pytest.raises(ReadError, match="not a transform in ITK's text format"):
        Registration.from_bytes(content)


def test_a_transform_of_two_dimensions_is_refused():
    flat = module._written(sitk.TranslationTransform(2, (1, 2)))
    with pytest.raises(ReadError, match="a transform of 2 dimensions: expected 3"):
        Registration.from_bytes(flat.encode())


@pytest.mark.parametrize(("kind", "runs"), [("rigid", (1, 4, 4)), ("bspline", (1, 4))], ids=["rigid", "bspline"])
def test_the_result_does_not_depend_on_threads_nor_on_the_run(kind, runs):
    fixed, moving = phantom((30, 28, 16)), phantom((30, 28, 16), oblique(origin=(-31.0, -50.0, 20.0)), contrast="t2")
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    results = []
    try:
        for threads in runs:
            sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
            image, registration = Register(kind, control_spacing=200)(moving, fixed)
            results.append((registration.to_bytes(), image.numpy().tobytes()))
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)
    assert all(result == results[0] for result in results)


def test_an_image_registered_to_itself_stays_and_is_not_refused():
    image = phantom()
    same, registration = Register()(image, image)
    assert registration.figures["displacement_max_mm"] < 0.3
    assert registration.figures["overlap"] > 0.98
    assert np.corrcoef(same.numpy().ravel(), image.numpy().ravel())[0, 1] > 0.99


def test_a_worse_result_is_refused_with_its_figures(monkeypatch):
    fixed, moving = phantom(), phantom(contrast="t2")
    monkeypatch.setattr(module, "_optimized", lambda f, m, start, *_: moved_by(start, 12))
    with pytest.raises(
        GeometryError, match=r"worse than the headers alone: mutual_information_before 1\.\d+, mut"
    ) as e:
        Register()(moving, fixed)
    assert "translation_mm 12" in str(e.value)
    assert "\n" not in str(e.value)
    with pytest.raises(GeometryError, match=r"^t2 to t1: registration refused: "):
        Registerd("t2", reference_key="t1")({"t1": fixed, "t2": moving})


def moved_by(start: sitk.Euler3DTransform, shift: float) -> sitk.Euler3DTransform:
    start.SetTranslation((shift, 0.0, 0.0))
    return start


def test_a_result_out_of_the_overlap_is_refused(monkeypatch):
    monkeypatch.setattr(module, "_optimized", lambda f, m, start, *_: moved_by(start, 75))
    with pytest.raises(GeometryError, match=r"the images hardly overlap \(expected at least 0.25\): .*overlap 0\.\d"):
        Register()(phantom(contrast="t2"), phantom())
    monkeypatch.setattr(module, "_optimized", lambda f, m, start, *_: moved_by(start, 5000))
    with pytest.raises(GeometryError, match=r"the images hardly overlap .*overlap 0,"):
        Register()(phantom(contrast="t2"), phantom())


def test_a_fold_is_refused(monkeypatch):
    def fold(fixed, *_):
        bspline = sitk.BSplineTransformInitializer(fixed, [2, 2, 2])
        values = np.zeros((3, 5, 5, 5))
        values[0, 2, 2, 2] = 250.0  # a control point in the middle, far along x
        bspline.SetParameters(values.ravel().tolist())
        return bspline

    monkeypatch.setattr(module, "_deformation", fold)
    with pytest.raises(
        GeometryError, match=r"folds space \(expected jacobian_min of at least 0.1\).*jacobian_min -?\d"
    ):
        Register("bspline")(phantom(contrast="t2"), phantom())


@pytest.mark.parametrize("angles", [(0, 0, 0), (90, 0, 0), (35, -50, 170)])
def test_the_figures_of_a_known_transform(angles):
    image = phantom(affine=oblique(angles))
    probe = quality.Probe(module._scaled(image, "it"), module._scaled(image, "it"))
    stretch = sitk.AffineTransform(3)
    stretch.SetMatrix((rotation(0, 0, 8) @ np.diag([1.2, 1.0, 0.9])).ravel().tolist())
    stretch.SetCenter((centers(image).mean(0) * [-1, -1, 1]).tolist())
    stretch.SetTranslation((3.0, 0.0, 4.0))
    figures = probe.figures(stretch)
    assert figures["jacobian_min"] == pytest.approx(1.2 * 0.9, abs=1e-4)
    assert figures["rotation_deg"] == pytest.approx(8, abs=1e-3)
    assert figures["translation_mm"] == pytest.approx(5, abs=1e-4)


def test_mutual_information_by_hand():
    a = np.repeat([0.0, 1.0], 5000)
    assert quality.mutual_information(a, 1 - a) == pytest.approx(np.log(2), abs=1e-3)
    rng = np.random.default_rng(0)
    assert abs(quality.mutual_information(rng.random(20_000), rng.random(20_000))) < 0.005
    assert quality.mutual_information(a[:0], a[:0]) == 0


def test_noise_says_nothing_of_a_head():
    noise = torch.from_numpy(np.random.default_rng(1).normal(size=(1, 44, 40, 24)).astype(np.float32))
    with pytest.raises(GeometryError, match=r"tell nothing of each other|worse than the headers"):
        Register()(MetaTensor(noise, affine=oblique()), phantom())


def meta(array, affine=None, **more) -> MetaTensor:
    return MetaTensor(
        torch.as_tensor(array, dtype=torch.float32), affine=oblique() if affine is None else affine, meta=more
    )


SHEARED = oblique() @ np.array([[1, 0.05, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
HEAD = phantom().as_tensor()
HOLED = HEAD.clone()
HOLED[0, 3, 3, 3] = float("nan")


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (HEAD, "has no geometry: expected a MetaTensor"),
        (HEAD.numpy(), "has no geometry: expected a MetaTensor"),
        (meta(HEAD, has_geometry=False), "has no geometry"),
        (meta(HEAD[..., 0]), r"has the shape \(1, 44, 40\): expected 3D, \[C, X, Y, Z\]"),
        (meta(HEAD[..., :1]), r"has the shape \(44, 40, 1\): expected at least 4 voxels along each axis"),
        (meta(HEAD.repeat(2, 1, 1, 1)), "has 2 channels: expected one; choose it with SelectChannels"),
        (meta(HEAD * 0 + 7), r"is constant \(7\)"),
        (meta(HOLED), "holds 1 values that are not finite"),
        (meta(HEAD * float("inf")), "values that are not finite"),
        (meta(HEAD, affine=SHEARED), "axes are not at right angles"),
        (meta(HEAD, affine=np.zeros((4, 4))), "axes are not at right angles"),
    ],
    ids=["tensor", "array", "picture", "2d", "one slice", "channels", "constant", "nan", "inf", "shear", "zero affine"],
)
def test_bad_images_are_refused_by_name(image, reason):
    with pytest.raises(GeometryError, match=f"^the moving image .*{reason}"):
        Register()(image, phantom())
    with pytest.raises(GeometryError, match=f"^the fixed image .*{reason}"):
        Register()(phantom(), image)


def test_a_slab_that_can_never_overlap_enough_is_refused():
    fixed = phantom(affine=np.diag([2.0, 2, 4, 1]))
    thin = np.diag([40.0, 0.05, 0.05, 1])
    values = torch.from_numpy(np.random.default_rng(0).random((1, 44, 40, 24)).astype(np.float32))
    with pytest.raises(GeometryError, match=r"overlap by 0.0. of the smaller one where the headers put them"):
        Register()(MetaTensor(values, affine=thin), fixed)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"kind": "rigit"}, "kind 'rigit': expected one of rigid, affine, bspline"),
        ({"control_spacing": 0}, "control_spacing 0: expected a positive number of mm"),
        ({"control_spacing": float("nan")}, "control_spacing nan"),
        ({"reference_key": "t2"}, "reference_key 't2' is among keys"),
        ({"mask_keys": {"t3": ["a"]}}, "expected one of keys and a list of its masks, such as {'t2': "),
        ({"mask_keys": {"t2": "lesion"}}, "expected one of keys and a list of its masks"),
        ({"mask_keys": {"t2": ["lesion", "lesion"]}}, "'lesion' would be moved twice"),
        ({"mask_keys": {"t2": ["t2"]}}, "'t2' would be moved twice"),
        ({"mask_keys": {"t2": ["t1"]}}, "'t1' would be moved twice, or is the reference"),
    ],
)
def test_impossible_arguments_are_refused(arguments, reason):
    with pytest.raises(ConfigError, match=reason):
        Registerd("t2", **{"reference_key": "t1", **arguments})


def test_an_unknown_mode_is_refused():
    with pytest.raises(ConfigError, match="mode 'cubic': expected one of bilinear, nearest"):
        Registration("rigid", shift_of(0, 0, 0)).apply(phantom(), phantom(), mode="cubic")
