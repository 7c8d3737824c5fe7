"""How many threads native code gets: a team only for work that is worth waking it."""

from __future__ import annotations

import pytest
import torch

from dlmone_fast.kernels import native


def test_short_work_gets_one_thread(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "_WORTH_A_TEAM_NS", 1e6)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert [native.threads_for(ns) for ns in (0, 999_999, 1e6, 1e9)] == [1, 1, 7, 7]
