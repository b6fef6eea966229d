"""Parallel work on the cores of a CPU, with results that do not depend on their number."""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class _StoppedError(Exception):
    """Ends the running calls of `run_in_threads`."""


@contextmanager
def one_thread_per_operation(device: torch.device) -> Iterator[int]:
    """Run each PyTorch operation within the block on one thread if `device` is a CPU.

    Several threads divide a sum among them, so that its rounding depends on their number.

    Yields:
        The number of threads for `run_in_threads`: as many as PyTorch used before (by default one per core), or 1 on
        an accelerator.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu":
        yield 1
        return
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def run_in_threads(
    function: Callable[[_Item], _Result],
    items: Iterable[_Item],
    threads: int,
    on_result: Callable[[_Result], Any],
) -> None:
    """Call `function` with each item in parallel, with one thread per operation.

    An exception, such as that of Ctrl-C, cancels the remaining calls and ends the running ones when they next call a
    module. With one thread, this thread makes all calls.

    Args:
        function: called with an item, in one of the threads.
        items: the items.
        threads: number of threads.
        on_result: called with each result in this thread, in the order in which they arrive.

    Raises:
        Exception: the first one that a call raises.
    """
    if threads == 1:
        for item in items:
            on_result(function(item))
        return
    workers: set[int] = set()

    def start_worker() -> None:
        workers.add(threading.get_ident())
        torch.set_num_threads(1)  # OpenMP has a setting for each thread

    def stop_worker(*_: Any) -> None:
        if threading.get_ident() in workers:
            raise _StoppedError

    pool = ThreadPoolExecutor(threads, initializer=start_worker)
    try:
        for future in as_completed([pool.submit(function, item) for item in items]):
            on_result(future.result())
    except BaseException:
        with register_module_forward_pre_hook(stop_worker):
            pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()
