"""The threads of a token's kernels: the same numbers from any number of them, at any time, in any process."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from titans_build.kernels.cpu_runtime.call import threads_for
from titans_build.kernels.linear import project

pytestmark = pytest.mark.c_kernels


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def job(seed=0):
    """A product that is worth four threads, by the kernel and by PyTorch."""
    make = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(2, 1, 320, generator=make), torch.randn(1000, 320, generator=make)
    assert weight.nbytes > 4 * 2**17
    return x, weight, torch.nn.functional.linear(x, weight)


@torch.no_grad()
def test_any_number_of_threads_gives_the_same_numbers(threads):
    x, weight, expected = job()
    threads(1)
    one = project(x, weight, None, backend="native")
    torch.testing.assert_close(one, expected)
    for count in (2, 3, 7, 32):
        threads(count)
        for _ in range(50):
            assert torch.equal(project(x, weight, None, backend="native"), one)


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="numbers this small are not flushed here")
@torch.no_grad()
def test_every_thread_rounds_as_the_caller_does(threads):
    threads(4)
    x, weight = torch.full((1, 320), 1e-20), torch.full((1000, 320), 1e-20)
    weight[:] = 1e-22  # their products are smaller than any normal number
    assert (project(x, weight, None, backend="native") > 0).all()
    torch.set_flush_denormal(True)
    try:
        for _ in range(100):
            assert (project(x, weight, None, backend="native") == 0).all()
    finally:
        torch.set_flush_denormal(False)
    assert (project(x, weight, None, backend="native") > 0).all()


def test_small_work_stays_with_one_thread(threads):
    threads(8)
    assert threads_for(2**10) == 1
    assert threads_for(2**30) == 8


def test_several_callers_at_once(threads):
    threads(4)

    @torch.no_grad()
    def call(seed):
        x, weight, expected = job(seed)
        first = project(x, weight, None, backend="native")
        torch.testing.assert_close(first, expected)
        return all(torch.equal(project(x, weight, None, backend="native"), first) for _ in range(200))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(4)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@torch.no_grad()
def test_a_forked_child_has_threads_of_its_own(threads):
    threads(4)
    x, weight, _ = job()
    expected = project(x, weight, None, backend="native")
    child = os.fork()
    if not child:
        signal.alarm(30)  # one that waits for its parent's threads waits for ever
        same = all(torch.equal(project(x, weight, None, backend="native"), expected) for _ in range(100))
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(project(x, weight, None, backend="native"), expected)
