"""Loading of pipelines and exchange of schedulers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny import level_difference, tiny_pipeline, tiny_unet

from ddgan import DDGANScheduler
from ddgan.core.errors import InputError
from ddgan.core.locations import InMemory
from ddgan.sampling.generation import sample
from ddgan.sampling.loading import load_pipeline, with_scheduler
from ddgan.training.start_model import load_start_model

CUSTOM_PIPELINE = '''
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class ShadePipeline(DiffusionPipeline):
    """Noise around a gray level that depends on the class."""

    def __init__(self, scheduler):
        super().__init__()
        self.register_modules(scheduler=scheduler)

    def __call__(self, batch_size=1, class_labels=None, generator=None, output_type="pil"):
        noise = randn_tensor((batch_size, 8, 8, 3), generator=generator)
        shade = torch.tensor(class_labels or [0] * batch_size).view(-1, 1, 1, 1) / 10
        return ImagePipelineOutput(images=(shade + 0.05 * noise.tanh()).clamp(0, 1).numpy())
'''


@pytest.fixture
def custom_folder(tmp_path):
    """A pipeline folder with custom code."""
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    index = {"_class_name": ["pipeline_shade", "ShadePipeline"], "scheduler": ["diffusers", "DDPMScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_diffusers_version": "0.42.1"}))
    (tmp_path / "pipeline_shade.py").write_text(CUSTOM_PIPELINE)
    return tmp_path


@pytest.mark.parametrize("name", ["dpmsolver", "unipc"])
@pytest.mark.parametrize("clips", [True, False])
def test_solvers_for_latents_clip_if_the_saved_scheduler_clips(name, clips):
    scheduler = with_scheduler(tiny_pipeline(DDPMScheduler(clip_sample=clips)), name).scheduler
    scheduler.set_timesteps(5)
    far = torch.full((1, 3, 8, 8), 9.0)
    scheduler.step(far, scheduler.timesteps[0], -far)
    predicted_clean = scheduler.model_outputs[-1]
    assert (predicted_clean.abs().max() <= 1) == clips


def test_with_scheduler_does_not_change_the_pipeline():
    pipe = tiny_pipeline()
    other = with_scheduler(pipe, "euler")
    assert type(pipe.scheduler) is DDPMScheduler and other.unet is pipe.unet
    assert with_scheduler(pipe, "as-saved") is pipe


def test_a_custom_noise_process_is_not_replaced():
    pipe = tiny_pipeline(DDGANScheduler())
    with pytest.raises(InputError, match="DDGANScheduler"):
        with_scheduler(pipe, "ddim")
    assert sample(with_scheduler(pipe, "as-saved"), [0])[0].size == (8, 8)


def test_custom_code_runs_only_if_trusted(custom_folder):
    with pytest.raises(InputError, match="--trust_remote_code"):
        load_pipeline(str(custom_folder))
    pipe = load_pipeline(str(custom_folder), trust_remote_code=True)
    dark, bright = sample(pipe, [0, 1], class_labels=[2, 8])
    assert abs(np.asarray(dark).mean() - 51) < 5 and abs(np.asarray(bright).mean() - 204) < 5
    assert level_difference(bright, sample(pipe, [1], class_labels=[8])[0]) == 0
    with pytest.raises(InputError, match="num_inference_steps"):
        sample(pipe, [0], num_inference_steps=5)


def test_a_folder_without_a_pipeline_is_named(tmp_path):
    with pytest.raises(InputError, match=r"model_index\.json"):
        load_pipeline(str(tmp_path))


@pytest.mark.parametrize("name", ["nobody/nothing", "./nothing", "a/b/c"])
def test_a_missing_pipeline_is_reported_with_the_places_searched(name):
    with pytest.raises(InputError, match=rf"No pipeline {name} .*folder.*Hub") as error:
        load_pipeline(name)
    assert "\n" not in str(error.value)


def test_files_missing_in_the_cache_are_reported_with_the_reason(local_hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    Path(constants.HF_HUB_CACHE, "models--ann--half").mkdir(parents=True)
    local_hub.stop()
    with pytest.raises(InputError, match=r"No pipeline ann/half was found: .*the Hugging Face Hub cannot be reached"):
        load_pipeline("ann/half")


def test_offline_mode_is_named_as_the_reason(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"is not contacted because HF_HUB_OFFLINE is set, .*unset HF_HUB_OFFLINE\."):
        load_pipeline("ann/model")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model_index.json", '{"_class_name": 5}'),
        ("model_index.json", '{"_class_name": []}'),
        ("model_index.json", '{"_class_name": null}'),
        ("model_index.json", "[1]"),
        ("model_index.json", "[" * 20_000),
        ("model_index.json", "{}"),
        ("unet/config.json", "[]"),
        ("unet/config.json", '{"block_out_channels": "a"}'),
        ("scheduler/scheduler_config.json", '{"num_train_timesteps": -1}'),
        ("unet/diffusion_pytorch_model.safetensors", "damaged"),
    ],
)
def test_damaged_pipeline_folders_are_reported_in_one_paragraph(tmp_path, file, content):
    tiny_pipeline().save_pretrained(tmp_path)
    (tmp_path / file).write_text(content)
    damaged = "/[a-z/]+_?[a-z]+.json is damaged: it is (not a JSON object|not valid JSON|an empty JSON object)"
    with pytest.raises(InputError, match=f"{tmp_path}( cannot be loaded: .| is not a pipeline folder|{damaged})"):
        load_pipeline(str(tmp_path))
    with pytest.raises(InputError, match=f"{tmp_path}( cannot be loaded| is not a pipeline folder| is a |{damaged})"):
        load_start_model(str(tmp_path))


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_a_config_that_is_not_a_json_object_is_named(tmp_path, file):
    tiny_pipeline().save_pretrained(tmp_path)
    (tmp_path / file).write_text("[]")
    with pytest.raises(InputError, match=f"{tmp_path}/{file} is damaged: it is not a JSON object"):
        load_pipeline(str(tmp_path))


def test_tensors_missing_in_the_weights_are_named(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for name in ("conv_in.bias", "conv_out.bias"):
        del tensors[name]
        save_file(tensors, file, {"format": "pt"})
        more = "" if name == "conv_in.bias" else " and 1 more"
        match = rf"unet of the pipeline {tmp_path} is incomplete: its weights lack conv_in\.bias{more}\."
        with pytest.raises(InputError, match=match):
            load_pipeline(str(tmp_path))


def test_an_unknown_prediction_type_is_refused(tmp_path):
    tiny_pipeline(DDPMScheduler(prediction_type="zzz")).save_pretrained(tmp_path)
    message = "prediction_type in the config of the scheduler of the pipeline {} is 'zzz'; it must be one of epsilon"
    with pytest.raises(InputError, match=message.format(tmp_path)):
        load_pipeline(str(tmp_path))
    in_memory = InMemory(tiny_pipeline(DDPMScheduler(prediction_type="zzz")))
    with pytest.raises(InputError, match=message.format(r".*\(in memory\)")):
        load_pipeline(in_memory)


@pytest.mark.parametrize("kind", [PNDMScheduler, HeunDiscreteScheduler, EulerAncestralDiscreteScheduler])
def test_a_prediction_type_that_the_scheduler_does_not_support_is_refused_when_it_is_loaded(kind, tmp_path):
    tiny_pipeline(kind(prediction_type="sample")).save_pretrained(tmp_path)
    before = torch.get_rng_state()
    if kind is HeunDiscreteScheduler:  # supports it
        load_pipeline(str(tmp_path))
    else:
        with pytest.raises(InputError, match=rf"is 'sample', which a {kind.__name__} does not support"):
            load_pipeline(str(tmp_path))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_prediction_type_that_another_scheduler_does_not_support_is_refused():
    pipe = tiny_pipeline(DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True))
    with pytest.raises(InputError, match="is 'flow_prediction', which a DDIMScheduler does not support"):
        with_scheduler(pipe, "ddim")


@pytest.mark.parametrize("values", [{}, {"_class_name": "DDPMScheduler", "_diffusers_version": "0.42.1"}])
def test_a_scheduler_config_without_values_is_refused(values, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"config of the scheduler of the pipeline .* has no values"):
        load_pipeline(str(tmp_path))
    assert load_pipeline(InMemory(tiny_pipeline(DDPMScheduler()))), "an object with the defaults"


def test_a_broken_pipeline_folder_is_not_looked_for_on_the_hub(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be loaded"):
        load_pipeline(str(tmp_path))


def test_weights_in_half_precision_alone_are_loaded(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path, variant="fp16")
    loaded = load_pipeline(str(tmp_path))
    assert loaded.unet.dtype == torch.float32
    assert torch.equal(loaded.unet.conv_in.weight, pipe.unet.conv_in.weight)
    for path in (tmp_path / "unet").glob("*.safetensors"):
        path.unlink()
    with pytest.raises(InputError, match=r"no file named diffusion_pytorch_model\.\w+ found"):
        load_pipeline(str(tmp_path))


def test_loaded_weights_are_aligned_like_those_in_memory(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    for component in load_pipeline(str(tmp_path)).components.values():
        if isinstance(component, torch.nn.Module):
            assert all(parameter.data_ptr() % 64 == 0 for parameter in component.parameters())


def test_ddim_pipelines_load_and_sample(tmp_path):
    DDIMPipeline(tiny_unet().eval(), DDIMScheduler()).save_pretrained(tmp_path)
    assert sample(load_pipeline(str(tmp_path)), [0], 4)[0].size == (8, 8)


def test_a_gated_repository_is_reported_with_the_steps_to_get_access(local_hub):
    local_hub.add("bob/faces", **{"model_index.json": b'{"_class_name": "DDPMPipeline"}'})
    local_hub.repos["model", "bob/faces"].gated = True
    with pytest.raises(InputError, match=r"bob/faces is gated\. Accept its terms"):
        load_pipeline("bob/faces")
