"""The bundles that come with medseg: where they are, and how a workflow of one is run."""

from __future__ import annotations

import importlib.resources
import json
import logging
import re
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from medseg.errors import ConfigError

if TYPE_CHECKING:
    from medseg.engines import CheckedWorkflow

#: Config files of each workflow, merged in order.
WORKFLOWS = {
    "train": ("train.yaml",),
    "multi_gpu_train": ("train.yaml", "multi_gpu_train.yaml"),
    "evaluate": ("train.yaml", "evaluate.yaml"),
    "choose_threshold": ("train.yaml", "evaluate.yaml", "choose_threshold.yaml"),
    "inference": ("inference.yaml",),
}


@dataclass(frozen=True)
class BundleInfo:
    """One bundle: its name, its version and task as metadata.json has them, and its folder."""

    name: str
    version: str
    task: str
    path: Path


def _bundles_root() -> Path:
    installed = Path(str(importlib.resources.files("medseg"))) / "bundles"
    return installed if installed.is_dir() else installed.parents[1] / "bundles"  # a checkout has them at its root


def bundle_table() -> list[BundleInfo]:
    """Return the bundles that were installed with medseg, by name.

    Example:
        >>> [bundle.name for bundle in bundle_table()]
        ['head_neck_petct_segmentation', 'hippocampus_mr_segmentation']
    """
    table = []
    for file in sorted(_bundles_root().glob("*/configs/metadata.json")):
        metadata = json.loads(file.read_text())
        table.append(BundleInfo(file.parents[1].name, metadata["version"], metadata["task"], file.parents[1]))
    return table


def bundle_path(bundle: str | Path) -> Path:
    """Return the folder of a bundle given by name or by folder.

    Raises:
        ConfigError: if there is none, with the nearest names.
    """
    known = {info.name: info.path for info in bundle_table()}
    if str(bundle) in known:
        return known[str(bundle)]
    if (Path(bundle) / "configs").is_dir():
        return Path(bundle)
    near = get_close_matches(str(bundle), known, n=2, cutoff=0) or sorted(known)
    raise ConfigError(
        f"bundle: {bundle} is neither a bundle's folder nor one of medseg's; the nearest are {', '.join(near)}"
    )


def copy_bundle(bundle: str, folder: Path) -> Path:
    """Copy a bundle into `folder`, and return the new bundle's folder.

    Raises:
        ConfigError: if it is there already, or there is no such bundle.
    """
    source, target = bundle_path(bundle), folder / bundle_path(bundle).name
    if target.exists():
        raise ConfigError(f"{target}: is there already, expected a free place; name another folder")
    shutil.copytree(source, target)
    return target


class _ValueLoader(yaml.SafeLoader):
    """YAML 1.2's numbers and words: `1e-3` is a number and `2024-05-17` a name; PyYAML keeps to 1.1."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own name for it)
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_ValueLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"), list("-+.0123456789")
)


def _value(key: str, text: str) -> object:
    if text.startswith(("$", "@", "%")):  # MONAI's own: an expression, a reference, a macro
        return text
    try:
        return yaml.load(text, _ValueLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override --{key}: found {text!r}, which is not YAML; put quotes around words") from error


def _overrides(words: Sequence[str]) -> dict[str, object]:
    """Return id and value of each `--id value` or `--id=value`; values are YAML, so `[0, 1]` is a list."""
    overrides: dict[str, object] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or (("=" not in word) and (not rest)):
            raise ConfigError(f"override {word}: expected pairs of --ID VALUE")
        key, given, value = word[2:].partition("=")
        overrides[key] = _value(key, value if given else rest.pop(0))
    return overrides


def run_bundle(bundle: str | Path, workflow: str, words: Sequence[str] = ()) -> None:
    """Run a workflow of a bundle, with every override checked before anything is parsed.

    It is `python -m monai.bundle run_workflow --workflow_name medseg.engines.CheckedWorkflow`, with the files found.

    Args:
        bundle: name or folder of the bundle.
        workflow: `train`, `multi_gpu_train`, `evaluate`, `choose_threshold` (where the bundle has one) or `inference`.
        words: overrides as typed: `--id`, `value`, ...

    Raises:
        ConfigError: for an unknown bundle or workflow, or an override that no key answers to.
    """
    run = checked_workflow(bundle, workflow, words)
    run.initialize()
    run.run()
    run.finalize()


def checked_workflow(bundle: str | Path, workflow: str, words: Sequence[str] = ()) -> CheckedWorkflow:
    """Return a workflow of a bundle, not yet initialized; see :func:`run_bundle`."""
    from medseg.engines import CheckedWorkflow

    if workflow not in WORKFLOWS:
        raise ConfigError(f"workflow: found {workflow!r}, expected one of {', '.join(WORKFLOWS)}")
    root = bundle_path(bundle)
    files = [str(root / "configs" / name) for name in WORKFLOWS[workflow]]
    kind = "train" if "train" in workflow else "infer"
    print(f"{root.name}: a MONAI config is code, and is run; use configs that you trust", file=sys.stderr)
    logging.getLogger("monai.bundle.workflows").setLevel(logging.WARNING)
    # MONAI announces a GPU decoder that it does not find whenever LoadImage is made
    logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="NvImgCodecPydicomReader")
    return CheckedWorkflow(files, workflow_type=kind, **{"bundle_root": str(root)} | _overrides(words))
