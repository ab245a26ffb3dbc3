"""A network with two heads trains, is validated by its first, and is chosen by a pooled score."""

import numpy as np
import pandas as pd
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader
from monai.inferers import SimpleInferer
from monai.losses import FocalLoss
from monai.transforms import Activationsd, AsDiscreted, Compose, CopyItemsd, Lambdad
from torch.utils.data import Dataset

from medseg.data import SeededDataset, SeededLoader
from medseg.engines import AutocastInferer, MeanScore, PooledScore, segmentation_evaluator, segmentation_trainer
from medseg.errors import ConfigError, GeometryError
from medseg.losses import FBetaLoss, HeadsLoss
from medseg.metrics import confusion_counts, dice, pooled_tversky


class Squares(Dataset):
    """Four slices, of a bright square each, or none."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        label = torch.zeros(1, 10, 8)
        label[:, 1 : 1 + 2 * index, 2:6] = 1
        return {"image": label - 0.3, "label": label}


DATA = [Squares()[index] for index in range(4)]


class TwoHeads(torch.nn.Module):
    """Two one-channel outputs of the same features: both in training, the first in evaluation."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.ReLU())
        self.heads = torch.nn.ModuleList(torch.nn.Conv2d(4, 1, 1) for _ in range(2))

    def forward(self, x):
        x = self.body(x)
        return torch.stack([head(x) for head in self.heads], 1) if self.training else self.heads[0](x)


SOFT = Activationsd("pred", sigmoid=True)
HARD = Compose([CopyItemsd("pred", names="probability"), SOFT, Activationsd("probability", sigmoid=True)])
MASK = AsDiscreted("pred", threshold=0.5)


def validator(net, metric, postprocessing, batch_size=3):
    loader = DataLoader(Squares(), batch_size=batch_size)
    return segmentation_evaluator("cpu", loader, net, postprocessing=postprocessing, key_val_metric={"score": metric})


def trainer(run_dir, net, **kwargs):
    return segmentation_trainer(
        "cpu",
        1,
        SeededLoader(SeededDataset(Squares(), Lambdad("image", lambda x: x), seed=1), 2, seed=1),
        net,
        torch.optim.Adam(net.parameters(), 0.05),
        HeadsLoss([FBetaLoss(1, sigmoid=True, batch=True), FocalLoss(gamma=0)]),
        run_dir,
        validator=validator(net, MeanScore("dice"), Compose([SOFT, MASK])),
        **kwargs,
    )


def test_two_heads_train_and_the_first_is_validated_and_shown(tmp_path):
    net = TwoHeads()
    before = [head.weight.clone() for head in net.heads]
    trainer(tmp_path, net).run()
    assert all(not torch.equal(old, head.weight) for old, head in zip(before, net.heads, strict=True))
    log = pd.read_csv(tmp_path / "metrics.csv")
    assert log[log.name == "loss"].iteration.tolist() == [1, 2]
    net.eval()
    masks = [(net(item["image"][None]).sigmoid() >= 0.5).float() for item in DATA]
    scores = [dice(confusion_counts(mask, item["label"][None])) for mask, item in zip(masks, DATA, strict=True)]
    validated = log[(log.phase == "val") & (log.name == "score")].value
    assert validated.tolist() == pytest.approx([torch.cat(scores).mean().item()])


def test_a_metric_on_training_data_is_of_the_head_that_the_postprocessing_takes(tmp_path):
    first = Compose([Lambdad("pred", lambda heads: heads[0]), SOFT, MASK])
    run = trainer(tmp_path, TwoHeads(), postprocessing=first, key_train_metric={"train_dice": MeanScore("dice")})
    run.run()
    assert 0 <= run.state.metrics["train_dice"] <= 1
    both = Compose([SOFT, MASK])
    (tmp_path / "both").mkdir()
    run = trainer(tmp_path / "both", TwoHeads(), postprocessing=both, key_train_metric={"dice": MeanScore("dice")})
    with pytest.raises(GeometryError, match="against truth of shape"):
        run.run()


def test_autocast_gives_all_heads_as_float32():
    output = AutocastInferer(SimpleInferer())(torch.randn(2, 1, 10, 8), TwoHeads())
    assert (output.shape, output.dtype) == ((2, 2, 1, 10, 8), torch.float32)
    HeadsLoss(FBetaLoss(sigmoid=True))(output, torch.ones(2, 1, 10, 8)).backward()


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_the_pooled_score_is_of_the_whole_validation_part(batch_size):
    net = TwoHeads()
    soft = validator(net, PooledScore(alpha=1, beta=1), SOFT, batch_size)
    soft.run()
    images, labels = (torch.stack([item[key] for item in DATA]) for key in ("image", "label"))
    p = net.eval()(images).sigmoid().detach()
    expected = (p * labels).sum() / (p + labels - p * labels).sum()
    assert soft.state.metrics["score"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_soft_score_beside_hard_masks():
    net = TwoHeads()
    score = PooledScore(alpha=1, beta=1, keys=("probability", "label"))
    engine = validator(net, score, Compose([HARD, MASK]))
    engine.run()
    alone = validator(net, PooledScore(alpha=1, beta=1), SOFT)
    alone.run()
    assert engine.state.metrics["score"] == pytest.approx(alone.state.metrics["score"])
    assert set(np.unique(engine.state.output[0]["pred"])) <= {0, 1}


def test_class_weights_of_the_pooled_score():
    pred = torch.eye(3)[torch.tensor([[0, 0, 1, 2]])].movedim(-1, 1)
    label = torch.eye(3)[torch.tensor([[0, 0, 1, 1]])].movedim(-1, 1)
    config = {"_target_": "medseg.engines.PooledScore", "alpha": 1, "beta": 1, "weight": [0.1, 1, 10]}
    for extra, expected in (({}, 1.2 / 12.2), ({"include_background": False, "weight": [1, 10]}, 1 / 12)):
        metric = ConfigParser({"metric": {**config, **extra}}).get_parsed_content("metric")
        metric.update([pred, label])
        assert float(metric.compute()) == pytest.approx(expected, rel=1e-5)
    assert pooled_tversky(confusion_counts(pred, label), 1, 1, [0.1, 1, 10]).item() == pytest.approx(
        1.2 / 12.2, rel=1e-5
    )
    metric = PooledScore(weight=[1, 2])
    metric.update([pred, label])
    with pytest.raises(ConfigError, match="a number for each of 3 classes"):
        metric.compute()
