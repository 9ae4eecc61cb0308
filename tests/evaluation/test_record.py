"""The record: what a kill or a full disk leaves of it."""

import errno
import os

import pytest
import torch
from torch import nn

from twins_fast.evaluation import Record
from twins_fast.evaluation.record import Outcome, digest


def outcome(*right):
    return Outcome(torch.tensor(right, dtype=torch.bool), (1.5, 2.5), 3, 0.25)


def test_what_is_added_is_found_by_another_process(tmp_path):
    first = Record(tmp_path / "a")
    first.add("k", outcome(1, 0, 1, 1, 0, 0, 1, 0, 1), "PGD")
    second = Record(tmp_path / "a")
    for record in (first, second):
        found = record.get("k")
        assert found.right.tolist() == [True, False, True, True, False, False, True, False, True]
        assert (found.loss, found.attacked, found.seconds) == ((1.5, 2.5), 3, 0.25)
    assert second.get("another") is None and Record(tmp_path / "a", again=True).get("k") is None


@pytest.mark.parametrize("cut", [2, 20, 60])
def test_a_torn_last_line_is_left_out(tmp_path, cut):
    record = Record(tmp_path / "a")
    record.add("k", outcome(1, 0), "PGD")
    record.add("l", outcome(1, 1), "PGD")
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-cut])
    record = Record(tmp_path / "a")
    assert record.get("k") is not None and record.get("l") is None
    record.add("l", outcome(0, 1), "PGD")
    assert Record(tmp_path / "a").get("l").right.tolist() == [False, True]


def test_a_full_disk(tmp_path, monkeypatch):
    record = Record(tmp_path / "a")
    record.add("k", outcome(1, 0), "PGD")

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("twins_fast.evaluation.record.os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*a'"):
        record.add("l", outcome(1, 1), "PGD")
    assert record.get("l") is None
    monkeypatch.undo()
    assert Record(tmp_path / "a").get("k") is not None


def test_digests_tell_apart():
    torch.manual_seed(0)
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    same = nn.Linear(2, 2)
    same.load_state_dict(a.state_dict())
    assert digest(a) == digest(same) != digest(b)
    x = torch.arange(4.0)
    different = [x, x.view(2, 2), x.double(), x.to(torch.bfloat16), x + 1, torch.tensor(1.0), "ab", ("ab", "c")]
    assert len({digest(part) for part in different}) == len(different)
    assert digest("ab", "c") != digest("a", "bc")
