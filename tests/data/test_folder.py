"""The dataset on disk: what it says, how it is split, what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from monai.data import MetaTensor, load_decathlon_datalist
from monai.transforms import LoadImaged

from medseg.data import DatasetFolder, datalist, make_splits, pixel_hash
from medseg.data.folder import write_case, write_index
from medseg.errors import ConfigError, DatasetError, LeakageError

Write = Callable[..., DatasetFolder]


def names(entries: list[dict]) -> list[str]:
    return [entry["case"] for entry in entries]


def test_a_dataset_says_what_was_written(tmp_path: Path, write_dataset: Write) -> None:
    dataset = write_dataset(tmp_path / "d", patients=("001", "NA"))
    assert dataset.channel_names == ["CT", "PET"]
    assert dataset.labels == {"background": 0, "tumor": 1, "node": 2}
    cases = dataset.cases
    assert list(cases.columns) == [
        *("case", "patient", "stratum", "shape", "spacing", "volume_ml_tumor", "volume_ml_node"),
        *("image_sha256", "label_sha256"),
    ]
    assert list(cases["patient"]) == ["001", "NA"]  # text stays text
    assert list(cases["shape"]) == ["12x10x5"] * 2
    assert list(cases["spacing"]) == ["2x1.5x3"] * 2
    # 3 x 3 x 3 voxels, less none, of 9 mm³; the node has 2 voxels.
    assert cases["volume_ml_tumor"][0] == pytest.approx(27 * 9 / 1000)
    assert cases["volume_ml_node"][0] == pytest.approx(2 * 9 / 1000)
    label = np.asarray(nib.load(dataset.label_path("c00")).dataobj)
    assert label.dtype == np.uint8
    assert cases["label_sha256"][0] == pixel_hash(label)
    image = np.stack([np.asarray(nib.load(path).dataobj) for path in dataset.image_paths("c00")])
    assert image.dtype == np.float32
    assert cases["image_sha256"][0] == pixel_hash(image)


def test_the_list_of_all_cases_needs_no_split_and_loads(tmp_path: Path, write_dataset: Write) -> None:
    write_dataset(tmp_path / "d")
    entries = datalist(tmp_path / "d", "all")
    assert names(entries) == [f"c{n:02d}" for n in range(6)]
    assert all(Path(path).is_absolute() for entry in entries for path in (*entry["image"], entry["label"]))
    loaded = LoadImaged(["image", "label"], ensure_channel_first=True)(entries[1])
    assert tuple(loaded["image"].shape) == (2, 12, 10, 5)
    assert tuple(loaded["label"].shape) == (1, 12, 10, 5)
    assert torch.allclose(loaded["image"].affine, loaded["label"].affine)
    with pytest.raises(DatasetError, match="data_prep split"):
        datalist(tmp_path / "d", "train")


def test_a_split_reaches_nnunet_monai_and_medseg_alike(tmp_path: Path, write_dataset: Write) -> None:
    patients = [f"P{n // 2}" for n in range(20)]
    dataset = write_dataset(tmp_path / "d", patients=patients)
    splits = make_splits(dataset.cases, seed=3)
    dataset.write_split(splits)
    train, val, test = splits["folds"][0]["train"], splits["folds"][0]["val"], splits["test"]
    assert (len(train), len(val), len(test)) == (14, 2, 4)

    info = json.loads((tmp_path / "d" / "dataset.json").read_text())
    assert sorted(info["dataset"]) == sorted(train + val)
    assert info["numTraining"] == 16
    assert not any(case in json.dumps(info["dataset"]) for case in test)
    for paths in info["dataset"].values():
        assert all((tmp_path / "d" / path).is_file() for path in (*paths["images"], paths["label"]))
    assert json.loads((tmp_path / "d" / "splits_final.json").read_text()) == [{"train": train, "val": val}]

    for key, part, members in (("training", "train", train), ("validation", "val", val), ("test", "test", test)):
        listed = load_decathlon_datalist(str(tmp_path / "d" / "dataset.json"), data_list_key=key)
        assert names(listed) == members
        assert names(DatasetFolder(tmp_path / "d").datalist(part)) == members
        assert [entry["image"] for entry in listed] == [
            entry["image"] for entry in DatasetFolder(tmp_path / "d").datalist(part)
        ]


def test_folds_become_one_decathlon_list_with_fold_numbers(tmp_path: Path, write_dataset: Write) -> None:
    dataset = write_dataset(tmp_path / "d")
    splits = make_splits(dataset.cases, seed=0, folds=3)
    dataset.write_split(splits)
    info = DatasetFolder(tmp_path / "d").info
    assert "test" not in info  # MONAI's reader fails on an empty list
    assert "validation" not in info
    assert info["numTraining"] == 6
    for entry in info["training"]:
        assert entry["case"] in splits["folds"][entry["fold"]]["val"]
    for fold in range(3):
        assert names(dataset.datalist("val", fold)) == splits["folds"][fold]["val"]
    assert dataset.datalist("test") == []
    with pytest.raises(DatasetError, match="fold 3 asked for, it has 0 to 2"):
        dataset.datalist("train", 3)
    # Another split leaves nothing of the first behind.
    dataset.write_split(make_splits(dataset.cases, seed=0))
    assert set(DatasetFolder(tmp_path / "d").info) >= {"training", "validation", "test"}
    assert not any("fold" in entry for entry in DatasetFolder(tmp_path / "d").info["training"])


def test_a_patient_in_two_parts_is_refused_in_writing_and_in_reading(tmp_path: Path, write_dataset: Write) -> None:
    dataset = write_dataset(tmp_path / "d", patients=("A", "A", "B", "C"))
    leaky = {"seed": 0, "stratify": None, "folds": [{"train": ["c00", "c02"], "val": ["c01"]}], "test": ["c03"]}
    before = (tmp_path / "d" / "dataset.json").read_bytes()
    with pytest.raises(LeakageError, match="patient A"):
        dataset.write_split(leaky)
    assert (tmp_path / "d" / "dataset.json").read_bytes() == before
    assert not (tmp_path / "d" / "splits.json").exists()
    (tmp_path / "d" / "splits.json").write_text(json.dumps(leaky))
    with pytest.raises(LeakageError, match=r"splits\.json.*patient A"):
        DatasetFolder(tmp_path / "d").datalist("train")


def test_slices_of_another_split_are_removed(tmp_path: Path, write_dataset: Write) -> None:
    dataset = write_dataset(tmp_path / "d")
    first, second = (make_splits(dataset.cases, seed=seed) for seed in (0, 1))
    assert first != second
    dataset.write_split(first)
    (tmp_path / "d" / "slices.h5").write_bytes(b"of the first split")
    dataset.write_split(first)
    assert (tmp_path / "d" / "slices.h5").exists()
    dataset.write_split(second)
    assert not (tmp_path / "d" / "slices.h5").exists()


def test_the_hash_follows_pixels_and_split_but_not_the_place(tmp_path: Path, write_dataset: Write) -> None:
    one, two = write_dataset(tmp_path / "one"), write_dataset(tmp_path / "two")
    assert one.dataset_hash() == two.dataset_hash()
    before = one.dataset_hash()
    one.write_split(make_splits(one.cases, seed=0))
    assert one.dataset_hash() != before
    two.write_split(make_splits(two.cases, seed=1))
    assert one.dataset_hash() != two.dataset_hash()
    other = write_dataset(tmp_path / "other", patients=("P0", "P1"))
    assert other.dataset_hash() != before


def alter(path: Path, key: str, value: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / ".build").mkdir(), "unfinished"),
        (lambda root: (root / "dataset.json").unlink(), "no dataset.json"),
        (lambda root: (root / "dataset.json").write_text("{"), "not JSON"),
        (lambda root: (root / "dataset.json").write_text("{}"), "no channel_names"),
        *(
            (
                lambda root, key=key, value=value: alter(root / "dataset.json", key, value),
                f"dataset.json: {key}: {{.* found",
            )
            for key, value in (
                ("channel_names", {"CT": 0, "PET": 1}),
                ("channel_names", {"0": "CT", "2": "PET"}),
                ("channel_names", {"0": 5}),
                ("labels", {"background": 0, "tumor": "1"}),
                ("labels", {"0": "background", "1": "tumor"}),
                ("labels", {"background": 0, "tumor": [1, 2]}),
                ("labels", {"background": 0, "tumor": 1, "node": 1}),
                ("classes", {"benign": 0, "malignant": None}),
            )
        ),
        (lambda root: (root / "cases.csv").unlink(), "no such file"),
        (lambda root: (root / "cases.csv").write_text("case,shape\nc00,1x1x1\n"), "column patient is missing"),
        (lambda root: (root / "cases.csv").write_text("case,patient\nc00,A\nc00,B\n"), "c00 is listed twice"),
        (lambda root: (root / "cases.csv").write_bytes(b"\xff\xfe\x00"), "not a table"),
        (lambda root: (root / "imagesTr" / "c02_0001.nii.gz").unlink(), "c02_0001.nii.gz: no such file"),
    ],
)
def test_a_damaged_dataset_is_named(
    tmp_path: Path, write_dataset: Write, damage: Callable[[Path], object], message: str
) -> None:
    write_dataset(tmp_path / "d")
    damage(tmp_path / "d")
    with pytest.raises(DatasetError, match=message) as caught:
        datalist(tmp_path / "d", "all")
    assert "\n" not in str(caught.value)


def test_a_wrong_part_is_answered_with_the_right_ones(tmp_path: Path, write_dataset: Write) -> None:
    dataset = write_dataset(tmp_path / "d")
    with pytest.raises(ConfigError, match=r"'training' given.*nearest: train"):
        dataset.datalist("training")
    with pytest.raises(DatasetError, match="no such folder"):
        DatasetFolder(tmp_path / "nowhere")


def test_bad_voxels_and_labels_are_refused(tmp_path: Path) -> None:
    labels = {"background": 0, "tumor": 1}
    image, label = MetaTensor(torch.zeros(1, 4, 4, 4)), MetaTensor(torch.zeros(1, 4, 4, 4, dtype=torch.uint8))
    bad = image.clone()
    bad[0, 1, 1, 1] = float("nan")
    with pytest.raises(DatasetError, match="a: 1 voxels of the image are no finite number"):
        write_case(tmp_path, "a", bad, label, labels)
    with pytest.raises(DatasetError, match=r"label values \[3\]"):
        write_case(tmp_path, "a", image, label + 3, labels)
    with pytest.raises(DatasetError, match="label of shape"):
        write_case(tmp_path, "a", image, label[:, :3], labels)
    mirrored = MetaTensor(label.as_tensor(), affine=torch.diag(torch.tensor([-1.0, 1, 1, 1])))
    with pytest.raises(DatasetError, match="a: the label lies up to 6 mm away from the image"):
        write_case(tmp_path, "a", image, mirrored, labels)
    with pytest.raises(DatasetError, match="a: the label is a Tensor, a MetaTensor with its affine expected"):
        write_case(tmp_path, "a", image, label.as_tensor(), labels)  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match="a: the image is a ndarray, a MetaTensor with its affine expected"):
        write_case(tmp_path, "a", image.numpy(), label, labels)  # type: ignore[arg-type]
    assert list(tmp_path.rglob("*.gz")) == []
    row = write_case(tmp_path, "a", image, label, labels) | {"patient": "p", "stratum": ""}
    for wrong in ({"tumor": 1}, {"background": 0, "tumor": 2}, {"background": 1, "tumor": 0}):
        with pytest.raises(DatasetError, match="1 to n-1 expected"):
            write_index(tmp_path, name="x", channel_names=["CT"], labels=wrong, rows=[row], manifest={})
    with pytest.raises(DatasetError, match="case a twice"):
        write_index(tmp_path, name="x", channel_names=["CT"], labels=labels, rows=[row, row], manifest={})
    with pytest.raises(DatasetError, match="no case"):
        write_index(tmp_path, name="x", channel_names=["CT"], labels=labels, rows=[], manifest={})


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=4, max_side=4)), st.data())
def test_the_pixel_hash_is_of_type_shape_and_values_only(array: np.ndarray, data: st.DataObject) -> None:
    assert pixel_hash(np.asfortranarray(array)) == pixel_hash(array)
    assert pixel_hash(array.astype(">f4")) == pixel_hash(array)
    assert pixel_hash(array.astype(np.float64)) != pixel_hash(array)
    assert pixel_hash(array[None]) != pixel_hash(array)
    index = tuple(data.draw(st.integers(0, n - 1)) for n in array.shape)
    changed = array.copy()
    changed[index] = 0 if changed[index] else 1
    assert pixel_hash(changed) != pixel_hash(array)
