"""The CUDA side of the harness with a stand-in for the device: what is called, in which order, with which numbers."""

from types import SimpleNamespace

import pytest
import torch

from bench import harness


@pytest.fixture
def device(monkeypatch):
    """A device that answers as CUDA does and notes what it was asked."""
    asked = []
    memory = {"allocated": 100, "peak": 130}

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            asked.append("event")

        def elapsed_time(self, end):
            return 4.0  # milliseconds

    properties = SimpleNamespace(L2_cache_size=2**20, name="Chip", multi_processor_count=3, total_memory=2**30)
    real_empty = torch.empty

    def empty(*size, device=None, **kwargs):
        asked.append("flush buffer")
        return real_empty(8, **kwargs)

    for name, stand_in in {
        "get_device_properties": lambda device: properties,
        "get_device_capability": lambda: (9, 0),
        "Event": Event,
        "_sleep": lambda cycles: asked.append(("sleep", cycles)),
        "synchronize": lambda device: asked.append("synchronize"),
        "reset_peak_memory_stats": lambda device: asked.append("reset"),
        "memory_allocated": lambda device: memory["allocated"],
        "max_memory_allocated": lambda device: memory["peak"],
        "is_available": lambda: True,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch, "empty", empty)
    return asked


def test_a_call_is_timed_between_events_behind_a_wait(device):
    stopwatch = harness.Stopwatch("cuda")
    seconds, host = stopwatch.time("a", lambda: device.append("call"))
    assert device == ["flush buffer", ("sleep", 0), "event", "call", "event", "synchronize"]
    assert seconds == pytest.approx(4e-3) and 0 <= host < 1
    # The next time the device waits for as long as the host took, and no longer than the limit.
    assert stopwatch.lead["a"] >= 3e-5
    stopwatch.lead["a"] = 10.0
    stopwatch.time("a", lambda: None)
    assert ("sleep", int(harness.Stopwatch.CLOCK * harness.Stopwatch.MOST_LEAD)) in device


def test_interleaved_reports_device_and_host_seconds(device):
    timing = harness.interleaved({"a": lambda: None}, repeats=5, warmup=1, device="cuda")["a"]
    assert timing.median == pytest.approx(4e-3) and timing.repeats == 5 and timing.host is not None


def test_memory_is_the_peak_beyond_what_was_there(device):
    assert harness.device_memory("cuda", lambda: device.append("call")) == 30
    assert device == ["synchronize", "reset", "call", "synchronize"]
    assert harness.device_memory("cpu", lambda: None) is None


def test_a_lost_device_is_told_from_a_failed_call(device, monkeypatch):
    harness.still_alive("cuda")
    harness.still_alive("cpu")

    def lost(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(harness.DeviceLostError, match="illegal memory access was encountered$"):
        harness.still_alive("cuda")


def test_facts_of_the_gpu(device, monkeypatch):
    monkeypatch.setattr(harness.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="580.1, 345 MHz\n"))
    # A torch with CUDA on a machine without a GPU has no cuDNN to ask.
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92000)
    facts = harness._gpu_facts()
    assert facts["name"] == "Chip" and facts["capability"] == [9, 0]
    assert facts["driver, SM clock, its maximum, power limit"] == "580.1, 345 MHz"
