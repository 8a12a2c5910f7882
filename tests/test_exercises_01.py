"""The expected answers of the exercises in 01_data."""

import numpy as np
import pytest

from cpc_nb.corpus import CorpusError, pack
from cpc_nb.data import Windows

SIX = np.array([0, 1, 41, 42, 120, 121])


@pytest.fixture(scope="module")
def corpus():
    return pack("demo")


def test_01_data_a_group_never_spans_processes(corpus):
    windows = Windows(corpus, SIX, batch_size=4, group_size=4, seed=0)
    parts = [windows.locate(0, rank, world=2)[0] for rank in range(2)]
    assert sorted(len(part) for part in parts) == [0, 4]


def test_01_data_groups_that_no_speaker_fills(corpus):
    with pytest.raises(
        CorpusError, match="lower data.group_size, or set data.group_by"
    ):
        Windows(corpus, SIX, batch_size=8, group_size=8, seed=0, group_by="speaker")


@pytest.mark.parametrize("group_by, expected", [("corpus", 55), ("speaker", 0)])
def test_01_data_windows_of_a_group_that_overlap(corpus, group_by, expected):
    windows = Windows(corpus, SIX, 4, 2, seed=0, group_by=group_by)
    overlapping = 0
    for step in range(100 * len(windows)):
        placed = np.stack(windows.locate(step), 1).reshape(-1, 2, 2)
        for (utterance, start), (other, other_start) in placed:
            near = abs(start - other_start) < 20_480
            overlapping += utterance == other and near
    assert overlapping == expected
