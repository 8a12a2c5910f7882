"""Gather evaluated runs for the README.

`python nbs/_sphinx/results.py NAME HARDWARE RUN...` writes nbs/results/NAME.json. Each
run's metrics are taken as its evaluation wrote them, together with what its
configuration changes in its preset.
"""

import json
import sys
from pathlib import Path

from cpc_nb.checkpoint import RunFolder
from cpc_nb.config import make_config, write_atomically


def changes(config) -> dict:
    """Dotted fields in which `config` differs from its preset; budget, seed and source
    are in the metrics."""
    preset, own = make_config(config.preset).identity(), config.identity()
    return {
        f"{section}.{name}": own[section][name]
        for section in own
        for name in own[section]
        if own[section][name] != preset[section][name]
        and (section, name) != ("train", "seed")
    }


def gather(runs: list[str]) -> list[dict]:
    return [
        {
            "changes": changes(RunFolder(run).config()),
            **json.loads((Path(run) / "evaluation" / "metrics.json").read_text()),
        }
        for run in runs
    ]


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    name, hardware, *runs = sys.argv[1:]
    path = Path(__file__).parent.parent / "results" / f"{name}.json"
    write_atomically(
        path, json.dumps({"hardware": hardware, "runs": gather(runs)}, indent=1) + "\n"
    )
    print(f"{path}: {len(runs)} runs")
