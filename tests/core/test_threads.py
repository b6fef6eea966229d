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


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_exception_ends_the_running_calls_and_cancels_the_others(kind):
    network, x, called, started = torch.nn.Identity(), torch.zeros(1), [], threading.Event()

    def call(i: int) -> None:
        called.append(i)
        if i == 1:
            assert started.wait(60)
            raise kind("stop")
        end = time.monotonic() + 60
        while time.monotonic() < end:
            network(x)
            started.set()
        raise AssertionError("the call was not ended")

    begin = time.monotonic()
    with pytest.raises(kind, match="stop"):
        run_in_threads(call, range(100), 2, lambda _: None)
    assert time.monotonic() - begin < 30
    assert len(called) < 5
    network(x)  # modules work again


def test_an_exception_in_the_calling_thread_ends_the_calls():
    called = []
    with pytest.raises(KeyboardInterrupt):
        run_in_threads(called.append, range(1000), 2, lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert len(called) < 1000
