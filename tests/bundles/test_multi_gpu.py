"""The multi-GPU overlay, as two processes on the CPU that talk through gloo."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from monai.bundle import ConfigParser

from medseg.engines import CheckedWorkflow, load_checkpoint


def run_two(bundle, shell, cwd: Path, **more):
    return shell(
        cwd,
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "monai.bundle",
        "run",
        "--config_file",
        str(bundle.files("train.yaml", "multi_gpu_train.yaml")),
        **bundle.training(cwd / "runs", run_name="two", batch_size=2, **more),
    )


@pytest.mark.long
def test_two_processes_train_one_network_and_rank_0_alone_writes(bundle, shell, tmp_path: Path):
    done = run_two(bundle, shell, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "destroy_process_group" not in done.stderr  # torch's complaint about a group that was left open
    (run_dir,) = (tmp_path / "runs/two").iterdir()
    assert run_dir.name == "00"
    assert len(list((run_dir / "events").iterdir())) == 1
    log = pd.read_csv(run_dir / "metrics.csv")
    losses = log[(log["phase"] == "train") & (log["name"] == "loss")]
    # a row per iteration, from one process
    assert losses["iteration"].tolist() == list(range(1, len(losses) + 1))
    assert np.isfinite(log["value"]).all()

    config = ConfigParser.load_config_file(bundle.files("train.yaml")[0])
    settings = {"dataset_dir": str(bundle.dataset), "network_channels": bundle.channels}
    network = ConfigParser(config | settings).get_parsed_content("network_def")
    # the weights fit the plain network: no "module." of the wrapper in their names
    load_checkpoint(run_dir / "model_last.pt", network)

    # one process sees each training sample once, so each of two makes half of the iterations
    samples = len(ConfigParser(config | settings | {"num_workers": 0}).get_parsed_content("train#dataset"))
    assert len(losses) == math.ceil(math.ceil(samples / 2) / 2)

    # the validation counted every sample once: the plain network gives the same mean over all of them
    scored = log[log["name"] == "val_dice"]["value"].iloc[-1]
    workflow = CheckedWorkflow(bundle.files("train.yaml"), **bundle.training(tmp_path / "check", batch_size=2))
    workflow.initialize()
    evaluator = workflow.evaluator
    load_checkpoint(run_dir / "model_last.pt", evaluator.network)
    evaluator.run()
    assert scored == pytest.approx(evaluator.state.metrics["val_dice"], abs=1e-4)


def test_the_overlay_adds_to_the_training_and_shares_the_validation_out(bundle):
    alone = ConfigParser.load_config_files(bundle.files("train.yaml"))
    merged = ConfigParser.load_config_files(bundle.files("train.yaml", "multi_gpu_train.yaml"))
    assert set(alone["imports"]) < set(merged["imports"])
    assert merged["validate"]["dataloader"] == alone["validate"]["dataloader"] | {"sampler": "@validate#sampler"}
    assert merged["validate"]["sampler"]["even_divisible"] is False
    assert merged["train"] == alone["train"]  # SeededLoader shares its samples out itself
    # both say the same about the network but for the wrapper
    assert merged["network"]["module"] == alone["network"]
    # what a training alone does first, each process does as well
    assert set(alone["initialize"]) < set(merged["initialize"])
    # and drops out other units than the others, once the network is made
    lines = merged["initialize"]
    assert lines.index("$torch.manual_seed(@seed + dist.get_rank())") > next(
        i for i, line in enumerate(lines) if "@optimizer" in line
    )
    assert lines[0] == "$medseg.engines.check_overrides()"


TWO_PROCESSES = """
import json
import torch
import torch.distributed as dist
from monai.data import DataLoader, Dataset, DistributedSampler
from torch.nn.parallel import DistributedDataParallel
from medseg.engines import MeanScore, segmentation_evaluator
from training import network, train

dist.init_process_group("gloo")
# Dice of the prediction (the image itself) with the truth: 1, 2/3, 0; one process gets two samples, the other one
truth = torch.tensor([[[1.0, 1.0, 0.0, 0.0]]])
images = [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1]]
data = Dataset([{"image": torch.tensor([[row]], dtype=torch.float32), "label": truth} for row in images])
loader = DataLoader(data, batch_size=1, sampler=DistributedSampler(data, even_divisible=False, shuffle=False))
evaluator = segmentation_evaluator("cpu", loader, torch.nn.Identity(), key_val_metric={"dice": MeanScore("dice")})
evaluator.run()
said = {"scored": len(loader), "dice": float(evaluator.state.metrics["dice"])}

torch.manual_seed(dist.get_rank())  # the weights of rank 0 count
net = DistributedDataParallel(network())
said["even"], said["weights"] = train(net, 8, [1, 2], "even", DistributedSampler)
said["uneven"], _ = train(DistributedDataParallel(network()), 7, [3, 1], "uneven", DistributedSampler)
with open(f"said_{dist.get_rank()}.json", "w") as file:
    json.dump(said, file)
dist.barrier()
dist.destroy_process_group()
"""

TRAINING = """
from pathlib import Path
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.transforms import AsDiscreted
from medseg.data import SeededDataset, SeededLoader
from medseg.engines import MeanScore, segmentation_evaluator, segmentation_trainer


def network():
    return torch.nn.Conv2d(1, 1, 3, padding=1)


def train(net, n, sizes, folder, sampler=None):
    Path(folder).mkdir(exist_ok=True, parents=True)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(n, 1, 6, 6, generator=generator)
    items = [{"image": x, "label": (x > 0.3).float(), "index": i} for i, x in enumerate(pixels)]
    shared = {"sampler": sampler(items, even_divisible=False, shuffle=False)} if sampler else {}
    validation = DataLoader(Dataset(items), batch_size=1, **shared)
    sgd = torch.optim.SGD(net.parameters(), 0.5, momentum=0.9)
    validator = segmentation_evaluator(
        "cpu", validation, net, postprocessing=AsDiscreted("pred", threshold=0),
        key_val_metric={"dice": MeanScore("dice")},
    )
    seen = []

    class Seen:
        def attach(self, engine):
            engine.add_event_handler(
                Events.ITERATION_COMPLETED, lambda e: seen.append((e.state.epoch, e.state.batch["index"].tolist()))
            )

    segmentation_trainer(
        "cpu", 3, SeededLoader(SeededDataset(items), sizes, seed=4), net, sgd, torch.nn.BCEWithLogitsLoss(), folder,
        validator=validator, lr_scheduler=torch.optim.lr_scheduler.ExponentialLR(sgd, 0.9), snapshots=[2],
        train_handlers=[Seen()],
    ).run()
    return seen, {k.removeprefix("module."): v.tolist() for k, v in net.state_dict().items()}
"""


@pytest.fixture(scope="module")
def two_processes(shell, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """The folder that two processes worked in, and what each saw."""
    folder = tmp_path_factory.mktemp("two_processes")
    (folder / "training.py").write_text(TRAINING)
    (folder / "work.py").write_text(TWO_PROCESSES)
    done = shell(folder, "torch.distributed.run", "--standalone", "--nproc_per_node=2", "work.py")
    assert done.returncode == 0, done.stderr
    return folder, [json.loads((folder / f"said_{rank}.json").read_text()) for rank in range(2)]


def test_a_score_over_processes_counts_every_sample_once(two_processes):
    _, said = two_processes
    assert [one["scored"] for one in said] == [2, 1]
    assert [one["dice"] for one in said] == pytest.approx([(1 + 2 / 3 + 0) / 3] * 2)


@pytest.mark.parametrize(("name", "lengths"), [("even", [4, 2, 2]), ("uneven", [2, 4, 4])])
def test_growing_batches_share_every_epoch_out_over_the_processes(name, lengths, two_processes):
    _, said = two_processes
    seen = [one[name] for one in said]
    orders = []
    for epoch, length in enumerate(lengths, start=1):
        batches = [[batch for e, batch in one if e == epoch] for one in seen]
        assert [len(one) for one in batches] == [length] * 2  # as many iterations, so none waits for the other
        indices = sorted(index for one in batches for batch in one for index in batch)
        if name == "even":
            assert indices == list(range(8))
        else:
            assert len(indices) == 8
            assert set(indices) == set(range(7))  # one of the seven twice
        orders.append([tuple(batch) for one in batches for batch in one])
    assert orders[1] != orders[2]


def test_two_processes_learn_what_one_learns_from_their_batches_together(two_processes, tmp_path: Path, monkeypatch):
    folder, said = two_processes
    assert said[0]["weights"] == said[1]["weights"]
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(tmp_path)
    import training

    torch.manual_seed(0)
    net = training.network()
    seen, weights = training.train(net, 8, [2, 4], "one")
    assert len(seen) == len(said[0]["even"])
    for name, values in weights.items():
        np.testing.assert_allclose(said[0]["weights"][name], values, rtol=1e-5, atol=1e-7)
    logs = [pd.read_csv(where / "metrics.csv") for where in (folder / "even", tmp_path / "one")]
    scores, rates = ([log[log["name"] == name]["value"] for log in logs] for name in ("val_dice", "learning_rate"))
    np.testing.assert_allclose(*scores)
    np.testing.assert_allclose(*rates)


def test_rank_0_alone_writes(two_processes):
    folder, _ = two_processes
    files = {file.name for file in (folder / "even").iterdir()}
    assert files == {"metrics.csv", "events", "model_best.pt", "model_last.pt", "model_snapshot_2.pt"}
    assert len(list((folder / "even/events").iterdir())) == 1
    log = pd.read_csv(folder / "even/metrics.csv")
    assert log[log["name"] == "loss"]["iteration"].tolist() == list(range(1, 9))
