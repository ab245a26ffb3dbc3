"""The slice store: what is written is what is read, by any number of processes, and nothing half-written."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from medseg.data import SliceDataset, make_splits, write_slices
from medseg.data.slices import source_hash
from medseg.errors import DatasetError, LeakageError

SPLITS = {
    "seed": 0,
    "stratify": None,
    "folds": [{"train": ["c00", "c01", "c02"], "val": ["c03"]}],
    "test": ["c04", "c05"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_dataset):
    dataset = write_dataset(tmp_path_factory.mktemp("dataset"))
    dataset.write_split(SPLITS)
    return dataset


@pytest.fixture(scope="module")
def store(folder):
    return write_slices(folder.root, keep={"train": "foreground", "val": "all", "test": "all"})


def copied(store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(store, tmp_path / "slices.h5"))


def test_layout_is_that_of_the_thesis(store):
    with h5py.File(store) as file:
        assert list(file) == ["test", "train", "val"]
        # c00 and c02 have foreground in the slices 1, 2, 3, c01 in 2, 3; val and test keep all 5 slices of a case.
        for group, n in {"train": 8, "val": 5, "test": 10}.items():
            images, masks = file[group]["images"], file[group]["masks"]
            assert (images.shape, images.dtype, images.chunks) == ((n, 12, 10, 2), np.float32, (1, 12, 10, 2))
            assert (masks.shape, masks.dtype, masks.chunks) == ((n, 12, 10, 2), np.float32, (1, 12, 10, 2))
            assert file[group]["patient_id"].shape == file[group]["slice_id"].shape == (n,)
            assert file[group]["patient_id"].dtype == file[group]["slice_id"].dtype == np.uint32
        assert file["train/slice_id"][:].tolist() == [1, 2, 3, 2, 3, 1, 2, 3]
        assert file["train/patient_id"][:].tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
        assert file["test/patient_id"][:].tolist() == [4] * 5 + [5] * 5
        assert json.loads(file.attrs["patients"]) == ["P0", "P1", "P2", "P3", "P4", "P5"]
        assert json.loads(file["val"].attrs["cases"]) == [
            {"index": 0, "case": "c03", "patient": "P3", "spacing": [2, 1.5, 3], "shape": [12, 10, 5], "axcodes": "RAS"}
        ]


@pytest.mark.parametrize("group", ["train", "val", "test"])
def test_slices_equal_the_images_they_come_from(folder, store, group):
    slices = SliceDataset(store, group)
    assert slices.channel_names == ["CT", "PET"]
    assert slices.labels == {"background": 0, "tumor": 1, "node": 2}
    assert slices.cases["case"].tolist() == [entry["case"] for entry in folder.datalist(group)]
    for item in slices:
        ct, pet = (np.asarray(nib.load(path).dataobj)[..., item["slice"]] for path in folder.image_paths(item["case"]))
        label = np.asarray(nib.load(folder.label_path(item["case"])).dataobj)[..., item["slice"]]
        assert item["image"].dtype == item["label"].dtype == torch.float32
        np.testing.assert_array_equal(item["image"], np.stack([ct, pet]))
        np.testing.assert_array_equal(item["label"], np.stack([label == 1, label == 2]))
        assert item["patient"] == "P" + item["case"][-1]
        assert item["spacing"].tolist() == [2, 1.5, 3]


def test_other_axes_are_cut_with_their_spacing(folder, tmp_path):
    path = write_slices(folder.root, axis=0, keep={"train": "all"}, out=tmp_path / "x.h5")
    item = SliceDataset(path, "train")[8]
    image = np.asarray(nib.load(folder.image_paths("c00")[0]).dataobj)
    np.testing.assert_array_equal(item["image"][0], image[8])
    assert item["slice"] == 8
    assert item["spacing"].tolist() == [1.5, 3, 2]


def test_the_same_dataset_gives_the_same_bytes(folder, store, tmp_path):
    time.sleep(1.1)  # HDF5 keeps times in seconds, if it keeps them
    again = write_slices(folder.root, out=tmp_path / "again.h5", workers=1)
    assert hashlib.sha256(again.read_bytes()).digest() == hashlib.sha256(store.read_bytes()).digest()


def test_compression_changes_no_value(folder, store, tmp_path):
    path = write_slices(folder.root, out=tmp_path / "c.h5", compression="lzf")
    for one, other in zip(SliceDataset(path, "train"), SliceDataset(store, "train"), strict=True):
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["label"], other["label"])


def test_size_crops_and_pads_about_the_center(folder, tmp_path):
    path = write_slices(folder.root, size=(10, 13), out=tmp_path / "s.h5")
    item = SliceDataset(path, "val")[2]
    ct, pet = (np.asarray(nib.load(path).dataobj) for path in folder.image_paths("c03"))
    assert item["image"].shape == (2, 10, 13)
    np.testing.assert_array_equal(item["image"][0, :, 1:11], ct[1:11, :, 2])
    assert (item["image"][0, :, :1] == -1024).all()
    assert (item["image"][0, :, 11:] == -1024).all()
    assert (item["image"][1, :, 11:] == pet.min()).all()
    assert item["label"].sum() == 9 + 2


def test_size_may_not_cut_foreground_off(folder, tmp_path):
    with pytest.raises(
        DatasetError, match=r"case c00: slices of 12x3 cut 9 foreground .* off its 12x10.*larger --size"
    ):
        write_slices(folder.root, size=(12, 3), out=tmp_path / "s.h5", workers=1)
    assert not list(tmp_path.iterdir())


def test_several_sizes_are_refused_and_size_is_offered(tmp_path, write_dataset):
    folder = write_dataset(tmp_path, shapes=((12, 10, 5), (14, 9, 5), (12, 10, 6)))
    folder.write_split(SPLITS)
    message = r"2 sizes: 12x10 \(4, such as c00\), 14x9 \(2, such as c01\); .*--size 14 10 crops none"
    with pytest.raises(DatasetError, match=message):
        write_slices(folder.root)
    assert not (tmp_path / "slices.h5").exists()
    path = write_slices(folder.root, size=(14, 10))
    assert SliceDataset(path, "train")[0]["image"].shape == (2, 14, 10)


def test_folds(folder, tmp_path, write_dataset):
    folder = write_dataset(tmp_path)
    folder.write_split(make_splits(folder.cases, seed=0, folds=3))
    for fold in range(3):
        path = write_slices(folder.root, fold=fold, out=tmp_path / f"{fold}.h5")
        assert SliceDataset(path, "val").cases["case"].tolist() == folder.splits["folds"][fold]["val"]
        assert len(SliceDataset(path, "test")) == 0
    with pytest.raises(DatasetError, match="fold 3"):
        write_slices(folder.root, fold=3)


def test_a_case_without_foreground_is_listed_but_has_no_slice(tmp_path, write_dataset):
    folder = write_dataset(tmp_path)
    folder.write_split(SPLITS)
    label = nib.load(folder.label_path("c01"))
    nib.save(nib.Nifti1Image(np.zeros(label.shape, np.uint8), label.affine), folder.label_path("c01"))
    slices = SliceDataset(write_slices(tmp_path), "train")
    assert slices.cases["case"].tolist() == ["c00", "c01", "c02"]
    assert {item["case"] for item in slices} == {"c00", "c02"}


def test_label_values_that_have_no_name_are_refused(tmp_path, write_dataset):
    folder = write_dataset(tmp_path)
    folder.write_split(SPLITS)
    label = nib.load(folder.label_path("c01"))
    voxels = np.asarray(label.dataobj).copy()
    voxels[0, 0, 0] = 9
    nib.save(nib.Nifti1Image(voxels, label.affine), folder.label_path("c01"))
    with pytest.raises(DatasetError, match=r"case c01: the label has the value\(s\) 9"):
        write_slices(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".h5")]


def test_a_label_at_another_place_than_its_image_is_refused(tmp_path, write_dataset):
    folder = write_dataset(tmp_path)
    folder.write_split(SPLITS)
    label = nib.load(folder.label_path("c01"))
    mirrored = nib.Nifti1Image(np.asarray(label.dataobj), label.affine @ np.diag([-1, 1, 1, 1]))
    nib.save(mirrored, folder.label_path("c01"))
    with pytest.raises(DatasetError, match=r"case c01: the label lies up to .* mm away from the image"):
        write_slices(tmp_path)


def test_cases_cut_along_different_directions_are_refused(tmp_path, write_dataset):
    folder = write_dataset(tmp_path)
    folder.write_split(SPLITS)
    turned = np.array([[0, 0, 2, 0], [2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 1]], dtype=float)
    for path in (*folder.image_paths("c01"), folder.label_path("c01")):
        nib.save(nib.Nifti1Image(np.asarray(nib.load(path).dataobj), turned), path)
    with pytest.raises(DatasetError, match="axis 2 of case c01 runs to R, that of case c00 to S"):
        write_slices(tmp_path)


def test_a_patient_in_two_parts_is_refused_when_writing(tmp_path, write_dataset):
    folder = write_dataset(tmp_path)
    folder.write_split(SPLITS)
    splits = {**SPLITS, "test": ["c00", "c04", "c05"]}
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    with pytest.raises(LeakageError, match=r"patient P0 is in train .* and in test"):
        write_slices(tmp_path)
    assert not (tmp_path / "slices.h5").exists()


@pytest.mark.parametrize(
    "arguments", [{"keep": {"train": "some"}}, {"keep": {"trian": "all"}}, {"axis": 3}, {"size": (0, 4)}]
)
def test_bad_arguments_are_named(folder, arguments):
    with pytest.raises(DatasetError, match="expected"):
        write_slices(folder.root, **arguments)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_what_one_process_reads(store, context):
    slices = SliceDataset(store, "test")
    first = slices[0]  # the file is open in the parent when the workers start
    loader = DataLoader(slices, batch_size=3, num_workers=2, multiprocessing_context=context)
    batches = list(loader)
    assert torch.equal(batches[0]["image"][0], first["image"])
    assert [case for batch in batches for case in batch["case"]] == [item["case"] for item in slices]
    for name in ("image", "label", "slice", "spacing"):
        alone = [torch.as_tensor(item[name]) for item in slices]
        assert torch.equal(torch.cat([batch[name] for batch in batches]), torch.stack(alone))


def test_a_forked_process_does_not_read_through_its_parents_handle(store):
    slices = SliceDataset(store, "test")
    _ = slices[0]
    inherited = slices._file
    child = os.fork()
    if not child:
        _ = slices[0]
        os._exit(slices._file is inherited)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_pickling_and_closing_keep_the_dataset_usable(store):
    slices = SliceDataset(store, "val")
    image = slices[0]["image"]
    assert torch.equal(pickle.loads(pickle.dumps(slices))[0]["image"], image)
    slices.close()
    assert torch.equal(slices[0]["image"], image)


def test_indices_are_those_of_a_list(store):
    slices = SliceDataset(store, "val", transform=lambda item: item["slice"])
    assert list(slices) == [0, 1, 2, 3, 4]
    assert slices[-1] == 4
    for index in (5, -6):
        with pytest.raises(IndexError):
            slices[index]


def test_more_cases_than_an_attribute_of_old_files_holds(store, tmp_path):
    path = copied(store, tmp_path)
    cases = [
        {"index": i, "case": f"c{i:06d}", "patient": "P3", "spacing": [1, 1, 1], "shape": [9, 9, 9], "axcodes": "RAS"}
        for i in range(2000)
    ]
    with h5py.File(path, "a") as file:
        file["val"].attrs["cases"] = json.dumps(cases)
    assert len(SliceDataset(path, "val").cases) == 2000


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_a_store_cut_short_is_refused(store, tmp_path, share):
    path = copied(store, tmp_path)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(DatasetError, match=r"slices\.h5: not a complete HDF5 file") as caught:
        SliceDataset(path, "train")
    assert "\n" not in str(caught.value)


def test_what_is_no_slice_store_is_refused(store, tmp_path):
    path = tmp_path / "slices.h5"
    with pytest.raises(DatasetError, match="no such file; `data_prep slices` writes it"):
        SliceDataset(path, "train")
    path.write_text("case,patient\n")
    with pytest.raises(DatasetError, match="not a complete HDF5 file"):
        SliceDataset(path, "train")
    with h5py.File(path, "w") as file:
        file["train/images"] = np.zeros((2, 3, 3, 1))
    with pytest.raises(DatasetError, match="not a slice store"):
        SliceDataset(path, "train")
    with pytest.raises(DatasetError, match="no group 'tset'; there are test, train, val"):
        SliceDataset(store, "tset")


def test_a_damaged_store_is_refused(store, tmp_path):
    path = copied(store, tmp_path)
    with h5py.File(path, "a") as file:
        file["val/slice_id"].resize(3, axis=0)
    with pytest.raises(DatasetError, match="the datasets of val differ in length"):
        SliceDataset(path, "train")
    with h5py.File(path, "a") as file:
        del file["val/masks"]
    with pytest.raises(DatasetError, match="the group val has no masks"):
        SliceDataset(path, "train")
    with h5py.File(path, "a") as file:
        file.attrs["version"] = 99
    with pytest.raises(DatasetError, match="version 99"):
        SliceDataset(path, "train")


def test_a_patient_in_two_groups_is_refused(store, tmp_path):
    path = copied(store, tmp_path)
    with h5py.File(path, "a") as file:
        file["test/patient_id"][0] = 0
    for group in ("train", "val", "test"):
        with pytest.raises(LeakageError, match="patient P0 has slices in test and in train"):
            SliceDataset(path, group)


def test_the_source_hash_follows_the_split_and_the_voxels(folder):
    cases, splits = folder.cases, folder.splits
    before = source_hash(cases, splits, 0)
    assert source_hash(cases.assign(stratum="changed").iloc[::-1], splits, 0) == before
    moved = {**splits, "folds": [{"train": ["c00", "c01", "c03"], "val": ["c02"]}]}
    assert source_hash(cases, moved, 0) != before
    other = cases.copy()
    other.loc[0, "label_sha256"] = "0" * 64
    assert source_hash(other, splits, 0) != before


def test_a_killed_run_leaves_the_old_file(folder, tmp_path, write_dataset):
    folder = write_dataset(tmp_path)
    folder.write_split(SPLITS)
    old = write_slices(tmp_path).read_bytes()
    program = (
        "import sys, time\n"
        "from medseg.data import write_slices\n"
        "def stop(done, total):\n"
        "    print(done, flush=True)\n"
        "    time.sleep(60 if done == 4 else 0)\n"
        "write_slices(sys.argv[1], keep={'train': 'all'}, progress=stop)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line == "4\n":
            break
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert (tmp_path / "slices.h5").read_bytes() == old
    assert len(SliceDataset(tmp_path / "slices.h5", "train")) == 8
