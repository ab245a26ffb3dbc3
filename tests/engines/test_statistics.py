"""An inference normalizes with the statistics of the training set, which the checkpoint brings along."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from monai.bundle import ConfigParser

from medseg.data import make_splits, training_statistics
from medseg.engines import load_checkpoint, load_statistics, save_checkpoint
from medseg.errors import CheckpointError, LeakageError

TRAIN = """
imports: [$import medseg]
fold: 1
statistics: $medseg.data.training_statistics(@dataset_dir, @fold)
preprocessing:
  _target_: Compose
  transforms:
  - {_target_: LoadImaged, keys: [image, label], reader: $medseg.io.Reader, ensure_channel_first: true}
  - {_target_: medseg.transforms.PopulationZScored, keys: image, statistics: '@statistics'}
loss: {_target_: DiceCELoss, to_onehot_y: true, softmax: true, weight: "$torch.tensor(@statistics['class_weights'])"}
trainer:
  _target_: medseg.engines.segmentation_trainer
  device: cpu
  max_epochs: 1
  train_data_loader:
    _target_: medseg.data.SeededLoader
    dataset:
      _target_: medseg.data.SeededDataset
      data: $medseg.data.datalist(@dataset_dir, 'train', @fold)
      transform: '@preprocessing'
    batch_size: 2
  network: '@network'
  optimizer: {_target_: torch.optim.Adam, params: $@network.parameters()}
  loss_function: '@loss'
  run_dir: '@run_dir'
  statistics: '@statistics'
"""

INFERENCE = """
imports: [$import medseg]
statistics: $medseg.engines.load_statistics(@checkpoint)
preprocessing:
  _target_: Compose
  transforms:
  - {_target_: LoadImaged, keys: image, reader: $medseg.io.Reader, ensure_channel_first: true}
  - {_target_: medseg.transforms.PopulationZScored, keys: image, statistics: '@statistics'}
evaluator:
  _target_: medseg.engines.segmentation_evaluator
  device: cpu
  val_data_loader:
    _target_: DataLoader
    dataset: {_target_: Dataset, data: '@images', transform: '@preprocessing'}
    num_workers: 0
  network: '@network'
"""


def network():
    torch.manual_seed(0)
    return torch.nn.Conv3d(2, 3, 3, padding=1)


def parser(config, **values):
    return ConfigParser({**yaml.safe_load(config), **values})


@pytest.fixture
def folder(tmp_path, write_dataset):
    folder = write_dataset(tmp_path / "dataset")
    folder.write_split(make_splits(folder.cases, seed=0, folds=2, test_fraction=0.3))
    return folder


@pytest.fixture
def run_dir(tmp_path, folder):
    (tmp_path / "run").mkdir()
    config = parser(TRAIN, dataset_dir=str(folder.root), run_dir=str(tmp_path / "run"), network=network())
    config.get_parsed_content("trainer").run()
    return tmp_path / "run"


def test_a_trained_network_brings_its_statistics_along(tmp_path, folder, run_dir):
    measured = training_statistics(folder.root, 1)
    content = torch.load(run_dir / "model_last.pt", weights_only=True)
    assert content["statistics"] == measured == json.loads((run_dir / "statistics.json").read_text())
    assert load_statistics(run_dir / "model_last.pt") == measured

    # elsewhere, with nothing but the checkpoint and an image
    case = folder.datalist("test")[0]
    shutil.copytree(folder.root / "imagesTr", tmp_path / "images")
    images = [str(tmp_path / "images" / path.rpartition("/")[2]) for path in case["image"]]
    shutil.copy(run_dir / "model_last.pt", tmp_path / "model.pt")
    shutil.rmtree(folder.root)
    shutil.rmtree(run_dir)
    net = network()
    load_checkpoint(tmp_path / "model.pt", net)
    config = parser(INFERENCE, checkpoint=str(tmp_path / "model.pt"), images=[{"image": images}], network=net)
    evaluator = config.get_parsed_content("evaluator")
    evaluator.run()
    seen = np.stack([np.asarray(nib.load(path).dataobj) for path in images])
    normalized = (seen - np.reshape(measured["mean"], (2, 1, 1, 1))) / np.reshape(measured["std"], (2, 1, 1, 1))
    expected = net(torch.from_numpy(normalized[None].astype(np.float32)))[0]
    torch.testing.assert_close(torch.as_tensor(evaluator.state.output[0]["pred"]), expected)


def test_another_part_of_the_dataset_is_scored_with_them_only_in_their_fold(folder, run_dir):
    checkpoint = run_dir / "model_last.pt"
    assert load_statistics(checkpoint, folder.root, fold=1)["fold"] == 1
    with pytest.raises(LeakageError, match="of fold 1, fold 0 expected"):
        load_statistics(checkpoint, folder.root)
    folder.write_split(make_splits(folder.cases, seed=5, folds=2, test_fraction=0.3))
    with pytest.raises(LeakageError, match="another dataset or split"):
        load_statistics(checkpoint, folder.root, fold=1)


def test_a_checkpoint_without_them_is_refused(tmp_path):
    save_checkpoint(tmp_path / "a.pt", {"model": network()}, iteration=1)
    torch.save(network().state_dict(), tmp_path / "b.pt")
    torch.save([1], tmp_path / "c.pt")
    for name in "abc":
        with pytest.raises(CheckpointError, match=f"{name}.pt: found no statistics of a training set") as caught:
            load_statistics(tmp_path / f"{name}.pt")
        assert "\n" not in str(caught.value)
    (tmp_path / "d.pt").write_text("text")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_statistics(tmp_path / "d.pt")
    with pytest.raises(CheckpointError, match="no such file"):
        load_statistics(tmp_path / "absent.pt")
