"""What is kept on disk is given back only while nothing changed that it depends on."""

import functools
import json
import logging
import multiprocessing
import os
import shutil
import warnings
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.data import MetaTensor, PersistentDataset, set_track_meta
from monai.transforms import (
    Compose,
    Flipd,
    Lambdad,
    LoadImaged,
    MapTransform,
    RandGaussianNoised,
    ScaleIntensityd,
    Spacingd,
    Transform,
)

from medseg.data import ContentCacheDataset, SeededDataset, SeededLoader, content_hash
from medseg.data.content_hash import describe, file_hash
from medseg.errors import ConfigError, ReadError
from medseg.io import Reader, write_nifti
from medseg.transforms import N4BiasFieldCorrectiond

LOAD = LoadImaged("image", reader=Reader)


class Counted(MapTransform):
    """Adds a number, and a line to a file for every time it worked."""

    def __init__(self, keys, log, add=1.0):
        super().__init__(keys)
        self.log_name = str(log)[::-1]  # written backwards, so that the name does not say the file
        self.add = add

    def __call__(self, data):
        with Path(self.log_name[::-1]).open("a") as file:
            file.write("x")
        return {**data, **{key: data[key] + self.add for key in self.keys}}


class Made(Transform):
    """Makes an item out of nothing."""

    def __init__(self, value):
        self.value = value

    def __call__(self, data):
        return {"made": self.value}


class Color(Enum):
    RED = "red"


def double(x):
    return 2 * x


@pytest.fixture
def scan(tmp_path):
    """Write an image of a value, which takes the place of the one before."""

    def write(value=1.0, name="scan.nii.gz"):
        voxels = np.full((6, 5, 4), value, np.float32)
        voxels[2:4] += 3
        write_nifti((voxels, np.diag([2.0, 1.0, 3.0, 1.0])), tmp_path / name)
        return str(tmp_path / name)

    return write


@pytest.fixture
def times(tmp_path):
    """How often the deterministic transform worked, and a file to count in."""
    log = tmp_path / "log.txt"
    log.touch()
    return log, lambda: len(log.read_text())


def stored(folder):
    return sorted(folder.glob("*.cache"))


def value(dataset, key=0):
    return float(dataset[key]["image"].max())


def test_the_second_dataset_computes_nothing(scan, times, tmp_path):
    log, count = times
    items = [{"image": scan(1.0, "a.nii"), "id": 1}, {"image": scan(2.0, "b.nii"), "id": 2}]
    transform = [LOAD, Counted("image", log)]
    first = [ContentCacheDataset(items, transform, tmp_path / "cache")[k] for k in range(2)]
    assert count() == 2
    second = [ContentCacheDataset(items, transform, tmp_path / "cache")[k] for k in range(2)]
    assert count() == 2
    for one, two, item in zip(first, second, items, strict=True):
        assert torch.equal(one["image"].as_tensor(), two["image"].as_tensor())
        assert one["image"].meta["filename_or_obj"] == two["image"].meta["filename_or_obj"] == item["image"]
        assert one["id"] == two["id"] == item["id"]


def test_a_changed_file_is_seen_where_monais_persistent_dataset_serves_the_old_one(scan, tmp_path):
    items = [{"image": scan(1.0)}]
    ours = ContentCacheDataset(items, [LOAD], tmp_path / "ours")
    monais = PersistentDataset(items, [LOAD], tmp_path / "monais")
    assert value(ours) == value(monais) == 4
    scan(7.0)
    assert value(ours) == value(ContentCacheDataset(items, [LOAD], tmp_path / "ours")) == 10
    assert value(monais) == value(PersistentDataset(items, [LOAD], tmp_path / "monais")) == 4, "MONAI mended it: say so"


def test_a_changed_parameter_is_seen_where_monais_persistent_dataset_serves_the_old_one(scan, tmp_path):
    items = [{"image": scan(1.0)}]

    def chain(top):
        return [LOAD, ScaleIntensityd("image", minv=0.0, maxv=top)]

    for top, stale in ((1.0, 1.0), (5.0, 1.0)):
        assert value(ContentCacheDataset(items, chain(top), tmp_path / "ours")) == top
        assert value(PersistentDataset(items, chain(top), tmp_path / "monais")) == stale


def test_a_change_that_keeps_size_and_time_is_seen(scan, tmp_path):
    path = Path(scan(1.0, "scan.nii"))
    os.utime(path, ns=(10**18, 10**18))
    dataset = ContentCacheDataset([{"image": str(path)}], [LOAD], tmp_path / "cache")
    assert value(dataset) == 4
    changed = scan(7.0, "other.nii")
    with path.open("r+b") as file:
        file.write(Path(changed).read_bytes())
    os.utime(path, ns=(10**18, 10**18))
    assert value(dataset) == 10


def test_a_file_is_read_again_only_when_it_may_have_changed(scan, monkeypatch):
    path = scan()
    reads = []
    real = content_hash.hashlib.file_digest
    monkeypatch.setattr(content_hash.hashlib, "file_digest", lambda *a: reads.append(1) or real(*a))
    first = file_hash(path)
    file_hash(path)
    assert len(reads) == 2, "the file is too young to be trusted"
    monkeypatch.setattr(content_hash, "_SETTLED_NS", -(10**12))
    assert [file_hash(path), file_hash(path), file_hash(path)] == [first] * 3
    assert len(reads) == 3
    scan(9.0)
    assert file_hash(path) != first


def bright(shape=(36, 34, 12)):
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    tissue = np.where(np.hypot(x, y) < 0.8, np.where(np.abs(z) < 0.4, 90, 50), 1)
    return (tissue * np.exp(0.3 * x)).astype(np.float32)


def test_the_result_of_n4_is_kept_and_computed_anew_when_it_would_differ(tmp_path, times):
    log, count = times
    write_nifti((bright(), np.eye(4)), tmp_path / "mr.nii")
    items = [{"image": str(tmp_path / "mr.nii")}]

    def corrected(*transforms):
        return ContentCacheDataset(items, [LOAD, *transforms], tmp_path / "cache")[0]["image"].as_tensor()

    def n4(shrink_factor):
        return N4BiasFieldCorrectiond("image", shrink_factor=shrink_factor, maximum_number_of_iterations=[3])

    def kept():
        return len(stored(tmp_path / "cache"))

    first = corrected(n4(3.5))
    assert kept() == 1
    assert torch.equal(corrected(n4(3.5)), first)
    assert kept() == 1, "the same parameters, in another object"
    assert not torch.equal(corrected(n4(1)), first)
    assert kept() == 2, "another shrink factor"
    one = corrected(n4(3.5), Counted("image", log, add=20.0))
    other = corrected(Counted("image", log, add=20.0), n4(3.5))
    assert not torch.equal(one, other)
    assert (kept(), count()) == (4, 2), "another order"
    write_nifti((bright() + 5, np.eye(4)), tmp_path / "mr.nii")
    assert not torch.equal(corrected(n4(3.5)), first)
    assert kept() == 5, "another file"


@pytest.mark.parametrize("how", ["name", "inside"])
def test_every_file_of_a_folder_counts(tmp_path, how):
    folder = tmp_path / "series"
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "1").write_bytes(b"one")
    before = describe([str(folder)])
    assert describe([str(folder)]) == before
    if how == "name":
        (folder / "below" / "1").rename(folder / "below" / "2")
    else:
        (folder / "below" / "1").write_bytes(b"two")
    assert describe([str(folder)]) != before


@pytest.mark.parametrize(
    ("header", "text", "voxels"),
    [
        (
            "a.mhd",
            "NDims = 2\nDimSize = 2 2\nElementSpacing = 1 1\nElementType = MET_UCHAR\nElementDataFile = v.raw\n",
            "v.raw",
        ),
        ("a.nhdr", "NRRD0004\ntype: uchar\ndimension: 2\nsizes: 2 2\nencoding: raw\ndata file: v.raw\n\n", "v.raw"),
        ("a.hdr", "x", "a.img"),
        ("a.img", "x", "a.hdr"),
        ("DICOMDIR", "x", "v"),
    ],
)
def test_the_voxels_beside_a_header_count(tmp_path, header, text, voxels):
    (tmp_path / header).write_text(text)
    (tmp_path / voxels).write_bytes(b"1234")
    before = describe(tmp_path / header)
    (tmp_path / voxels).write_bytes(b"1235")
    assert describe(tmp_path / header) != before


@pytest.mark.parametrize("source", ["../v.raw", "/v.raw", "LIST"])
def test_voxels_elsewhere_are_refused(tmp_path, source):
    (tmp_path / "a.nhdr").write_text(f"NRRD0004\ntype: uchar\ndimension: 1\nsizes: 4\ndata file: {source}\n\n")
    with pytest.raises(ReadError, match="beside"):
        ContentCacheDataset([{"image": str(tmp_path / "a.nhdr")}], [LOAD], tmp_path / "cache")[0]


def test_the_file_that_a_transform_names_counts(tmp_path):
    statistics = tmp_path / "statistics.json"
    statistics.write_text(json.dumps({"mean": 1}))
    before = describe(Made(str(statistics)))
    statistics.write_text(json.dumps({"mean": 2}))
    assert describe(Made(str(statistics))) != before


def test_the_name_of_a_folder_is_a_folder_in_an_item_and_a_key_in_a_transform(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "image").mkdir()

    def keys(item, **attributes):
        transform = Made(1)
        vars(transform).update(attributes)
        return ContentCacheDataset([item], [transform], tmp_path / "cache").key(0)

    chosen = [
        ({"x": "image"}, {}),
        ({"image": 1}, {"keys": ("image",), "sep": "."}),
        ({}, {"atlas": "./image"}),
        ({}, {"atlas": Path("image")}),
    ]
    before = [keys(item, **attributes) for item, attributes in chosen]
    (tmp_path / "image" / "1").write_bytes(b"1")
    after = [keys(item, **attributes) for item, attributes in chosen]
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, True, False, False]


def test_the_home_folder_is_found_as_monai_finds_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.bin").write_bytes(b"1")
    before = describe("~/a.bin")
    (tmp_path / "a.bin").write_bytes(b"2")
    assert describe("~/a.bin") != before


DISTINCT = [
    *(None, True, 1, 1.0, "1", b"1", 0.0, -0.0, 1j, float("nan"), float("inf"), (1,), [1], {1}, {1: 1}, {"1": 1}),
    *([[1], 2], [1, [2]], {"a": 1, "b": 2}, {"a": 2, "b": 1}, range(3), slice(3), Path("1"), Color.RED, "red"),
    *(np.float32(1), np.float64(1), np.ones(1), np.ones((1, 1)), np.ones(1, np.float32), np.zeros(1), np.array("1")),
    *(torch.ones(1), torch.ones(1, 1), torch.ones(1, dtype=torch.int64), torch.float32, np.float32, np.dtype("f4")),
    *(MetaTensor(torch.ones(1)), MetaTensor(torch.ones(1), affine=2 * torch.eye(4)), torch.device("cpu")),
    *(np.mean, np.max, double, functools.partial(double, 1), functools.partial(double, 2), "".join, Made, Made(1)),
    *(Made(2), Made([]), Flipd("a", 0), Flipd("a", 1), Flipd("b", 0), Compose([Flipd("a", 0)]), "", "\0", "x" * 5000),
    *(LOAD, LoadImaged("image", reader=Reader("stored")), Spacingd("image", (1, 1, 1)), Spacingd("image", (1, 1, 2))),
]


def test_different_values_have_different_descriptions():
    described = [json.dumps(describe(v)) for v in DISTINCT if not isinstance(v, Compose) and v != "".join]
    assert len(set(described)) == len(described)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def same(one, two):
    """Equal, and of the same types, to any depth."""
    if type(one) is not type(two):
        return False
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


@given(plain, plain)
def test_descriptions_are_equal_exactly_where_the_values_are(one, two):
    equal = json.dumps(describe(one)) == json.dumps(describe(two))
    ordered = [json.loads(json.dumps(v, sort_keys=True), object_pairs_hook=lambda p: p) for v in (one, two)]
    if same(one, two):
        assert equal
    elif ordered[0] != ordered[1]:
        assert not equal


@given(plain)
def test_plain_results_come_back_as_they_were(tmp_path_factory, made):
    folder = tmp_path_factory.mktemp("cache")
    for _ in range(2):
        assert same(ContentCacheDataset([0], [Made(made)], folder)[0], {"made": made})
    assert len(stored(folder)) == 1


@pytest.mark.parametrize(
    "made",
    [
        np.arange(6, dtype=">i2").reshape(2, 3),
        np.zeros((0, 3), np.uint16),
        np.array(["a", "bc"]),
        np.array(5.5),
        np.float32(2.5),
        np.bool_(True),
        torch.arange(6, dtype=torch.int16),
        torch.tensor([True]),
        torch.zeros(0, 2),
        torch.arange(1000.0)[3:5],
        torch.Size([1, 2]),
        torch.float16,
        torch.device("cpu"),
        Path("a/b"),
    ],
    ids=lambda v: f"{type(v).__name__}-{getattr(v, 'dtype', v)}",
)
def test_arrays_and_tensors_come_back_as_they_were(tmp_path, made):
    for _ in range(2):
        found = ContentCacheDataset([0], [Made(made)], tmp_path)[0]["made"]
        assert type(found) is type(made)
        if hasattr(made, "shape"):
            assert found.shape == made.shape
            assert found.dtype == made.dtype
            np.testing.assert_array_equal(np.asarray(found), np.asarray(made))
        else:
            assert found == made
    assert stored(tmp_path)[0].stat().st_size < 4000, "a view is kept without the rest"


def test_a_metatensor_keeps_its_geometry_and_can_be_inverted(scan, tmp_path):
    items = [{"image": scan()}]
    chain = Compose([LOAD, Spacingd("image", (1, 1, 1)), Flipd("image", 0)])
    expected = chain(items[0])["image"]
    ContentCacheDataset(items, chain, tmp_path / "cache")[0]
    again = Compose([LOAD, Spacingd("image", (1, 1, 1)), Flipd("image", 0)])
    kept = ContentCacheDataset(items, again, tmp_path / "cache")[0]
    assert len(stored(tmp_path / "cache")) == 1
    image = kept["image"]
    assert isinstance(image, MetaTensor)
    np.testing.assert_array_equal(image.affine, expected.affine)
    assert image.affine.dtype == expected.affine.dtype
    assert set(image.meta) == set(expected.meta)
    np.testing.assert_array_equal(image.meta["original_affine"], expected.meta["original_affine"])
    assert [step["class"] for step in image.applied_operations] == ["SpatialResample", "Flip"]
    back = Compose(again.transforms[1:]).inverse(kept)["image"]
    assert back.shape == (1, 6, 5, 4)
    np.testing.assert_allclose(back.affine, np.diag([2.0, 1.0, 3.0, 1.0]), atol=1e-6)


def noisy(folder=None, items=None):
    chain = [ScaleIntensityd("image", minv=0.0, maxv=2.0), RandGaussianNoised("image", 1.0)]
    chain[0].more = {"sets", "have", "another", "order", "in", "every", "process"}
    items = items or [{"image": torch.arange(4.0).reshape(1, 2, 2) * k + k} for k in range(1, 7)]
    return SeededDataset(items, chain, seed=3) if folder is None else ContentCacheDataset(items, chain, folder, seed=3)


def batches(dataset, **kwargs):
    loader = SeededLoader(dataset, 2, seed=5, **kwargs)
    found = []
    for epoch in (1, 2):
        loader.sampler.set_epoch(epoch)
        found += [batch["image"] for batch in loader]
    return torch.cat(found)


def test_caching_changes_nothing_and_randomness_goes_on(tmp_path):
    expected = batches(noisy())
    for _ in range(2):
        assert torch.equal(batches(noisy(tmp_path)), expected)
    assert len(stored(tmp_path)) == 6
    in_memory = ContentCacheDataset(noisy().data, noisy().transform, tmp_path, seed=3, cache_rate=0.5)
    assert torch.equal(batches(in_memory), expected)
    assert len(stored(tmp_path)) == 6


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_workers_share_the_folder(tmp_path, how):
    expected = batches(noisy())
    context = multiprocessing.get_context(how)
    assert torch.equal(
        batches(noisy(tmp_path), num_workers=1 + (how == "fork"), multiprocessing_context=context), expected
    )
    assert len(stored(tmp_path)) == 6, "the workers and the trainer give a result the same name"
    assert torch.equal(batches(noisy(tmp_path)), expected)
    assert len(stored(tmp_path)) == 6


def test_a_given_item_is_not_changed_and_a_result_is_the_callers_own(tmp_path):
    items = [{"image": torch.ones(1, 2)}]
    dataset = ContentCacheDataset(items, [ScaleIntensityd("image", minv=None, maxv=None, factor=1.0)], tmp_path)
    for _ in range(2):
        result = dataset[0]["image"]
        assert torch.equal(result, torch.full((1, 2), 2.0))
        result[:] = 9
    assert torch.equal(items[0]["image"], torch.ones(1, 2))


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other", "pickle"])
def test_a_damaged_file_is_computed_again(tmp_path, times, damage, caplog):
    log, count = times
    folder = tmp_path / "cache"
    dataset = ContentCacheDataset([{"image": torch.arange(500.0)}], [Counted("image", log)], folder)
    expected = dataset[0]["image"]
    (file,) = stored(folder)
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    file.write_bytes(
        {"cut": content[:-40], "flip": content, "empty": b"", "other": b"other", "pickle": b"cposix\nsystem\n."}[damage]
    )
    with caplog.at_level(logging.WARNING):
        assert torch.equal(dataset[0]["image"], expected)
    assert count() == 2
    assert "damaged" in caplog.text
    assert torch.equal(dataset[0]["image"], expected)
    assert count() == 2


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, times, caplog):
    dataset = ContentCacheDataset([{"image": torch.ones(1)}], [Counted("image", times[0])], tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    with caplog.at_level(logging.WARNING):
        assert float(dataset[0]["image"]) == 2
    assert "cannot be written" in caplog.text


def test_pruning_deletes_what_was_used_longest_ago(tmp_path, times):
    log, count = times
    items = [{"image": torch.full((100,), float(k))} for k in range(3)]
    dataset = ContentCacheDataset(items, [Counted("image", log)], tmp_path / "cache")
    for k in range(3):
        dataset[k]
    for age, k in enumerate((1, 0, 2)):
        os.utime(tmp_path / "cache" / f"{dataset.key(k)}.cache", ns=(10**18, 10**18 + age))
    dataset[1]  # the oldest is used again
    size = stored(tmp_path / "cache")[0].stat().st_size
    assert dataset.prune(2 * size) == size
    assert not (tmp_path / "cache" / f"{dataset.key(0)}.cache").exists()
    assert count() == 3
    assert float(dataset[0]["image"][0]) == 1
    assert count() == 4
    assert dataset.prune() == 3 * size
    assert stored(tmp_path / "cache") == []


class Local(Transform):
    """Holds what it is given."""

    def __init__(self, held):
        self.held = held

    def __call__(self, data):
        return data


def closure(factor):
    def inner(x):
        return factor * x

    return inner


def nested_class():
    class Inner(Transform):
        def __call__(self, data):
            return data

    return Inner()


cyclic: list = []
cyclic.append(cyclic)


@pytest.mark.parametrize(
    ("transform", "match"),
    [
        (Lambdad("image", lambda x: x), r"transform 0 \(Lambdad\).*<lambda>"),
        (Local(closure(2)), r"transform 0 \(Local\).*closure.<locals>.inner"),
        (Local(functools.partial(closure(2), 1)), "inner"),
        (nested_class(), "Inner"),
        (Local(iter([1])), "list_iterator"),
        (Local(np.random.RandomState(0)), "RandomState"),
        (Local(np.array([object()], dtype=object)), "Python objects"),
        (Local(cyclic), "refers to itself"),
    ],
    ids=["lambda", "closure", "partial", "class", "iterator", "random state", "objects", "cyclic"],
)
def test_transforms_that_cannot_be_described_are_refused_at_once(tmp_path, transform, match):
    with pytest.raises(ConfigError, match=match) as caught:
        ContentCacheDataset([{"image": 1}], [transform], tmp_path)
    assert "\n" not in str(caught.value)


def test_after_the_first_random_transform_anything_goes(tmp_path):
    chain = [RandGaussianNoised("image", 0.0), Lambdad("image", lambda x: x + 1)]
    dataset = ContentCacheDataset([{"image": torch.ones(1)}], chain, tmp_path)
    assert float(dataset[0]["image"]) == 2
    assert stored(tmp_path) == [], "nothing comes before it"


def test_a_result_or_item_that_cannot_be_kept_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"item 0: a result of type generator"):
        ContentCacheDataset([0], [GeneratorMaker()], tmp_path)[0]
    with pytest.raises(ConfigError, match=r"item 1: .*list_iterator"):
        ContentCacheDataset([0, {"image": iter([1])}], [Made(1)], tmp_path)[1]
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="expected a folder"):
        ContentCacheDataset([0], [Made(1)], tmp_path / "file")


class GeneratorMaker(Transform):
    def __call__(self, data):
        return (k for k in range(3))


def test_a_parameter_changed_in_place_is_seen(tmp_path):
    scale = Made(1)
    dataset = ContentCacheDataset([0], [scale], tmp_path)
    assert dataset[0] == {"made": 1}
    scale.value = 2
    assert dataset[0] == {"made": 2}


def test_whether_metadata_is_tracked_counts(scan, tmp_path):
    items = [{"image": scan()}]
    assert isinstance(ContentCacheDataset(items, [LOAD], tmp_path / "c")[0]["image"], MetaTensor)
    set_track_meta(False)
    try:
        assert not isinstance(ContentCacheDataset(items, [LOAD], tmp_path / "c")[0]["image"], MetaTensor)
    finally:
        set_track_meta(True)


def test_versions_and_code_count(tmp_path, monkeypatch):
    dataset = ContentCacheDataset([0], [Made(1)], tmp_path)
    before = dataset.key(0)
    with monkeypatch.context() as patched:
        patched.setattr("medseg.data.cache.versions", lambda: {"monai": "0"})
        assert dataset.key(0) != before
    assert dataset.key(0) == before
    (tmp_path / "written.py").write_text("def f(x):\n    return x\n")
    monkeypatch.syspath_prepend(tmp_path)
    import written

    one = describe(written.f)
    (tmp_path / "written.py").write_text("def f(x):\n    return 2 * x\n")
    content_hash._code.cache_clear()
    assert describe(written.f) != one


def test_lazy_transforms_are_applied_before_they_are_kept(scan, tmp_path):
    items = [{"image": scan()}]
    chain = Compose(
        [LOAD, Spacingd("image", (1, 1, 1)), Flipd("image", 0), RandGaussianNoised("image", 0.0)], lazy=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = chain(items[0])["image"]
        for _ in range(2):
            found = ContentCacheDataset(items, chain, tmp_path / "c")[0]["image"]
            np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(found.affine, expected.affine)
