"""Few-step pipelines use the number of steps that they were trained for, and warn about any other."""

import pytest
from diffusers import DDPMPipeline
from tiny import few_step_scheduler, tiny_pipeline, tiny_unet

from ddgan import ClassConditionalPipeline, GuidedPipeline, SymmetryLoss
from ddgan.sampling.generation import sample
from ddgan.sampling.loading import load_pipeline, with_scheduler
from ddgan.sampling.steps import trained_steps

# pipelines by kind, and the further arguments that each needs
KINDS = {
    "plain": (DDPMPipeline, {}, {}),
    "class-conditional": (ClassConditionalPipeline, {"num_class_embeds": 2}, {"class_labels": [1]}),
    "guided": (GuidedPipeline, {}, {"loss": SymmetryLoss()}),
}


def steps_of(caplog) -> list[str]:
    return [message.partition("; ")[2].partition(" may")[0] for message in caplog.messages]


@pytest.mark.parametrize("kind", KINDS)
def test_the_trained_number_of_steps_is_the_default_and_others_have_one_warning(kind, tmp_path, caplog):
    pipeline_class, config, options = KINDS[kind]
    pipeline_class(tiny_unet(**config), few_step_scheduler(3, 2)).save_pretrained(tmp_path)
    pipe = load_pipeline(str(tmp_path))
    assert type(pipe) is pipeline_class and trained_steps(pipe) == [3, 2]

    def steps(pipe, *number) -> int:
        sample(pipe, [0], *number, **options)
        return len(pipe.scheduler.timesteps)

    assert [steps(pipe), steps(pipe, 2)] == [3, 2] and not caplog.messages
    ddim = with_scheduler(pipe, "ddim")
    assert [steps(pipe, 5), steps(pipe, 5), steps(ddim), steps(ddim)] == [5, 5, 3, 3]
    assert caplog.messages[0] == (
        "This pipeline was trained for num_inference_steps=3 or 2 with DDPMScheduler (posterior steps); "
        "num_inference_steps=5 with DDPMScheduler may give worse images."
    )
    assert steps_of(caplog) == ["num_inference_steps=5 with DDPMScheduler", "num_inference_steps=3 with DDIMScheduler"]


def test_pipelines_know_their_number_of_steps_without_sample():
    unet = tiny_unet(num_class_embeds=2)
    for pipe in (ClassConditionalPipeline(unet, few_step_scheduler(2)), GuidedPipeline(unet, few_step_scheduler(2))):
        pipe.set_progress_bar_config(disable=True)
        loss = {"loss": SymmetryLoss()} if isinstance(pipe, GuidedPipeline) else {}
        pipe(class_labels=1, **loss)
        assert len(pipe.scheduler.timesteps) == 2


def test_a_guided_pipeline_keeps_the_number_of_steps(tmp_path):
    guided = GuidedPipeline.from_pipe(DDPMPipeline(tiny_unet(), few_step_scheduler(2)))
    guided.save_pretrained(tmp_path)
    assert trained_steps(guided) == trained_steps(GuidedPipeline.from_pretrained(tmp_path)) == [2]
    assert trained_steps(tiny_pipeline()) == []
