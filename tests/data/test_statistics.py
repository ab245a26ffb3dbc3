"""Statistics are those of the training part of one fold, exact, and nothing else goes into them."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from monai.data import MetaTensor
from monai.transforms import CropForegroundd, LoadImaged, RandFlipd

from medseg.data import (
    DatasetFolder,
    balanced_class_weights,
    check_statistics,
    make_splits,
    training_statistics,
)
from medseg.data.folder import write_case, write_index
from medseg.data.statistics import PERCENTILES, _bins, _percentile
from medseg.errors import ConfigError, DatasetError, LeakageError
from medseg.io import Reader, read_image, write_nifti
from medseg.transforms import HounsfieldWindowd

PERCENTS = ["0.5", "1", "5", "25", "50", "75", "95", "99", "99.5"]


def split(folder, folds=3):
    folder.write_split(make_splits(folder.cases, seed=0, folds=folds, test_fraction=0.2))
    return folder


@pytest.fixture
def folder(tmp_path, write_dataset):
    return split(write_dataset(tmp_path / "dataset", shapes=((12, 10, 5), (9, 8, 6))))


def pixels(folder, part, fold=0):
    """The voxels of every case of a part, by nibabel: a list per channel, and the labels."""
    entries = folder.datalist(part, fold)
    images = [
        np.concatenate([np.asarray(nib.load(entry["image"][c]).dataobj).ravel() for entry in entries]) for c in (0, 1)
    ]
    return images, np.concatenate([np.asarray(nib.load(entry["label"]).dataobj).ravel() for entry in entries])


@pytest.mark.parametrize("fold", [0, 1, 2])
def test_they_equal_numpys_on_all_voxels_at_once(folder, fold):
    statistics = training_statistics(folder.root, fold)
    images, labels = pixels(folder, "train", fold)
    for channel, voxels in enumerate(images):
        exact = voxels.astype(np.float64)
        assert statistics["voxels"][channel] == voxels.size
        assert statistics["mean"][channel] == pytest.approx(exact.mean(), rel=1e-12)
        assert statistics["std"][channel] == pytest.approx(exact.std(), rel=1e-12)
        assert (statistics["min"][channel], statistics["max"][channel]) == (voxels.min(), voxels.max())
        for name in PERCENTS:
            expected = np.percentile(voxels, float(name), method="inverted_cdf")
            tolerance = 0 if channel == 0 else 2**-11  # the CT holds whole numbers
            assert statistics["percentiles"][name][channel] == pytest.approx(expected, rel=tolerance, abs=0)
    assert list(statistics["percentiles"]) == PERCENTS
    counts = np.bincount(labels.astype(int), minlength=3)
    assert statistics["class_counts"] == dict(zip(["background", "tumor", "node"], counts.tolist(), strict=True))
    np.testing.assert_allclose(statistics["class_weights"], labels.size / (3 * counts))
    assert statistics["cases"] == len(folder.datalist("train", fold))


def test_validation_and_test_cases_change_nothing(folder):
    before = training_statistics(folder.root)
    for part in ("val", "test"):
        for entry in folder.datalist(part):
            for path in entry["image"]:
                image = nib.load(path)
                write_nifti((np.full(image.shape, 1e6, np.float32), image.affine), path)
            label = nib.load(entry["label"])
            write_nifti((np.full(label.shape, 2, np.uint8), label.affine), entry["label"], dtype=np.uint8)
    assert training_statistics(folder.root) == before
    # and the same plant in a case of the training part shows
    entry = folder.datalist("train")[0]
    image = nib.load(entry["image"][0])
    write_nifti((np.full(image.shape, 1e6, np.float32), image.affine), entry["image"][0])
    assert training_statistics(folder.root)["max"][0] == 1e6


def test_they_are_plain_values_and_do_not_depend_on_the_number_of_workers(folder):
    statistics = training_statistics(folder.root, workers=1)
    assert json.loads(json.dumps(statistics)) == statistics
    assert training_statistics(folder.root, workers=4) == statistics


def test_they_name_their_fold_and_dataset_and_serve_no_other(folder, tmp_path, write_dataset):
    statistics = training_statistics(folder.root, 1)
    check_statistics(statistics, folder.root, 1)
    with pytest.raises(LeakageError, match="of fold 1, fold 0 expected"):
        check_statistics(statistics, folder.root, 0)
    folder.write_split(make_splits(folder.cases, seed=1, folds=3, test_fraction=0.2))
    with pytest.raises(LeakageError, match="another dataset or split"):
        check_statistics(statistics, folder.root, 1)
    with pytest.raises(LeakageError, match="of fold None"):
        check_statistics({"mean": [0.0], "std": [1.0]}, folder.root, 1)


def test_only_voxels_above_a_value_if_asked(folder):
    statistics = training_statistics(folder.root, above=1.5)
    for channel, voxels in enumerate(pixels(folder, "train")[0]):
        chosen = voxels[voxels > 1.5].astype(np.float64)
        assert statistics["voxels"][channel] == chosen.size < voxels.size
        assert statistics["mean"][channel] == pytest.approx(chosen.mean())
        assert statistics["std"][channel] == pytest.approx(chosen.std())
        assert statistics["min"][channel] > 1.5
    assert statistics["class_counts"] == training_statistics(folder.root)["class_counts"]
    with pytest.raises(DatasetError, match="no voxel above 10000"):
        training_statistics(folder.root, above=10000)


def test_a_transform_before_the_normalization_is_part_of_what_is_measured(folder):
    load = LoadImaged(["image", "label"], reader=Reader, ensure_channel_first=True)
    assert training_statistics(folder.root, transform=load) == training_statistics(folder.root)
    windowed = training_statistics(folder.root, transform=[load, HounsfieldWindowd("image", [(30, 20), (40, 100)])])
    ct = pixels(folder, "train")[0][0]
    assert windowed["mean"][0] == pytest.approx(np.clip((ct - 20) / 20, 0, 1).mean(), rel=1e-6)
    assert len(windowed["mean"]) == 3
    cropped = training_statistics(folder.root, transform=[load, CropForegroundd(["image", "label"], "label")])
    assert cropped["class_counts"]["background"] < training_statistics(folder.root)["class_counts"]["background"]
    assert cropped["class_counts"]["tumor"] == training_statistics(folder.root)["class_counts"]["tumor"]


def test_a_transform_that_is_random_or_loads_no_label_is_refused(folder):
    load = LoadImaged(["image", "label"], reader=Reader, ensure_channel_first=True)
    with pytest.raises(ConfigError, match="RandFlipd is random"):
        training_statistics(folder.root, transform=[load, RandFlipd(["image", "label"], 0.5)])
    with pytest.raises(ConfigError, match="begin it with LoadImaged"):
        training_statistics(folder.root, transform=LoadImaged("image", reader=Reader))
    with pytest.raises(ConfigError, match="a label of 2 channels"):
        training_statistics(folder.root, transform=[load, lambda d: {**d, "label": torch.zeros(2, 3, 3)}])


def test_what_cannot_be_measured_is_refused(folder):
    with pytest.raises(DatasetError, match="fold 9"):
        training_statistics(folder.root, 9)
    entry = folder.datalist("train")[1]
    label = nib.load(entry["label"])
    write_nifti((np.full(label.shape, 7, np.uint8), label.affine), entry["label"], dtype=np.uint8)
    with pytest.raises(DatasetError, match=rf"case {entry['case']}: the label has the value\(s\) 7"):
        training_statistics(folder.root)


def test_a_classification_counts_cases(tmp_path):
    rows, classes = [], {"benign": 0, "malignant": 1}
    for number in range(8):
        image = MetaTensor(torch.full((1, 3, 4, 1), float(number)))
        row = write_case(tmp_path, f"c{number}", image)
        name = "malignant" if number % 4 == 0 else "benign"
        rows.append({"patient": f"p{number}", "stratum": name, "class": name, **row})
    write_index(tmp_path, name="x", channel_names=["MRI"], classes=classes, rows=rows, manifest={})
    folder = DatasetFolder(tmp_path)
    folder.write_split(
        {
            "seed": 0,
            "stratify": None,
            "folds": [{"train": ["c0", "c1", "c2", "c3"], "val": ["c4", "c5"]}],
            "test": ["c6", "c7"],
        }
    )
    statistics = training_statistics(tmp_path)
    assert statistics["class_counts"] == {"benign": 3, "malignant": 1}
    assert statistics["class_weights"] == [pytest.approx(4 / 6), 2.0]
    assert (statistics["mean"], statistics["std"]) == ([1.5], [pytest.approx(1.25**0.5)])


floats = arrays(np.float32, st.integers(1, 200), elements=st.floats(-(2.0**100), 2.0**100, width=32))


@given(floats, st.sampled_from(PERCENTILES))
def test_percentiles_are_those_of_numpy_to_twelve_bits(values, q):
    found, exact = _percentile(_bins(values), q), float(np.percentile(values, q, method="inverted_cdf"))
    assert abs(found) <= abs(exact)
    assert abs(found - exact) <= max(2**-11 * abs(exact), 2.0**-137)  # the second is of denormal numbers


@given(arrays(np.int32, st.integers(1, 200), elements=st.integers(-4095, 4095)), st.sampled_from(PERCENTILES))
def test_percentiles_of_hounsfield_units_are_exact(values, q):
    assert _percentile(_bins(values.astype(np.float32)), q) == np.percentile(values, q, method="inverted_cdf")


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=6).filter(any))
def test_weighted_classes_count_alike(counts):
    weights = balanced_class_weights(counts)
    weighted = [w * n for w, n in zip(weights, counts, strict=True)]
    assert sum(weighted) == pytest.approx(sum(counts))
    assert len({round(value / sum(counts), 9) for value in weighted if value}) == 1
    assert [w == 0 for w in weights] == [n == 0 for n in counts]


def test_class_weights_by_hand():
    # N / (K n): 10 / (3 · 6), 10 / (3 · 3), 10 / (3 · 1)
    np.testing.assert_allclose(balanced_class_weights([6, 3, 1]), [0.55555556, 1.11111111, 3.33333333])
    for bad in ([0, 0], [3, -1], []):
        with pytest.raises(ConfigError, match="counts"):
            balanced_class_weights(bad)


@pytest.mark.realdata
def test_of_real_images_on_scales_that_differ_a_thousandfold(data, tmp_path):
    labels, rows = {"background": 0, "anterior": 1, "posterior": 2}, []
    for path in sorted((data / "hippocampus" / "images").glob("*.nii.gz"))[::9]:
        image, label = read_image(path), read_image(data / "hippocampus" / "labels" / path.name)
        case = path.name.removesuffix(".nii.gz")
        rows.append({"patient": case, "stratum": "", **write_case(tmp_path, case, image, label, labels)})
    write_index(tmp_path, name="hippocampus", channel_names=["MR"], labels=labels, rows=rows, manifest={})
    folder = split(DatasetFolder(tmp_path))
    statistics = training_statistics(folder.root, 2)
    entries = folder.datalist("train", 2)
    voxels = np.concatenate([np.asarray(nib.load(entry["image"][0]).dataobj).ravel() for entry in entries])
    truth = np.concatenate([np.asarray(nib.load(entry["label"]).dataobj).ravel() for entry in entries])
    assert voxels.max() > 1e5
    assert statistics["mean"] == [pytest.approx(voxels.mean(dtype=np.float64), rel=1e-12)]
    assert statistics["std"] == [pytest.approx(voxels.std(dtype=np.float64), rel=1e-12)]
    for name, (found,) in statistics["percentiles"].items():
        assert found == pytest.approx(np.percentile(voxels, float(name), method="inverted_cdf"), rel=2**-11)
    assert list(statistics["class_counts"].values()) == np.bincount(truth.astype(int), minlength=3).tolist()
