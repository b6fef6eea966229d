"""Parallel calls on the cores of a CPU."""

import threading
import time

import pytest
import torch

from ddgan.core.threads import one_thread_per_operation, run_in_threads


def test_operations_run_on_one_thread_within_the_block(two_threads):
    with one_thread_per_operation(torch.device("cpu")) as threads:
        assert (threads, torch.get_num_threads()) == (2, 1)
    assert torch.get_num_threads() == 2
    with one_thread_per_operation(torch.device("cuda")) as threads:
        assert (threads, torch.get_num_threads()) == (1, 2)


def test_calls_run_at_the_same_time_and_all_results_arrive_in_the_calling_thread():
    together, results = threading.Barrier(2, timeout=60), []

    def call(i: int) -> tuple[int, int]:
        together.wait()  # would fail after a minute if the calls were made one by one
        return i, torch.get_num_threads()

    run_in_threads(call, range(6), 2, lambda result: results.append((result, threading.current_thread())))
    assert sorted(results) == [((i, 1), threading.main_thread()) for i in range(6)]


def run_until_ended(network: torch.nn.Module) -> None:
    """Call a network for a minute, unless an exception in it ends that."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        network(torch.zeros(1))
    raise AssertionError("the call was not ended")


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("raised_by", ["call", "on_result"])
def test_an_exception_ends_the_running_calls_and_cancels_the_others(kind, raised_by):
    network, called, running = torch.nn.Identity(), [], threading.Event()
    network.register_forward_hook(lambda *_: running.set())

    def call(i: int) -> None:
        called.append(i)
        if i > 0:
            run_until_ended(network)
        assert running.wait(60)
        if raised_by == "call":
            raise kind("stop")

    def on_result(result: None) -> None:
        raise kind("stop")

    begin = time.monotonic()
    with pytest.raises(kind, match="stop"):
        run_in_threads(call, range(100), 2, on_result)
    assert time.monotonic() - begin < 30
    assert len(called) < 5
    network(torch.zeros(1))  # modules work again
