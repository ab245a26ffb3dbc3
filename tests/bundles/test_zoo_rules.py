"""Every bundle keeps the rules of MONAI's model zoo."""

import logging.config
import re
from configparser import ConfigParser as IniParser
from importlib.metadata import requires, version
from pathlib import Path

import jsonschema
import pytest
import torch
from monai.bundle import ConfigParser, ckpt_export, create_workflow, verify_net_in_out
from monai.bundle.workflows import ConfigWorkflow
from monai.data import load_net_with_metadata
from packaging.requirements import Requirement
from packaging.version import Version

from medseg.engines import CheckedWorkflow, save_checkpoint
from medseg.experiments import bundle_path, bundle_table

NAMES = ["head_neck_petct_segmentation", "hippocampus_mr_segmentation"]

# The rules of MONAI's meta_schema_20240725.json that a bundle of images can break.
TENSOR = {
    "type": "object",
    "properties": {
        "type": {"type": "string"},
        "format": {"type": "string"},
        "num_channels": {"type": "integer"},
        "spatial_shape": {"type": "array", "items": {"type": ["string", "integer"]}},
        "dtype": {"type": "string"},
        "value_range": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
        "is_patch_data": {"type": "boolean"},
        "channel_def": {"type": "object"},
    },
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range", "channel_def"],
}
WORDS = [
    "schema",
    "version",
    "monai_version",
    "pytorch_version",
    "numpy_version",
    "task",
    "description",
    "authors",
    "copyright",
    "data_source",
    "data_type",
    "image_classes",
    "label_classes",
    "pred_classes",
    "intended_use",
]
SCHEMA = {
    "type": "object",
    "properties": {word: {"type": "string", "minLength": 1} for word in WORDS}
    | {
        "changelog": {"type": "object", "minProperties": 1},
        "required_packages_version": {"type": "object", "additionalProperties": {"type": "string"}},
        "eval_metrics": {"type": "object", "additionalProperties": {"type": "number"}},
        "references": {"type": "array", "items": {"type": "string"}},
        "network_data_format": {
            "type": "object",
            "properties": {
                "inputs": {"type": "object", "properties": {"image": TENSOR}, "required": ["image"]},
                "outputs": {"type": "object", "properties": {"pred": TENSOR}, "required": ["pred"]},
            },
            "required": ["inputs", "outputs"],
        },
    },
    "required": [*WORDS, "changelog", "required_packages_version", "network_data_format", "eval_metrics"],
}


@pytest.fixture(params=NAMES)
def root(request: pytest.FixtureRequest) -> Path:
    return bundle_path(request.param)


@pytest.fixture
def metadata(root: Path) -> dict:
    return ConfigParser.load_config_file(str(root / "configs/metadata.json"))


def test_there_are_these_bundles():
    assert [bundle.name for bundle in bundle_table()] == NAMES


def test_a_bundle_has_the_files_of_the_zoo(root: Path):
    for name in ("train.yaml", "evaluate.yaml", "inference.yaml", "multi_gpu_train.yaml", "metadata.json"):
        assert ConfigParser.load_config_file(str(root / "configs" / name)), name
    assert "Apache License" in (root / "LICENSE").read_text()
    readme = (root / "docs/README.md").read_text()
    for words in ("monai.bundle run", "train.yaml", "evaluate.yaml", "inference.yaml", "multi_gpu_train.yaml"):
        assert words in readme
    # not a weight, not an image
    assert sum(file.stat().st_size for file in root.rglob("*") if file.is_file()) < 100_000


def test_the_logging_config_is_one(root: Path):
    parser = IniParser(interpolation=None)
    parser.read(root / "configs/logging.conf")
    before = logging.getLogger().handlers[:], logging.getLogger().level
    try:
        logging.config.fileConfig(parser, disable_existing_loggers=False)
    finally:
        logging.getLogger().handlers[:], logging.getLogger().level = before


def test_metadata_follows_the_schema(metadata: dict):
    jsonschema.validate(metadata, SCHEMA)
    assert metadata["schema"].endswith("/meta_schema_20240725.json")
    assert metadata["version"] in metadata["changelog"]


def test_metadata_asks_for_versions_that_medseg_asks_for(metadata: dict):
    """The bundle was tested with what is installed here, and that is what medseg's own requirements allow."""
    asked = {Requirement(line).name.lower().replace("_", "-"): Requirement(line) for line in requires("medseg") or []}
    named = metadata["required_packages_version"] | {
        "monai": metadata["monai_version"],
        "torch": metadata["pytorch_version"],
        "numpy": metadata["numpy_version"],
    }
    assert named.pop("medseg") == version("medseg")
    for package, number in named.items():
        assert asked[package.lower()].specifier.contains(number), package
        assert Version(version(package)).release[:2] == Version(number).release[:2], package


def test_the_formats_of_the_network_have_a_name_per_channel(metadata: dict):
    for part in metadata["network_data_format"].values():
        for tensor in part.values():
            assert sorted(tensor["channel_def"]) == [str(i) for i in range(tensor["num_channels"])]


@pytest.mark.parametrize("config", ["train.yaml", "inference.yaml"])
def test_the_network_takes_and_gives_what_the_metadata_says(root: Path, config: str, bundle_dataset: Path):
    verify_net_in_out(
        "network_def",
        meta_file=str(root / "configs/metadata.json"),
        config_file=str(root / "configs" / config),
        device="cpu",
        dataset_dir=str(bundle_dataset),
    )


@pytest.fixture
def bundle_dataset(root: Path, request: pytest.FixtureRequest) -> Path:
    """A dataset for this bundle: its labels say how many channels the network has."""
    return request.getfixturevalue({NAMES[0]: "petct", NAMES[1]: "hippocampus"}[root.name]).dataset


def test_the_two_configs_define_one_network(root: Path, bundle_dataset: Path):
    networks = []
    for config in ("train.yaml", "inference.yaml"):
        parser = ConfigParser(ConfigParser.load_config_file(str(root / "configs" / config)))
        parser["dataset_dir"] = str(bundle_dataset)
        with torch.device("meta"):
            networks.append(parser.get_parsed_content("network_def").state_dict())
    assert {k: v.shape for k, v in networks[0].items()} == {k: v.shape for k, v in networks[1].items()}


@pytest.mark.parametrize(("root", "key"), [(NAMES[0], "model"), (NAMES[1], "model"), (NAMES[1], "")], indirect=["root"])
def test_weights_become_torchscript_that_computes_the_same(root: Path, metadata: dict, key: str, tmp_path: Path):
    config = str(root / "configs/inference.yaml")
    torch.manual_seed(0)
    network = ConfigParser(ConfigParser.load_config_file(config)).get_parsed_content("network_def")
    for module in network.modules():  # statistics that an untrained network has not
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    weights = tmp_path / "model.pt"
    if key:
        save_checkpoint(weights, {"model": network}, epoch=3)
    else:
        torch.save(network.state_dict(), weights)
    ckpt_export(
        "network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(weights),
        meta_file=str(root / "configs/metadata.json"),
        config_file=config,
        key_in_ckpt=key,
    )
    exported, meta, extra = load_net_with_metadata(str(tmp_path / "model.ts"), more_extra_files=("inference.json",))
    assert meta["version"] == metadata["version"]
    assert extra["inference.json"]
    image = metadata["network_data_format"]["inputs"]["image"]
    x = torch.rand(2, image["num_channels"], *([16] * len(image["spatial_shape"])))
    with torch.no_grad():
        expected, found = network.eval()(x), exported.eval()(x)
    assert expected.std() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def problems(workflow: ConfigWorkflow) -> list[str] | None:
    workflow.initialize()
    return workflow.check_properties()


def test_training_has_the_properties_of_a_training(bundle, tmp_path: Path):
    files = bundle.files("train.yaml")
    workflow = CheckedWorkflow(files, workflow_type="train", **bundle.training(tmp_path))
    assert problems(workflow) == []
    assert workflow.max_epochs == 1
    assert len(workflow.train_dataset) > 0
    made = create_workflow("ConfigWorkflow", files, workflow_type="train", **bundle.training(tmp_path))
    assert made.check_properties() == []
    # a property set from outside takes effect
    made.max_epochs = 2
    made.initialize()
    assert made.trainer.state.max_epochs == 2


def test_inference_has_the_properties_of_an_inference(bundle, tmp_path: Path):
    network = ConfigParser(
        ConfigParser.load_config_file(bundle.files("inference.yaml")[0]) | {"network_channels": bundle.channels}
    ).get_parsed_content("network_def")
    save_checkpoint(tmp_path / "model.pt", {"model": network})
    overrides = bundle.predicting(tmp_path, tmp_path / "model.pt")
    files = bundle.files("inference.yaml")
    assert problems(CheckedWorkflow(files, workflow_type="infer", **overrides)) == []
    assert create_workflow("ConfigWorkflow", files, workflow_type="infer", **overrides).check_properties() == []


def test_evaluation_has_the_properties_of_an_inference(trained):
    bundle = trained.bundle
    overrides = bundle.training(trained.runs, run_dir=str(trained.run_dir))
    files = bundle.files("train.yaml", "evaluate.yaml")
    assert problems(CheckedWorkflow(files, workflow_type="infer", **overrides)) == []
    assert create_workflow("ConfigWorkflow", files, workflow_type="infer", **overrides).check_properties() == []


def test_every_target_of_medseg_is_a_public_name(root: Path):
    import importlib

    for file in (root / "configs").glob("*.yaml"):
        for name in re.findall(r"medseg(?:\.\w+)+", file.read_text()):
            room, _, attribute = name.rpartition(".")
            assert attribute in importlib.import_module(room).__all__, f"{file}: {name}"
