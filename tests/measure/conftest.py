"""Fixtures that the tests of timing share."""

import time
from types import SimpleNamespace

import pytest
from still_clock import Clock

from tersor.measure import latency


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """The clock of all timing; to sleep is to move it."""
    clock = Clock()
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(time, "sleep", clock.take)
    return clock
