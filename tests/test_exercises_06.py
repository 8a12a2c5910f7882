"""The answers to the exercises of 06_paper, from the results that it shows."""

import json
import math

import numpy as np
import pytest
from conftest import ROOT

from cpc_nb.sweep import PRESET_CELL, TABLE_2
from cpc_nb.tables import values


def results(name: str) -> dict:
    return json.loads((ROOT / "nbs" / "results" / f"{name}.json").read_text())


def test_chance_among_129_candidates():
    assert round(math.log(129), 2) == 4.86 and round(100 / 129, 1) == 0.8


def test_the_current_sequence_differs_from_mixed_speakers_by_nine_standard_errors():
    cells = {row.label: row.cell for row in TABLE_2["negatives from"]}
    found = [
        values(results("ablate_demo"), cells[label], "phone_frame", "cpc")
        for label in ("mixed speaker", "current sequence only")
    ]
    difference = np.mean(found[1]) - np.mean(found[0])
    error = math.sqrt(sum(np.var(one, ddof=1) / len(one) for one in found))
    assert round(difference, 1) == 6.7 and round(error, 1) == 0.7
    assert round(difference / error) == 9


@pytest.mark.parametrize("name", ["paper_demo", "paper_speechocean762"])
def test_a_hidden_layer_gains_most_on_mfcc(name):
    gain = {}
    for kind in ("random", "mfcc", "cpc"):
        linear, hidden = (
            np.mean(values(results(name), PRESET_CELL, protocol, kind))
            for protocol in ("phone_frame", "phone_mlp")
        )
        gain[kind] = hidden - linear
    assert max(gain, key=gain.get) == "mfcc"
