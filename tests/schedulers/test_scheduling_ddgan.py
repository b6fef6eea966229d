"""The DDGAN scheduler, compared with recorded values of the reference implementation and with Gaussian formulas."""

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from ddgan import DDGANScheduler, DDGANSchedulerOutput
from ddgan.schedulers import scheduling_ddgan

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
RECORDED = np.load(GOLDEN / "scheduler.npz", allow_pickle=False)
CASES = json.loads(str(RECORDED["config_json"]))["cases"]
VALID = [pytest.param(case, id=case["key"]) for case in CASES if case["valid"]]
INVALID = [pytest.param(case, id=case["key"]) for case in CASES if not case["valid"]]
# the recorded values were computed in float32, with errors of up to 3e-6 in the coefficients
FLOAT32_TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def recorded(*names):
    return torch.from_numpy(RECORDED["/".join(names)])


def scheduler_of(case, **kwargs):
    return DDGANScheduler(
        num_train_timesteps=case["num_timesteps"],
        beta_min=case["beta_min"],
        beta_max=case["beta_max"],
        variance_schedule="geometric" if case["use_geometric"] else "vp",
        **kwargs,
    )


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def use_noises(monkeypatch):
    """Make the scheduler use the given noises, in this order, and no others."""

    def use_noises(*noises):
        left = list(noises)
        monkeypatch.setattr(scheduling_ddgan, "randn_tensor", lambda shape, **_: left.pop(0).expand(shape))

    return use_noises


def posterior(use_noises, scheduler, t):
    """Return the coefficients of x_0, x_t and the noise in q(x_s | x_t, x_0), in float64."""
    zero, one = torch.zeros(1, 1, 1, 1).double(), torch.ones(1, 1, 1, 1).double()
    t = torch.tensor([t])
    coefficients = []
    for x_0, x_t, noise in ((one, zero, zero), (zero, one, zero), (zero, zero, one)):
        use_noises(noise)
        coefficients.append(scheduler.step(x_0, t, x_t).prev_sample.item())
    return coefficients


@pytest.mark.parametrize("case", VALID)
def test_schedule_and_posterior_match_the_recorded_coefficients(case, use_noises):
    scheduler, key = scheduler_of(case), case["key"]
    T = case["num_timesteps"]
    coefficients = torch.tensor([posterior(use_noises, scheduler, t) for t in range(T)])
    ours = {
        "betas": scheduler.betas.float(),
        "alphas_cumprod": scheduler.alphas_cumprod.float(),
        "posterior_mean_coef1": coefficients[:, 0],
        "posterior_mean_coef2": coefficients[:, 1],
        "posterior_variance": coefficients[:, 2] ** 2,
    }
    for name, value in ours.items():
        torch.testing.assert_close(value, recorded(key, "posterior", name), **FLOAT32_TOLERANCE, msg=name)


@pytest.mark.parametrize("case", VALID)
def test_pair_with_the_recorded_noises_matches(case, use_noises):
    get = partial(recorded, case["key"], "q_sample_pairs")
    # the reference generates the noise of the noisier sample first
    use_noises(get("noise_second_drawn"), get("noise_first_drawn"))
    less_noisy, noisier = scheduler_of(case).add_noise_pair(get("x_start"), get("t"))
    torch.testing.assert_close(less_noisy, get("x_t"), **FLOAT32_TOLERANCE)
    torch.testing.assert_close(noisier, get("x_t_plus_one"), **FLOAT32_TOLERANCE)


@pytest.mark.parametrize("case", VALID)
def test_posterior_sample_with_the_recorded_noise_matches_with_one_timestep_per_sample(case, use_noises):
    get = partial(recorded, case["key"], "sample_posterior")
    use_noises(get("noise"))
    output = scheduler_of(case).step(get("x_0"), get("t"), get("x_t"))
    torch.testing.assert_close(output.prev_sample, get("output"), **FLOAT32_TOLERANCE)


def test_recorded_sampling_run_is_reproduced_step_by_step(use_noises):
    run = {
        name: torch.from_numpy(a)
        for name, a in np.load(GOLDEN / "sample_trajectory.npz").items()
        if "json" not in name
    }
    scheduler = DDGANScheduler()
    assert scheduler.timesteps.tolist() == [run[f"step{i}/t"][0].item() for i in range(4)]
    x = run["input/x_init"] * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        torch.testing.assert_close(x, run[f"step{i}/x"], **FLOAT32_TOLERANCE)
        use_noises(run[f"step{i}/noise"])
        x = scheduler.step(run[f"step{i}/x_0_predicted"], t, x).prev_sample
    torch.testing.assert_close(x, run["output"], **FLOAT32_TOLERANCE)


@pytest.mark.parametrize("case", INVALID)
def test_invalid_schedules_are_refused_with_the_possible_values(case):
    with pytest.raises(ValueError, match="0 < beta_min < beta_max < 1"):
        scheduler_of(case)


@pytest.mark.parametrize("steps", [1, 2, 4, 1000])
def test_cosine_schedule_has_the_levels_of_the_paper_and_a_last_beta_below_one(steps):
    levels = DDGANScheduler(steps, variance_schedule="cosine", eps=1e-9).alphas_cumprod
    angles = torch.arange(1, steps, dtype=torch.float64) / steps * math.pi / 2
    torch.testing.assert_close(levels[:-1], angles.cos().square(), rtol=0, atol=1e-7)
    before = levels[-2] if steps > 1 else 1.0
    assert levels[-1] / before == pytest.approx(0.001)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"beta_min": -1.0},
        {"beta_min": 0.0, "beta_max": 0.0},
        {"beta_max": 500.0},
        {"eps": 0.0},
        {"eps": 1.0},
        {"variance_schedule": "geometric", "beta_min": 0.5, "beta_max": 0.01},
        {"variance_schedule": "geometric", "beta_min": 0.0, "beta_max": 0.5},
        {"variance_schedule": "geometric", "beta_min": -0.1, "beta_max": 0.5},
        {"variance_schedule": "cosine", "eps": 0.0},
    ],
    ids=str,
)
def test_variance_that_does_not_increase_within_0_and_1_is_refused(kwargs):
    with pytest.raises(ValueError, match="Possible values"):
        DDGANScheduler(**kwargs)


@pytest.mark.parametrize(
    "kwargs", [{"num_train_timesteps": 0}, {"prediction_type": "x0"}, {"variance_schedule": "linear"}], ids=str
)
def test_unknown_options_and_zero_timesteps_are_refused(kwargs):
    with pytest.raises(ValueError, match="must be"):
        DDGANScheduler(**kwargs)


def test_trained_betas_replace_the_schedule_and_are_saved(tmp_path):
    vp = DDGANScheduler()
    for betas in (vp.betas.tolist(), vp.betas.numpy()):
        scheduler = DDGANScheduler(trained_betas=betas, beta_max=500.0, variance_schedule="geometric")
        scheduler.save_pretrained(tmp_path)
        for same in (
            scheduler,
            DDGANScheduler.from_pretrained(tmp_path),
            DDGANScheduler.from_config(scheduler.config),
        ):
            assert torch.equal(same.betas, vp.betas) and torch.equal(same.alphas_cumprod, vp.alphas_cumprod)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"trained_betas": [0.1, 0.2, 0.3]}, r"has shape \(3,\), but must have a value for each of the 4"),
        ({"trained_betas": [[0.1, 0.2, 0.3, 0.4]]}, r"has shape \(1, 4\)"),
        ({"trained_betas": [0.0, 0.2, 0.3, 0.4]}, r"must be in \(0, 1\)"),
        ({"trained_betas": [0.1, 1.0, 0.3, 0.4]}, r"must be in \(0, 1\)"),
        ({"trained_betas": [0.1, 0.2, 0.3, float("nan")]}, r"must be in \(0, 1\)"),
        ({"trained_betas": [0.1, 0.2, 0.3, 1.0], "prediction_type": "epsilon"}, "unless `prediction_type` is 'eps"),
    ],
    ids=str,
)
def test_invalid_trained_betas_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DDGANScheduler(**kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction_type": "v_prediction",
        },
        {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False, "num_train_timesteps": 100},
        {"rescale_betas_zero_snr": True, "prediction_type": "sample"},
        {"trained_betas": [0.01, 0.2, 0.3, 0.1, 0.05, 0.2, 0.3, 0.7], "num_train_timesteps": 8},
    ],
    ids=str,
)
def test_config_of_a_ddpm_process_gives_its_trailing_levels(kwargs, tmp_path):
    ddpm = DDPMScheduler(timestep_spacing="trailing", **kwargs)
    ddpm.save_pretrained(tmp_path)
    for T in (1, 3, 4, 8):
        ddpm.set_timesteps(T)
        assert len(ddpm.timesteps) == T
        scheduler = DDGANScheduler.from_config(ddpm.config, num_train_timesteps=T)
        levels = ddpm.alphas_cumprod[ddpm.timesteps].flip(0).double()
        torch.testing.assert_close(scheduler.alphas_cumprod, levels, rtol=1e-5, atol=1e-7)  # DDPM's are float32
        assert scheduler.config.num_train_timesteps == T
        assert scheduler.config.prediction_type == ddpm.config.prediction_type
        assert scheduler.config.clip_sample == ddpm.config.clip_sample
        scheduler.save_pretrained(tmp_path / "ddgan")
        loaded = DDGANScheduler.from_pretrained(tmp_path / "ddgan")
        from_file = DDGANScheduler.from_pretrained(tmp_path, num_train_timesteps=T)
        assert torch.equal(loaded.betas, scheduler.betas) and torch.equal(from_file.betas, scheduler.betas)
    sample_prediction = DDGANScheduler.from_config(ddpm.config, num_train_timesteps=2, prediction_type="sample")
    assert sample_prediction.config.prediction_type == "sample"
    for T in (0, 1001):
        with pytest.raises(ValueError, match=f"`num_train_timesteps` is {T}, but the process has"):
            DDGANScheduler.from_config(ddpm.config, num_train_timesteps=T)


def test_config_of_a_whole_process_gives_all_its_levels():
    for other in (DDPMScheduler(), DDIMScheduler(), EulerDiscreteScheduler()):
        scheduler = DDGANScheduler.from_config(other.config)
        assert len(scheduler) == 1000
        torch.testing.assert_close(scheduler.betas, other.betas.double(), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "kind", [CMStochasticIterativeScheduler, FlowMatchEulerDiscreteScheduler, CogVideoXDDIMScheduler]
)
def test_config_of_another_kind_of_process_is_refused(kind, tmp_path):
    kind().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither that of a DDGANScheduler nor"):
        DDGANScheduler.from_config(kind().config, num_train_timesteps=4)
    with pytest.raises(ValueError, match=f"The config of {kind.__name__} with "):
        DDGANScheduler.from_pretrained(tmp_path, num_train_timesteps=4)


def test_own_config_may_be_partial_or_changed():
    assert len(DDGANScheduler.from_config({"num_train_timesteps": 8})) == 8
    changed = DDGANScheduler.from_config(DDGANScheduler(2, beta_max=5.0).config, num_train_timesteps=3)
    assert torch.equal(changed.betas, DDGANScheduler(3, beta_max=5.0).betas)


def test_schedule_is_float64_and_follows_its_formula():
    scheduler = DDGANScheduler(num_train_timesteps=3, beta_min=0.3, beta_max=7.0, eps=0.01)
    u = [0.01 + 0.99 * k / 3 for k in range(4)]
    signal = [np.exp(-0.5 * v * v * (7.0 - 0.3) - v * 0.3) for v in u]
    assert scheduler.betas.dtype == scheduler.alphas_cumprod.dtype == torch.float64
    np.testing.assert_allclose(scheduler.betas, [1 - signal[k + 1] / signal[k] for k in range(3)], rtol=1e-13)
    np.testing.assert_allclose(scheduler.alphas_cumprod, np.array(signal[1:]) / signal[0], rtol=1e-13)


@pytest.mark.parametrize("timesteps", [[7, 6, 5, 4, 3, 2, 1, 0], [7, 4, 3, 0], [6, 2], [5]], ids=str)
def test_posterior_of_any_sub_sequence_conditions_the_composed_gaussian(timesteps, use_noises):
    """Given x_0, x_s and x_t are jointly Gaussian; conditioning on x_t gives mean and variance of x_s."""
    scheduler = DDGANScheduler(num_train_timesteps=8, beta_max=6.0)
    scheduler.set_timesteps(timesteps=timesteps)
    assert scheduler.timesteps.tolist() == timesteps
    for t, s in zip(timesteps, [*timesteps[1:], -1], strict=True):
        a_s = (1 - scheduler.betas[: s + 1]).prod().item()
        a_ts = (1 - scheduler.betas[s + 1 : t + 1]).prod().item()
        # cov(x_s, x_t) = sqrt(a_ts) (1 - a_s), var(x_t) = 1 - a_s a_ts, both given x_0
        gain = a_ts**0.5 * (1 - a_s) / (1 - a_s * a_ts)
        mean_of_x_0 = a_s**0.5 - gain * (a_s * a_ts) ** 0.5
        std = ((1 - a_s) - gain * a_ts**0.5 * (1 - a_s)) ** 0.5
        np.testing.assert_allclose(
            posterior(use_noises, scheduler, t), [mean_of_x_0, gain, std], rtol=1e-10, atol=1e-14
        )


@pytest.mark.parametrize("timesteps", [None, [3, 1], [2, 0]], ids=str)
def test_denoising_with_the_true_image_stays_at_the_noise_levels(timesteps):
    """If x_t follows q(x_t | x_0), the result of `step` has mean and variance of q(x_s | x_0)."""
    scheduler = DDGANScheduler(beta_max=5.0)
    scheduler.set_timesteps(timesteps=timesteps)
    generator = seeded(0)
    n = 200_000
    x_0 = torch.full((n, 1, 1, 1), 0.7, dtype=torch.float64)
    first, *rest = scheduler.timesteps
    x = scheduler.add_noise(x_0, torch.randn(x_0.shape, generator=generator).double(), first.expand(n))
    for t, s in zip(scheduler.timesteps, rest, strict=False):
        x = scheduler.step(x_0, t, x, generator=generator).prev_sample
        level = scheduler.alphas_cumprod[s]
        # five standard errors of a mean and of a variance of n samples
        assert abs(x.mean() - 0.7 * level.sqrt()) < 5 * ((1 - level) / n).sqrt()
        assert abs(x.var() / (1 - level) - 1) < 5 * (2 / n) ** 0.5
    assert torch.equal(scheduler.step(x_0, scheduler.timesteps[-1], x, generator=generator).prev_sample, x_0)


@pytest.mark.parametrize(
    ("T", "steps", "expected"),
    [(4, None, [3, 2, 1, 0]), (4, 4, [3, 2, 1, 0]), (4, 2, [3, 1]), (4, 1, [3]), (8, 3, [7, 4, 2]), (2, 2, [1, 0])],
)
def test_fewer_steps_are_evenly_spaced_and_start_at_pure_noise(T, steps, expected):
    scheduler = DDGANScheduler(num_train_timesteps=T)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == expected
    assert scheduler.timesteps.dtype == torch.int64
    assert scheduler.num_inference_steps == len(expected)


@pytest.mark.parametrize("T", [1, 2, 5, 8, 50])
def test_timesteps_descend_for_every_number_of_steps(T):
    scheduler = DDGANScheduler(num_train_timesteps=T)
    for n in range(1, T + 1):
        scheduler.set_timesteps(n)
        assert len(set(scheduler.timesteps.tolist())) == n
        assert scheduler.timesteps[0] == T - 1


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_inference_steps": 2, "timesteps": [3, 1]},
        {"num_inference_steps": 5},
        {"num_inference_steps": 0},
        {"timesteps": [1, 3]},
        {"timesteps": [3, 3]},
        {"timesteps": [4, 1]},
        {"timesteps": [2, -1]},
        {"timesteps": []},
    ],
    ids=str,
)
def test_invalid_timesteps_are_refused(kwargs):
    with pytest.raises(ValueError, match=r"timesteps|num_inference_steps"):
        DDGANScheduler().set_timesteps(**kwargs)


def test_set_timesteps_without_arguments_resets_a_sub_sequence(use_noises):
    scheduler = DDGANScheduler()
    full = [posterior(use_noises, scheduler, t) for t in range(4)]
    scheduler.set_timesteps(2)
    assert posterior(use_noises, scheduler, 3) != full[3]
    scheduler.set_timesteps()
    assert [posterior(use_noises, scheduler, t) for t in range(4)] == full


@pytest.mark.parametrize(("timesteps", "t", "s"), [(None, 2, 1), ([3, 0], 3, 0), ([3, 2], 2, None)], ids=str)
def test_noise_pair_is_markov_and_its_noisier_sample_is_the_network_input(timesteps, t, s):
    """x_t follows q(x_t | x_0), and its covariance with its neighbor x_s is that of the Markov chain."""
    scheduler = DDGANScheduler(beta_max=5.0)
    scheduler.set_timesteps(timesteps=timesteps)
    n = 200_000
    x_0 = torch.full((n, 1, 1, 1), 0.5, dtype=torch.float64)
    less, more = scheduler.add_noise_pair(x_0, torch.full((n,), t), generator=seeded(0))
    level = scheduler.alphas_cumprod[t]
    level_below = torch.tensor(1.0) if s is None else scheduler.alphas_cumprod[s]
    for x, a in ((less, level_below), (more, level)):
        assert abs(x.mean() - 0.5 * a.sqrt()) <= 5 * ((1 - a) / n).sqrt()
        assert abs(x.var() - (1 - a)) <= 5 * (1 - a) * (2 / n) ** 0.5
    covariance = ((less - less.mean()) * (more - more.mean())).mean()
    assert abs(covariance - (level / level_below).sqrt() * (1 - level_below)) < 5 / n**0.5
    assert torch.equal(less, x_0) == (s is None)


def test_add_noise_follows_its_formula_and_the_pair_at_0_holds_the_image():
    scheduler = DDGANScheduler()
    x_0, noise = torch.randn(4, 3, 5, 7), torch.randn(4, 3, 5, 7)
    t = torch.tensor([0, 1, 2, 3])
    level = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    expected = level.sqrt() * x_0 + (1 - level).sqrt() * noise
    torch.testing.assert_close(scheduler.add_noise(x_0, noise, t), expected.float())
    less, more = scheduler.add_noise_pair(x_0, torch.zeros(4, dtype=torch.long))
    assert torch.equal(less, x_0)
    assert not torch.equal(more, x_0)


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
def test_prediction_types_give_the_same_image(prediction_type):
    scheduler = DDGANScheduler(prediction_type=prediction_type, beta_max=5.0)
    x_0, noise = torch.randn(2, 1, 4, 4).double(), torch.randn(2, 1, 4, 4).double()
    for t in range(4):
        a = scheduler.alphas_cumprod[t]
        x_t = a.sqrt() * x_0 + (1 - a).sqrt() * noise
        output = {"sample": x_0, "epsilon": noise, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * x_0}
        step = scheduler.step(output[prediction_type], t, x_t)
        torch.testing.assert_close(step.pred_original_sample, x_0)


def test_clip_sample_clips_the_predicted_image_before_the_posterior():
    x_0, x_t = 3 * torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    clipped = DDGANScheduler(clip_sample=True).step(x_0, 2, x_t, generator=seeded(0))
    plain = DDGANScheduler().step(x_0.clamp(-1, 1), 2, x_t, generator=seeded(0))
    assert torch.equal(clipped.pred_original_sample, x_0.clamp(-1, 1))
    assert torch.equal(clipped.prev_sample, plain.prev_sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_the_float32_result_rounded_once(dtype):
    scheduler = DDGANScheduler()
    x_0, x_t = torch.randn(2, 3, 4, 4).to(dtype), torch.randn(2, 3, 4, 4).to(dtype)
    t = torch.tensor([1, 3])

    def run(x_0, x_t):
        step = scheduler.step(x_0, t, x_t, generator=seeded(0))
        return [
            *step.values(),
            scheduler.add_noise(x_0, x_t, t),
            *scheduler.add_noise_pair(x_0, t, generator=seeded(0)),
        ]

    for half, full in zip(run(x_0, x_t), run(x_0.float(), x_t.float()), strict=True):
        assert half.dtype == dtype
        assert torch.equal(half, full.to(dtype))


def test_with_a_list_of_generators_samples_are_independent():
    scheduler = DDGANScheduler()
    x_0, x_t = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    together = scheduler.step(x_0, 2, x_t, generator=[seeded(5), seeded(6), seeded(7)]).prev_sample
    alone = scheduler.step(x_0[1:2], 2, x_t[1:2], generator=[seeded(6)]).prev_sample
    assert torch.equal(together[1:2], alone)
    t = torch.tensor([1, 2, 3])
    for whole, one in zip(
        scheduler.add_noise_pair(x_0, t, generator=[seeded(5), seeded(6), seeded(7)]),
        scheduler.add_noise_pair(x_0[1:2], t[1:2], generator=[seeded(6)]),
        strict=True,
    ):
        assert torch.equal(whole[1:2], one)


def test_last_step_uses_no_random_numbers():
    generator = seeded(0)
    before = generator.get_state()
    scheduler = DDGANScheduler()
    x = torch.randn(1, 1, 4, 4)
    scheduler.step(x, 0, x, generator=generator)
    scheduler.set_timesteps(timesteps=[3, 1])
    scheduler.step(x, 1, x, generator=generator)
    assert torch.equal(generator.get_state(), before)
    scheduler.step(x, 3, x, generator=generator)
    assert not torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("timestep", [2, torch.tensor([1, 0, 3])], ids=["one", "per sample"])
def test_eta_scales_the_noise_and_0_is_the_mean_without_random_numbers(timestep):
    scheduler = DDGANScheduler(beta_max=5.0)
    x_0, x_t, noise = torch.randn(3, 3, 1, 4, 4).double()

    def step(**arguments):
        return scheduler.step(x_0, timestep, x_t, **arguments).prev_sample

    generator = seeded(0)
    before = generator.get_state()
    mean = step(eta=0.0, generator=generator)
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(mean, step(variance_noise=torch.zeros_like(noise)))
    assert torch.equal(mean, step(variance_noise=noise, eta=0))
    full, half, double = (step(variance_noise=noise, eta=eta) for eta in (1.0, 0.5, 2.0))
    torch.testing.assert_close(half - mean, (full - mean) / 2)
    torch.testing.assert_close(double - mean, 2 * (full - mean))
    assert (full - mean)[0].abs().max() > 0.1
    assert torch.equal(step(eta=1.0, generator=seeded(0)), step(generator=seeded(0)))


def test_timestep_may_be_a_number_a_tensor_or_one_per_sample():
    scheduler = DDGANScheduler()
    x_0, x_t = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    steps = [
        scheduler.step(x_0, t, x_t, generator=seeded(0), return_dict=False)[0]
        for t in (2, scheduler.timesteps[1], torch.tensor([2]), torch.tensor([2, 2, 2]))
    ]
    for step in steps[1:]:
        torch.testing.assert_close(step, steps[0])


def test_output_is_a_dataclass_or_an_equal_tuple():
    scheduler = DDGANScheduler()
    x_0, x_t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    output = scheduler.step(x_0, 1, x_t, generator=seeded(0))
    as_tuple = scheduler.step(x_0, 1, x_t, seeded(0), False)  # in the order of Diffusers' schedulers
    assert isinstance(output, DDGANSchedulerOutput)
    assert type(as_tuple) is tuple
    assert torch.equal(output.prev_sample, as_tuple[0])
    assert torch.equal(output.pred_original_sample, as_tuple[1])


def test_gradient_of_a_step_reaches_the_prediction():
    x_0 = torch.randn(2, 3, 4, 4, requires_grad=True)
    DDGANScheduler().step(x_0, torch.tensor([0, 2]), torch.randn(2, 3, 4, 4)).prev_sample.sum().backward()
    torch.testing.assert_close(x_0.grad[0], torch.ones(3, 4, 4))
    assert 0 < x_0.grad[1].unique().item() < 1


def test_saved_and_loaded_scheduler_is_the_same(tmp_path):
    config = {
        "num_train_timesteps": 8,
        "beta_min": 0.02,
        "beta_max": 0.6,
        "variance_schedule": "geometric",
        "eps": 1e-2,
        "prediction_type": "v_prediction",
        "clip_sample": True,
    }
    scheduler = DDGANScheduler(**config)
    scheduler.save_pretrained(tmp_path)
    loaded = DDGANScheduler.from_pretrained(tmp_path)
    assert {name: loaded.config[name] for name in config} == config
    assert torch.equal(loaded.betas, scheduler.betas)
    assert DDGANScheduler.from_config(scheduler.config).config == scheduler.config


def test_scheduler_follows_the_conventions_of_diffusers():
    scheduler = DDGANScheduler()
    sample = torch.randn(1, 3, 4, 4)
    assert scheduler.scale_model_input(sample, 3) is sample
    assert scheduler.init_noise_sigma == 1.0
    assert scheduler.order == 1
    assert len(scheduler) == 4
    assert scheduler.compatibles == []
    scheduler.set_timesteps(2, device="meta")
    assert scheduler.timesteps.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_samples_on_the_gpu_are_those_of_the_cpu():
    scheduler = DDGANScheduler()
    x_0, x_t, t = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.tensor([0, 2, 3])
    results = {}
    for device in ("cpu", "cuda"):
        scheduler.set_timesteps(device=device)
        a, b = x_0.to(device), x_t.to(device)
        step = scheduler.step(a, scheduler.timesteps[1], b, generator=seeded(0), return_dict=False)
        each = scheduler.step(a, t.to(device), b, generator=seeded(0), return_dict=False)
        results[device] = [*step, *each, scheduler.add_noise(a, b, t), *scheduler.add_noise_pair(a, t, seeded(0))]
    for cpu, gpu in zip(results["cpu"], results["cuda"], strict=True):
        assert gpu.device.type == "cuda"
        torch.testing.assert_close(gpu.cpu(), cpu)
