"""Claims about the samples of the start model from which few-step fine-tuning learns."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from tiny import tiny_classes, tiny_unet

from ddgan import ClassConditionalPipeline, ClassConditionedUnet
from ddgan.core.errors import RunError
from ddgan.training import teacher as teacher_module
from ddgan.training.objectives.few_step import FewStepProcess, FewStepSetup, GeneratorObjective, TeacherSamples
from ddgan.training.objectives.micro_batch import MicroBatch
from ddgan.training.randomness import PerSampleRNG, fold_in
from ddgan.training.start_model import remove_learned_variance
from ddgan.training.teacher import Teacher, generate_samples

CPU = torch.device("cpu")


def tiny_teacher(counts=(4, 2), steps=20, guidance_scale=1.0, unet=None, **config) -> Teacher:
    scheduler = DDPMScheduler(timestep_spacing="trailing", **config)
    pipeline_class = ClassConditionalPipeline if isinstance(unet, ClassConditionedUnet) else DDPMPipeline
    pipeline = pipeline_class(unet or tiny_unet(), scheduler)
    return Teacher(pipeline, FewStepProcess(scheduler, counts), steps, guidance_scale)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "learned variance"])
def test_samples_are_those_of_ddim(prediction_type):
    unet = tiny_unet(out_channels=6 if prediction_type == "learned variance" else 3)
    prediction_type = "epsilon" if prediction_type == "learned variance" else prediction_type
    ddim = DDIMScheduler(prediction_type=prediction_type, timestep_spacing="trailing")
    ddim.set_timesteps(20)
    sample = PerSampleRNG([fold_in(5, index) for index in range(2, 5)], CPU).normal(3, 8, 8)
    path = []
    for t in ddim.timesteps:
        path.append(sample)
        with torch.no_grad():
            output = unet(sample, t).sample[:, :3]
        sample = ddim.step(output, t, sample, use_clipped_model_output=True).prev_sample

    remove_learned_variance(unet)
    teacher = tiny_teacher(unet=unet, prediction_type=prediction_type)
    samples = teacher.sample(range(2, 5), 5, CPU)
    assert teacher.timesteps == ddim.timesteps.tolist()
    assert teacher.process.timesteps.tolist() == ddim.timesteps[::5].tolist()
    tolerance = {"rtol": 2e-3, "atol": 2e-3}  # of float16, and of 157 times the noise for a network that predicts it
    torch.testing.assert_close(samples["noisy"].float(), torch.stack(path[::5], dim=1), **tolerance)
    torch.testing.assert_close(samples["images"].float(), sample, **tolerance)


@pytest.mark.parametrize(
    ("counts", "steps", "levels", "expected"),
    [
        ([4, 2], 1, 1000, [999, 749, 499, 249]),
        ([2], 6, 1000, [999, 832, 666, 499, 332, 166]),
        ([3, 2], 3, 6, [5, 3, 2, 1]),
        ([1], 20, 5, [4, 3, 2, 1, 0]),
    ],
)
def test_the_timesteps_of_the_transitions_are_among_those_of_the_teacher(counts, steps, levels, expected):
    teacher = tiny_teacher(counts, steps, num_train_timesteps=levels)
    assert teacher.timesteps == expected
    assert set(teacher.process.timesteps.tolist()) <= set(expected)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_classes_alternate_and_guidance_extrapolates_from_the_null_class(scale):
    unet = tiny_classes(class_dropout=0.5)
    teacher = tiny_teacher([1], 1, scale, unet, prediction_type="sample")
    samples = teacher.sample(range(12), 0, CPU)
    labels = samples["labels"]
    assert 0 < (labels == 3).sum() < 12
    assert all(label in (i % 3, 3) for i, label in enumerate(labels.tolist()))
    noise, t = samples["noisy"][:, 0].float(), torch.full((12,), 999)
    with torch.no_grad():
        image, unconditional = (unet(noise, t, some).sample for some in (labels, torch.full_like(labels, 3)))
    expected = (unconditional + scale * (image - unconditional)).clamp(-1, 1)
    torch.testing.assert_close(samples["images"].float(), expected, rtol=0, atol=5e-3)  # of float16
    assert ((image - unconditional).abs().amax((1, 2, 3)) > 0.05).equal(labels != 3)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_distillation_is_finished_where_the_teacher_takes_a_single_step(prediction_type):
    teacher = tiny_teacher([1], 1, prediction_type=prediction_type)
    unet = teacher.pipeline.unet
    torch.nn.init.normal_(unet.conv_out.weight, std=0.02)  # no image is clipped
    objective = GeneratorObjective(FewStepSetup(unet, None, teacher.process), 1, 1.0)
    tensors = teacher.sample(range(8), 0, CPU)
    batch = [torch.zeros(8, 3, 8, 8), None, PerSampleRNG(range(8), CPU), 0]
    objective.teacher = TeacherSamples(teacher.process.timesteps, **tensors)
    assert objective(unet, MicroBatch(*batch))["loss"].max() < 1e-5  # of float16
    assert tensors["images"].float().square().mean() > 1e-3


@pytest.fixture
def generate(tmp_path, monkeypatch):
    """Return a function that generates samples in tmp_path, and the indices of the samples that it generated."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, generated, sample = Accelerator(cpu=True), [], Teacher.sample

    def recorded(self, indices, *args):
        generated.extend(indices)
        return sample(self, indices, *args)

    file = tmp_path / "run" / "teacher.safetensors"

    def generate(teacher, count=20, seed=0, path=file):
        generated.clear()
        samples = generate_samples(teacher, count, seed, path, accelerator)
        return samples, list(generated)

    monkeypatch.setattr(Teacher, "sample", recorded)
    return generate


def equal(a: TeacherSamples, b: TeacherSamples) -> bool:
    return torch.equal(a.noisy, b.noisy) and torch.equal(a.images, b.images)


@pytest.mark.parametrize("how", ["truncated", "changed", "empty", "of no kind"])
def test_samples_are_read_from_their_file_if_it_is_intact(generate, tmp_path, caplog, how):
    teacher, file = tiny_teacher(steps=4), tmp_path / "run" / "teacher.safetensors"
    first, generated = generate(teacher)
    assert generated == list(range(32))  # two batches
    batches = [teacher.sample(range(start, start + 16), 0, CPU) for start in (0, 16)]
    for name in ("noisy", "images"):
        assert torch.equal(getattr(first, name), torch.cat([batch[name] for batch in batches])[:20])
    again, generated = generate(teacher)
    assert equal(again, first) and not generated and not caplog.messages
    content = file.read_bytes()
    changed = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    damaged = {"truncated": content[:-1], "changed": changed, "empty": b"", "of no kind": b"teacher"}
    file.unlink()  # it is mapped into memory
    file.write_bytes(damaged[how])
    again, generated = generate(teacher)
    assert equal(again, first) and generated
    assert caplog.messages == [f"{file} is damaged; its samples of the start model are generated again."]


def test_samples_generated_before_an_interruption_are_kept(generate, monkeypatch, tmp_path):
    monkeypatch.setattr(teacher_module, "_WRITE_INTERVAL", -1)
    teacher, recorded = tiny_teacher(steps=4), Teacher.sample

    def interrupted(self, indices, *args):
        if 32 in indices:
            raise KeyboardInterrupt
        return recorded(self, indices, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "sample", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(teacher, 40)
    resumed, generated = generate(teacher, 40)
    assert generated == list(range(32, 48))
    undisturbed, _ = generate(teacher, 40, path=tmp_path / "other.safetensors")
    assert equal(resumed, undisturbed)


@pytest.mark.parametrize("change", ["weights", "steps", "transitions", "count", "seed"])
def test_a_file_with_other_samples_is_replaced(generate, change):
    first, _ = generate(tiny_teacher(steps=4), 4)
    teacher = tiny_teacher((2, 1) if change == "transitions" else (4, 2), 8 if change == "steps" else 4)
    if change == "weights":
        torch.nn.init.normal_(teacher.pipeline.unet.conv_out.bias)
    samples, generated = generate(teacher, 3 if change == "count" else 4, int(change == "seed"))
    assert generated and not equal(samples, first)


def test_samples_that_cannot_be_written_end_the_run_with_the_flag_that_helps(generate, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"could not be written to .*teacher.safetensors: .*--teacher_samples"):
        generate(tiny_teacher(steps=4), 4, path=tmp_path / "file" / "teacher.safetensors")
