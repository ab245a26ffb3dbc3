"""Builds on a Ray cluster of this machine, whose nodes are killed at work: run by test_build_ray.py as a program."""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from light_recipe import LightRecipe

from data_prep import cluster
from data_prep.build import build_dataset
from data_prep.recipes.base import Case, Plan, Sample
from medseg.errors import MedsegError


class Light(LightRecipe):
    """The recipe ``light``; on the node to be killed it stays in a case for ever, once so many are done."""

    def make(self, case: Case, plan: Plan) -> Sample:
        """Make a case, or say that one is under way on the victim."""
        import ray

        control = Path(os.environ["CONTROL"])
        if (control / "victim").read_text() == ray.get_runtime_context().get_node_id():
            while not (control / "go").exists() and not (control / "alone").exists():
                time.sleep(0.05)
        if (control / "go").exists() and (control / "victim").read_text() == ray.get_runtime_context().get_node_id():
            (control / "caught").write_text(case.name)
            time.sleep(600)
        print("planted", case.name, flush=True)
        return super().make(case, plan)


def build(source: Path, out: Path, address: str, key: Path) -> dict[str, Any]:
    """One build, and what came of it."""
    try:
        result = build_dataset(Light(), source, out, ray=address, key=key, report=False)
    except MedsegError as error:
        return {"error": str(error)}
    return {"built": len(result.built), "failed": [str(p.what) for p in result.failed], "notes": result.notes}


def kill_at_work(nodes: Any, node: Any, out: Path, done: int) -> threading.Thread:
    """Kill a node once so many cases are done and one is under way on it."""
    control = Path(os.environ["CONTROL"])
    for name in ("go", "caught"):
        (control / name).unlink(missing_ok=True)
    (control / "victim").write_text(node.node_id)

    def watch() -> None:
        while len(list(out.glob(".build/[!.]*.json"))) < done:
            time.sleep(0.02)
        (control / "go").touch()
        while not (control / "caught").exists():
            time.sleep(0.02)
        nodes.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def main() -> None:
    """Build twice; a node is killed during the first, and the other during the second."""
    source, folder, key = map(Path, sys.argv[1:])
    from ray.cluster_utils import Cluster

    cluster._PATIENCE_S = 3
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    one, other = (nodes.add_node(num_cpus=1) for _ in range(2))
    said = {"session": nodes.head_node.get_session_dir_path()}
    watcher = kill_at_work(nodes, one, folder / "one_lost", 3)
    said["one_lost"] = build(source, folder / "one_lost", nodes.address, key)
    watcher.join(30)
    (Path(os.environ["CONTROL"]) / "alone").touch()
    watcher = kill_at_work(nodes, other, folder / "none_left", 2)
    said["none_left"] = build(source, folder / "none_left", nodes.address, key)
    watcher.join(30)
    nodes.shutdown()
    print(json.dumps(said))
