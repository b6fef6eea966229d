"""Claims about the EMA weights."""

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from ddgan.training.arguments import RunArguments
from ddgan.training.ema import EMA


def trained_ema(**args) -> EMA:
    """The EMA weights of a small network with dropout, after a step that changes its weights."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 4))
    ema = EMA(network, RunArguments(**args))
    ema.prepare(Accelerator(cpu=True))
    for _ in range(2):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(1)
        ema.step()
    return ema


def test_the_average_replaces_the_trained_weights_and_they_return():
    ema = trained_ema(ema_decay=0.9)
    before = [parameter.clone() for parameter in ema.network.parameters()]
    with ema.applied():
        assert not ema.network.training
        assert not any(map(torch.equal, before, ema.network.parameters()))
        assert all(map(torch.equal, ema.weights(), ema.network.parameters()))
    assert all(map(torch.equal, before, ema.network.parameters()))
    assert ema.network.training


def test_the_trained_weights_return_after_an_error():
    ema = trained_ema(ema_decay=0.9)
    before = [parameter.clone() for parameter in ema.network.parameters()]
    try:
        with ema.applied():
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert all(map(torch.equal, before, ema.network.parameters()))


def test_without_ema_the_weights_are_those_in_training():
    ema = trained_ema(ema_decay=0.0)
    before = [parameter.clone() for parameter in ema.network.parameters()]
    with ema.applied():
        assert all(map(torch.equal, before, ema.network.parameters()))


def test_a_saved_average_continues_as_if_never_interrupted(tmp_path):
    straight, resumed = trained_ema(ema_decay=0.9), trained_ema(ema_decay=0.9)
    straight.save(tmp_path)
    resumed.average.shadow_params = [torch.zeros_like(tensor) for tensor in resumed.average.shadow_params]
    resumed.load(tmp_path, {"step": 2})
    for ema in (straight, resumed):
        ema.step()
    assert all(map(torch.equal, straight.average.shadow_params, resumed.average.shadow_params))


def test_a_loaded_average_lies_at_aligned_addresses(tmp_path):
    """Otherwise kernels may sum in another order than in a run that was never interrupted."""
    ema = trained_ema(ema_decay=0.9)
    ema.save(tmp_path)
    ema.load(tmp_path, {"step": 2})
    assert all(tensor.data_ptr() % 64 == 0 for tensor in ema.weights())


def test_the_weights_follow_the_formula_of_the_exponential_moving_average():
    AcceleratorState._reset_state(reset_partial_state=True)
    network = torch.nn.Linear(3, 2)
    ema = EMA(network, RunArguments(ema_decay=0.9, ema_inv_gamma=2.0, ema_power=0.5))
    ema.prepare(Accelerator(cpu=True))
    expected = network.weight.detach().double()
    for step in range(1, 40):
        with torch.no_grad():
            network.weight.add_(torch.randn(2, 3, generator=torch.Generator().manual_seed(step)))
        ema.step()
        decay = min(0.9, 1 - (1 + (step - 1) / 2) ** -0.5)
        expected = decay * expected + (1 - decay) * network.weight.detach().double()
    with ema.applied():
        assert (network.weight - expected).abs().max() < 1e-6
