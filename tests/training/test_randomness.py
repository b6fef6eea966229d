"""Keyed random numbers."""

import torch

from ddgan.training.randomness import PerSampleRNG, fold_in

CPU = torch.device("cpu")


def test_keys_and_numbers_do_not_change_between_versions():
    assert fold_in(1, 2, -3) == 15020427595393229491
    assert PerSampleRNG([1, 2], CPU).integers(1000).tolist() == [960, 453]


def test_a_sample_has_the_same_numbers_in_every_batch():
    together = PerSampleRNG([5, 6, 7], CPU)
    alone = PerSampleRNG([6], CPU)
    assert torch.equal(together.normal(2, 3)[1:2], alone.normal(2, 3))
    assert torch.equal(together.uniform()[1:2], alone.uniform())
    assert torch.equal(together.integers(10)[1:2], alone.integers(10))


def test_streams_of_the_same_sample_differ():
    assert not torch.equal(PerSampleRNG([5], CPU).normal(9), PerSampleRNG([5], CPU, stream=1).normal(9))
