"""How long until something happens: seconds to import medseg and to print help, and as a share of importing MONAI."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results" / "startup.json"
COMMANDS = {
    "python (nothing)": ["-c", "pass"],
    "import medseg": ["-c", "import medseg"],
    "medseg --help": ["-m", "medseg", "--help"],
    "data_prep --help": ["-m", "data_prep", "--help"],
    "import monai": ["-c", "import monai"],
}
LIMITS = {"import medseg": 0.2, "medseg --help": 0.5, "data_prep --help": 0.5}


def cpu_name() -> str:
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def seconds(words: list[str]) -> float:
    """Wall-clock seconds of one run of Python."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure(runs: int) -> dict[str, dict[str, float]]:
    """Seconds of each command: least and median of `runs`, in turns, after one run that warms the disk."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(runs + 1):
        for name, words in COMMANDS.items():
            taken = seconds(words)
            if turn:
                times[name].append(taken)
    monai = min(times["import monai"])
    return {
        name: {
            "min_s": round(min(values), 4),
            "median_s": round(statistics.median(values), 4),
            "of_import_monai": round(min(values) / monai, 4),
        }
        for name, values in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7, help="runs of each command (default: 7)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to write")
    arguments = parser.parse_args()

    from rich.console import Console
    from rich.table import Table

    from medseg.io import atomic_write_text

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    rows = measure(arguments.runs)
    table = Table("", "min (s)", "median (s)", "of import monai", "limit (s)")
    for name, row in rows.items():
        limit = str(LIMITS.get(name, ""))
        table.add_row(name, f"{row['min_s']:.3f}", f"{row['median_s']:.3f}", f"{row['of_import_monai']:.1%}", limit)
    Console().print(table)
    content: dict[str, object] = {"cpu": cpu_name(), "python": platform.python_version(), "runs": arguments.runs}
    content |= {"load_average_before": load, "commands": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(arguments.out, json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
