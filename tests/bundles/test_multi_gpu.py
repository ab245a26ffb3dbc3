"""The multi-GPU overlay, as two processes on the CPU that talk through gloo."""

import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
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
    assert merged["initialize"][0] == "$medseg.engines.check_overrides()"


SCORING = """
import torch
import torch.distributed as dist
from monai.data import DataLoader, Dataset, DistributedSampler
from medseg.engines import MeanScore, segmentation_evaluator

dist.init_process_group("gloo")
# Dice of the prediction (the image itself) with the truth: 1, 2/3, 0; one process gets two samples, the other one
truth = torch.tensor([[[1.0, 1.0, 0.0, 0.0]]])
images = [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1]]
data = Dataset([{"image": torch.tensor([[row]], dtype=torch.float32), "label": truth} for row in images])
loader = DataLoader(data, batch_size=1, sampler=DistributedSampler(data, even_divisible=False, shuffle=False))
evaluator = segmentation_evaluator("cpu", loader, torch.nn.Identity(), key_val_metric={"dice": MeanScore("dice")})
evaluator.run()
print(f"rank {dist.get_rank()} of {len(loader)}: {evaluator.state.metrics['dice']:.6f}")
dist.destroy_process_group()
"""


def test_a_score_over_processes_counts_every_sample_once(shell, tmp_path: Path):
    (tmp_path / "score.py").write_text(SCORING)
    done = shell(tmp_path, "torch.distributed.run", "--standalone", "--nproc_per_node=2", "score.py")
    assert done.returncode == 0, done.stderr
    mean = (1 + 2 / 3 + 0) / 3
    # two processes write to one stream, so their lines may run into each other
    said = re.findall(r"rank \d of \d: \d\.\d{6}", done.stdout)
    assert sorted(said) == [f"rank 0 of 2: {mean:.6f}", f"rank 1 of 1: {mean:.6f}"]
