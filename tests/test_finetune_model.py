"""Claims about finetune_model.py: results that load anywhere, and clear errors."""

import json
import os
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from tiny import (
    ROOT,
    finetune_flags,
    largest_difference,
    make_dataset,
    run_script,
    tiny_pipeline,
    tiny_unet,
    weights,
    write_images,
)
from torch._dynamo.testing import CompileCounter

from ddgan.core.errors import InputError, RunError, run_command
from ddgan.hub.publication import snapshot
from ddgan.training.checkpoints import Checkpoints
from ddgan.training.loop import Trainer
from ddgan.training.tracking import read_metrics

COURSE_FLAGS = """--image_size 16 --batch_size 8 --num_epochs 16 --grad_accumulation_steps 2 --start_model {model}
 --dataset_name {data} --wandb_project dm-finetune --log_samples_every 100 --save_model_every 1000
 --model_save_name vintageface"""


def saved_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "unet" / "diffusion_pytorch_model.safetensors")


def test_a_run_folder_has_the_documented_files(finetune):
    run = finetune("run", "--log_samples_every", 2, "--checkpointing_steps", 2)
    files = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    expected = {"model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "README.md"}
    expected |= {"scheduler/scheduler_config.json", "metrics.csv", "loss.png", "before_after.png", "config.yaml"}
    expected |= {f"samples/step-{step:08d}.png" for step in (0, 2, 4)}
    assert expected <= files
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-00000002", "step-00000004"}
    rows = read_metrics(run / "metrics.csv")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["images"] for row in rows] == [8, 13, 21, 26]
    assert [row["epoch"] for row in rows] == pytest.approx([8 / 13, 1, 1 + 8 / 13, 2])
    before, after = (np.asarray(Image.open(run / "samples" / f"step-{step:08d}.png")) for step in (0, 4))
    assert before.shape == after.shape
    assert (before != after).any()


def test_the_card_describes_the_run_and_its_snippet_works(finetune, monkeypatch):
    run = finetune("run", "--min_snr_gamma", 5)
    card = ModelCard.load(run / "README.md")
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert card.data.base_model is None  # a local folder is not a model on the Hub
    for text in (
        "| data | thirteen, 13 images |",
        "4 of 4 optimizer steps, 2 epochs",
        "| network | UNet2DModel, 45,259 parameters |",
        "| image size | 8x8, 3 channels |",
        "| min_snr_gamma | 5.0 |",
    ):
        assert text in card.content
    assert str(run.parent) not in card.content
    for path in [*run.glob("*.json"), *run.glob("*/*.json")]:
        assert "/tmp" not in path.read_text()
        assert str(run.parent) not in path.read_text()
    for line in card.content.splitlines():
        if line.startswith("!["):
            assert (run / line.split("](")[1].rstrip(")")).exists()
    snippet = card.content.split("```python\n")[1].split("```")[0]
    names = {}
    monkeypatch.chdir(run.parent)
    exec(snippet, names)
    assert names["image"].size == (8, 8)


def test_the_flags_of_the_course_work(tiny_model, tmp_path, monkeypatch):
    from accelerate.state import AcceleratorState

    pytest.importorskip("wandb", reason="the extra [wandb] is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    from ddgan import finetune_model

    make_dataset(tmp_path / "faces", 20)
    finetune_model.main([*COURSE_FLAGS.format(model=tiny_model, data="faces").split(), "--sample_steps", "2"])
    config = yaml.safe_load((tmp_path / "vintageface" / "config.yaml").read_text())
    assert config["report_to"] == "wandb"
    assert any(path.is_file() for path in (tmp_path / "vintageface" / "wandb").rglob("*"))
    assert len(read_metrics(tmp_path / "vintageface" / "metrics.csv")) == 16 * 2
    assert DDPMPipeline.from_pretrained("vintageface").unet.config.sample_size == 16


def test_model_config_trains_from_scratch(tiny_model, images, tmp_path):
    from ddgan import finetune_model

    flags = finetune_flags(tiny_model, images, tmp_path)[2:]  # without the start model
    runs = {}
    for name, config in {"file": tiny_model / "unet" / "config.json", "pipeline": tiny_model}.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        output = ["--output_dir", str(tmp_path / name), "--image_size", "16", "--seed", "1"]
        finetune_model.main([*flags, "--model_config", str(config), *output, "--prediction_type", "v_prediction"])
        runs[name] = weights(tmp_path / name)
    assert largest_difference(runs["file"], runs["pipeline"]) == 0
    pretrained = load_file(tiny_model / "unet" / "diffusion_pytorch_model.safetensors")
    assert largest_difference(runs["file"], pretrained) > 0.1
    pipe = DDPMPipeline.from_pretrained(tmp_path / "file")
    assert pipe.unet.config.sample_size == 16
    config = pipe.scheduler.config
    assert (config.prediction_type, config.timestep_spacing) == ("v_prediction", "trailing")
    card = ModelCard.load(tmp_path / "file" / "README.md")
    assert "trained from scratch on thirteen" in card.content and "fine-tuned" not in card.data.tags


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "describes a UNet2DConditionModel"),
        ({"block_out_channels": [8]}, "is not the config of a UNet2DModel: "),
        ({"class_embed_type": "timestep"}, "is class-conditional"),
        ({"in_channels": 7}, "takes 7 channels"),
        ({"time_embedding_type": "fourier"}, "takes the logarithm of a noise level of a VE process"),
        ({"out_channels": 5}, "takes 3 channels and returns 5; it must return as many, or twice as many"),
        ({"sample_size": "8"}, "sample_size .* is '8'; it must be a positive integer"),
        ({"sample_size": -8}, "sample_size .* is -8; it must be a positive integer"),
        ([1], "describes a list"),
        ("{", "cannot be read"),
    ],
)
def test_configs_of_other_models_are_refused(tmp_path, images, config, message):
    from ddgan import finetune_model

    path = tmp_path / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(InputError, match=message):
        finetune_model.main([*finetune_flags(path, images, tmp_path / "run")[2:], "--model_config", str(path)])


def test_the_optimizer_takes_its_settings_and_a_resumed_run_its_own(finetune, monkeypatch):
    seen = []
    train_step = Trainer._train_step

    def step(trainer, batches):
        (group,) = trainer.networks[0].optimizer.param_groups
        seen.append((group["betas"], group["weight_decay"], group["eps"]))
        train_step(trainer, batches)

    monkeypatch.setattr(Trainer, "_train_step", step)
    first = ["--adam_beta1", 0.5, "--adam_beta2", 0.9, "--adam_weight_decay", 0.1, "--adam_epsilon", 1e-6]
    finetune("run", "--num_epochs", 1, *first)
    finetune("run", "--num_epochs", 2, "--resume_from_checkpoint", "latest")
    assert seen == [((0.5, 0.9), 0.1, 1e-6)] * 2 + [((0.9, 0.999), 0.01, 1e-8)] * 2


def test_config_yaml_repeats_the_run_and_flags_override_it(finetune, tmp_path):
    first = finetune("first", "--seed", 7, "--random_flip", "--freeze", "all_but_attention", "--ema_power", 0.5)
    again = finetune("again", "--config", first / "config.yaml", "--output_dir", tmp_path / "again")
    assert largest_difference(weights(first), weights(again)) == 0
    other = finetune("other", "--config", first / "config.yaml", "--output_dir", tmp_path / "other", "--seed", 8)
    assert largest_difference(weights(first), weights(other)) > 0


@pytest.mark.parametrize(
    ("part", "trained"),
    [("all_but_attention", "attentions."), ("all_but_norms", "norm"), ("all_but_up_blocks", "up_blocks.")],
)
def test_freeze_trains_one_part_and_keeps_the_rest_bit_identical(finetune, tiny_model, part, trained):
    before, after = saved_weights(tiny_model), saved_weights(finetune("run", "--freeze", part))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(trained in name or name.startswith(("conv_norm_out", "conv_out")) for name in changed)
    assert any(trained in name for name in changed)


@pytest.mark.parametrize("flags", ["--prediction_type v_prediction", "--min_snr_gamma 0.1", "--mixed_precision bf16"])
def test_settings_of_the_loss_change_it(finetune, flags):
    plain, run = finetune("plain"), finetune("run", *flags.split())
    assert read_metrics(plain / "metrics.csv")[0]["loss"] != read_metrics(run / "metrics.csv")[0]["loss"]


def test_another_prediction_type_is_saved_in_the_scheduler(finetune):
    run = finetune("run", "--prediction_type", "v_prediction")
    assert json.loads((run / "scheduler" / "scheduler_config.json").read_text())["prediction_type"] == "v_prediction"


def test_samples_come_from_the_named_scheduler(finetune):
    grids = [
        np.asarray(Image.open(finetune(name, "--sample_scheduler", name) / "samples" / "step-00000004.png"))
        for name in ("ddim", "dpmsolver")
    ]
    assert (grids[0] != grids[1]).any()


def test_without_ema_the_trained_weights_are_saved(finetune):
    run = finetune("run", "--ema_decay", 0, "--channels_last")
    assert largest_difference(saved_weights(run), weights(run)) == 0


def test_gradient_checkpointing_and_channels_last_change_how_the_network_runs_and_not_its_loss(
    finetune, monkeypatch, tmp_path
):
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path / "no-dropout")
    seen, train_step = {}, Trainer._train_step

    def step(trainer, batches):
        unet = trainer.networks[0].spec.network
        is_channels_last = unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        seen[trainer.folder.path.name] = unet.is_gradient_checkpointing, is_channels_last
        train_step(trainer, batches)

    monkeypatch.setattr(Trainer, "_train_step", step)
    runs = [
        finetune(name, *flags, "--start_model", tmp_path / "no-dropout", "--max_train_steps", 1)
        for name, flags in (
            ("plain", []),
            ("checkpointed", ["--gradient_checkpointing"]),
            ("last", ["--channels_last"]),
        )
    ]
    assert seen == {"plain": (False, False), "checkpointed": (True, False), "last": (False, True)}
    first, *others = (read_metrics(run / "metrics.csv")[0] for run in runs)
    for other in others:
        assert (other["loss"], other["grad_norm"]) == pytest.approx((first["loss"], first["grad_norm"]), rel=1e-5)


def test_gradients_are_clipped_to_the_norm(finetune, tiny_model):
    # with a large epsilon and the same learning rate, the first step of Adam is the gradient itself
    flags = ("--max_train_steps", 1, "--lr_scheduler", "constant", "--learning_rate", 1e6, "--adam_epsilon", 1e6)
    run = finetune("run", *flags, "--adam_weight_decay", 0, "--max_grad_norm", 0.05)
    start, trained = load_file(tiny_model / "unet" / "diffusion_pytorch_model.safetensors"), weights(run)
    moved = torch.cat([(trained[name] - start[name]).flatten() for name in start]).norm().item()
    assert moved == pytest.approx(0.05, rel=0.01)
    assert read_metrics(run / "metrics.csv")[0]["grad_norm"] > 0.05


def test_compile_trains_the_same_network_and_saves_plain_names(finetune, monkeypatch):
    graphs = CompileCounter()  # the test is that training uses the graph, not the compiler
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    plain = finetune("plain", "--max_train_steps", 2)
    assert graphs.frame_count == 0
    compiled = finetune("compiled", "--max_train_steps", 2, "--compile")
    assert graphs.frame_count > 0
    assert largest_difference(saved_weights(compiled), saved_weights(plain)) < 1e-6


@pytest.mark.parametrize("how", ["flag", "accelerate"])
def test_compiled_and_plain_runs_resume_each_other_bit_identically(finetune, monkeypatch, how):
    # the graph is what is tested; compiled kernels would round differently from those of the plain network
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))

    def run(name, is_compiled, *flags):
        with monkeypatch.context() as patches:
            if is_compiled and how == "accelerate":
                patches.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
            compiled = ["--compile"] if is_compiled and how == "flag" else []
            return finetune(name, "--lr_scheduler", "constant", *flags, *compiled)

    whole = run("whole", False, "--max_train_steps", 3)
    for step, is_compiled in enumerate((True, False, True), 1):
        parts = run("parts", is_compiled, "--max_train_steps", step, "--resume_from_checkpoint", "latest")
    assert largest_difference(saved_weights(whole), saved_weights(parts)) == 0
    assert largest_difference(weights(whole), weights(parts)) == 0


@pytest.mark.parametrize("channels", [1, 4])
def test_models_of_other_channels_take_color_images(finetune, tmp_path, channels):
    model = tmp_path / "model"
    unet = tiny_unet(in_channels=channels, out_channels=channels)
    DDIMPipeline(unet, DDIMScheduler(prediction_type="v_prediction")).save_pretrained(model)
    run = finetune("run", "--start_model", model)
    pipe = DiffusionPipeline.from_pretrained(run)
    assert type(pipe) is DDPMPipeline
    assert pipe.unet.config.in_channels == channels
    assert pipe.scheduler.config.prediction_type == "v_prediction"  # the same as the start model


def test_another_size_is_trained_saved_and_sampled(finetune, tmp_path):
    run = finetune("run", "--resolution", 8, 16)
    pipe = DDPMPipeline.from_pretrained(run)
    assert pipe(num_inference_steps=1).images[0].size == (16, 8)


def test_tensorboard_gets_numbers_and_images(finetune):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = finetune("run", "--report_to", "tensorboard")
    events = next(path for path in (run / "logs").rglob("events*") if path.parent.name == "run")
    tracked = EventAccumulator(str(events)).Reload()
    assert tracked.Scalars("loss")[-1].value == pytest.approx(read_metrics(run / "metrics.csv")[-1]["loss"])
    assert [event.step for event in tracked.Images("samples")] == [0, 4]


def test_trackio_starts_offline(finetune):
    pytest.importorskip("trackio", reason="trackio is not installed")
    finetune("run", "--report_to", "trackio")
    assert any(path.is_file() for path in Path(os.environ["TRACKIO_DIR"]).rglob("*"))


def test_a_tracker_that_is_not_installed_is_reported_before_training(finetune, monkeypatch, tmp_path):
    monkeypatch.setattr("ddgan.training.tracking.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--report_to wandb needs .*pip install 'wandb>="):
        finetune("run", "--report_to", "wandb")
    assert not (tmp_path / "run").exists()


def test_a_stream_is_trained_on_stopped_and_resumed_exactly(finetune, tmp_path):
    folder = make_dataset(tmp_path / "streamed", 30, shards=2)
    flags = ("--dataset_name", folder, "--streaming", "--checkpointing_steps", 3)
    straight = finetune("straight", *flags, "--max_train_steps", 8, "--lr_scheduler", "constant")
    short = finetune("resumed", *flags, "--max_train_steps", 3, "--lr_scheduler", "constant")
    resume = ("--resume_from_checkpoint", "latest")
    finetune("resumed", *flags, "--max_train_steps", 8, "--lr_scheduler", "constant", *resume)
    assert largest_difference(weights(straight), weights(short)) == 0
    assert (straight / "metrics.csv").read_text() == (short / "metrics.csv").read_text()
    with pytest.raises(InputError, match="--max_train_steps"):
        finetune("endless", *flags)
    checkpoints = Checkpoints(straight / "checkpoints", 0, Accelerator(), [], {"processes": 2})
    with pytest.raises(InputError, match=r"processes = 1, but this run has 2, .* its own position in the stream"):
        checkpoints.check(checkpoints.path(8), 8)


# ---- clear errors


def test_errors_are_one_paragraph_without_a_traceback(tiny_model, images, tmp_path):
    done = run_script(
        ROOT / "finetune_model.py", *finetune_flags(tiny_model, images, tmp_path / "run", "--image_size", "9")
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "multiples of 2; 9 x 9 is not. The nearest possible sizes are 8 x 8 and 10 x 10." in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_unwritable_output_dir_is_reported_in_one_paragraph(finetune, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        run_command(lambda: finetune("run", "--output_dir", tmp_path / "file" / "run"))
    assert re.fullmatch(r"\nerror: --output_dir .*file/run cannot be created: Not a d.*\n", capsys.readouterr().err)


def test_a_missing_model_is_reported_with_where_it_was_searched(finetune, tmp_path):
    with pytest.raises(InputError, match=r"nobody/nothing.*(folder|Hub)"):
        finetune("run", "--start_model", "nobody/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"model_index\.json"):
        finetune("run", "--start_model", tmp_path / "empty")


def test_code_of_the_start_model_runs_only_if_trusted(finetune, tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "_class_name": ["mine", "MyPipeline"]}))
    (model / "mine.py").write_text("from diffusers import DDPMPipeline\n\nclass MyPipeline(DDPMPipeline):\n    pass\n")
    flags = ("--start_model", model, "--max_train_steps", 1)
    with pytest.raises(InputError, match=r"model contains custom Python code.* --trust_remote_code"):
        finetune("run", *flags)
    assert type(DiffusionPipeline.from_pretrained(finetune("run", *flags, "--trust_remote_code"))) is DDPMPipeline


def test_an_existing_run_in_the_folder_is_kept(finetune):
    run = finetune("run")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(InputError, match=r"already contains a run.*--resume_from_checkpoint latest.*--output_dir"):
        finetune("run")
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_a_run_is_not_resumed_with_other_data_order(finetune):
    run = finetune("run")
    with pytest.raises(InputError, match=r"global batch size = 8, but this run has 4"):
        finetune("run", "--batch_size", 4, "--resume_from_checkpoint", "latest")
    with pytest.raises(InputError, match=r"EMA weights = True, but this run has False"):
        finetune("run", "--ema_decay", 0, "--resume_from_checkpoint", "latest")
    with pytest.raises(InputError, match=r"samples is not a complete checkpoint.*step-00000004"):
        finetune("run", "--resume_from_checkpoint", run / "samples")


def test_latest_skips_incomplete_checkpoints(finetune):
    run = finetune("run", "--checkpointing_steps", 2)
    (run / "checkpoints" / "step-00000004" / "state.json").unlink()
    finetune("run", "--resume_from_checkpoint", "latest", "--checkpointing_steps", 2)
    assert (run / "checkpoints" / "step-00000004" / "state.json").exists()
    assert len(read_metrics(run / "metrics.csv")) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prediction_type", "v_prediction"], "prediction type = epsilon, but this run has v_prediction"),
        (["--freeze", "all_but_norms"], "was saved with trained parameters .* = "),
        (["--max_train_steps", 2], "beyond the 2 steps"),
    ],
)
def test_a_run_is_not_resumed_as_another(finetune, flags, message):
    run = finetune("run", "--max_train_steps", 3, "--checkpointing_steps", 1)
    weights, checkpoints = saved_weights(run), sorted(path.name for path in (run / "checkpoints").iterdir())
    with pytest.raises(InputError, match=message):
        finetune("run", "--max_train_steps", 4, *flags, "--resume_from_checkpoint", "latest")
    assert largest_difference(weights, saved_weights(run)) == 0
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == checkpoints


@pytest.mark.parametrize("name", ["metrics.csv", ""], ids=["metrics.csv", "folder"])
def test_a_run_whose_files_are_removed_continues_and_can_be_resumed(finetune, tmp_path, monkeypatch, caplog, name):
    removed, log = tmp_path / "run" / name, Trainer._log

    def log_and_remove(trainer):
        log(trainer)
        if trainer.progress.step == 2:
            shutil.rmtree(removed) if removed.is_dir() else removed.unlink(missing_ok=True)

    monkeypatch.setattr(Trainer, "_log", log_and_remove)
    run = finetune("run", "--log_samples_every", 2, "--save_model_every", 2, "--checkpointing_steps", 2)
    assert "removed" in caplog.text
    assert [row["step"] for row in read_metrics(run / "metrics.csv")] == [3, 4]
    DDPMPipeline.from_pretrained(run)
    monkeypatch.setattr(Trainer, "_log", log)
    finetune("run", "--num_epochs", 3, "--resume_from_checkpoint", "latest")
    assert [row["step"] for row in read_metrics(run / "metrics.csv")] == [3, 4, 5, 6]


def test_grids_of_different_sizes_are_not_combined(finetune):
    run = finetune("run", "--max_train_steps", 2, "--num_samples", 4)
    assert (run / "before_after.png").exists()
    finetune("run", "--max_train_steps", 3, "--num_samples", 9, "--resume_from_checkpoint", "latest")
    assert not (run / "before_after.png").exists()  # that of step 2 would pass for one of step 3
    assert "before_after.png" not in (run / "README.md").read_text()


def test_a_run_that_starts_again_replaces_the_grid_of_step_0(finetune):
    run = finetune("run", "--max_train_steps", 1)
    grid = run / "samples" / "step-00000000.png"
    before = grid.read_bytes()
    shutil.rmtree(run / "checkpoints")
    finetune("run", "--max_train_steps", 1, "--seed", 5, "--resume_from_checkpoint", "latest")
    assert grid.read_bytes() != before


@pytest.mark.parametrize("content", [b"", b"\x89PNG", None])
def test_damaged_grids_do_not_end_a_run(finetune, caplog, content):
    run = finetune("run", "--max_train_steps", 2)
    grid = run / "samples" / "step-00000000.png"
    grid.write_bytes(grid.read_bytes()[:-50] if content is None else content)
    finetune("run", "--max_train_steps", 3, "--resume_from_checkpoint", "latest")
    assert not (run / "before_after.png").exists() and f"{grid} is damaged" in caplog.text


def test_a_resumed_run_uses_its_own_learning_rate(finetune):
    flags = ("--num_epochs", 4, "--checkpointing_steps", 4)
    run = finetune("run", *flags, "--max_train_steps", 4)
    finetune("run", *flags, "--learning_rate", 5e-3, "--resume_from_checkpoint", "latest")
    straight = finetune("straight", *flags, "--learning_rate", 5e-3)
    rates = [[row["learning_rate"] for row in read_metrics(r / "metrics.csv")] for r in (run, straight)]
    assert rates[0][4:] == rates[1][4:]
    assert rates[0][0] == 2 * rates[1][0]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("cosine", "is more than the 2 steps of the run: the learning rate rises only to 0.4 times --learning_rate"),
        ("constant", "has no effect with --lr_scheduler constant: use constant_with_warmup"),
    ],
)
def test_a_warmup_that_does_not_reach_the_learning_rate_has_a_warning(finetune, caplog, schedule, message):
    flags = ("--lr_scheduler", schedule, "--max_train_steps", 2, "--dry_run")
    finetune("run", *flags, "--lr_warmup_steps", 2 if schedule == "cosine" else 0)
    assert "--lr_warmup_steps" not in caplog.text
    finetune("run", *flags, "--lr_warmup_steps", 5)
    assert f"--lr_warmup_steps 5 {message}" in caplog.text


def test_a_loss_that_is_not_finite_stops_the_run_and_overwrites_nothing(finetune):
    flags = ("--num_epochs", 20, "--save_model_every", 2, "--checkpointing_steps", 2, "--max_grad_norm", 0)
    run = finetune("run", *flags, "--max_train_steps", 2)
    good = saved_weights(run)
    expected = r"loss of step \d+ is not finite.*learning rate .*last good checkpoint is .*step-00000002"
    with pytest.raises(RunError, match=expected):
        finetune("run", *flags, "--learning_rate", "1e30", "--resume_from_checkpoint", "latest")
    assert largest_difference(good, saved_weights(run)) == 0
    assert all(np.isfinite(row["loss"]) for row in read_metrics(run / "metrics.csv"))
    assert (run / "checkpoints" / "step-00000002" / "state.json").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_ends_with_the_reason_and_the_last_good_checkpoint(finetune, tmp_path):
    disk = tmp_path / "run"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        with pytest.raises(RunError, match=r"the disk is full.*last good checkpoint is .*step-0000000\d"):
            finetune("run", "--checkpointing_steps", 1, "--checkpoints_total_limit", 0, "--num_epochs", 10)
        good = sorted((disk / "checkpoints").glob("step-*"))
        assert good
        assert all((folder / "state.json").exists() for folder in good)
        assert not list((disk / "checkpoints").glob(".tmp-*"))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_broken_image_found_during_training_leaves_a_checkpoint_to_resume_from(finetune, tmp_path, monkeypatch):
    monkeypatch.setattr("ddgan.training.loading._CHECKED_IMAGES", 1)
    folder = write_images(tmp_path / "images", 13)
    (folder / "007.png").write_bytes(b"not an image")
    flags = ("--train_data_dir", folder)
    with pytest.raises(RunError, match=r"007\.png.*--skip_broken_images"):
        finetune("run", *flags)
    run = finetune("run", *flags, "--skip_broken_images", "--resume_from_checkpoint", "latest")
    assert "| broken images skipped | 1 |" in (run / "README.md").read_text()


def test_pushing_without_a_login_is_reported_before_training(finetune, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(InputError, match="--push_to_hub"):
        finetune("run", "--push_to_hub")
    assert not (tmp_path / "run").exists()


def test_a_command_without_model_or_data_runs_the_demo(images):
    from ddgan import finetune_model

    flags = ([], ["--resume_from_checkpoint", "latest"], [f"--train_data_dir={images}"], ["--train-data-dir", images])
    runs = [finetune_model.parse(list(map(str, some)))[0] for some in flags]
    assert [run.output_dir for run in runs] == ["demo", "demo", "finetuned", "finetuned"]
    assert runs[0].num_samples == runs[1].num_samples != runs[2].num_samples


def test_resuming_from_an_earlier_checkpoint_replaces_the_later_ones(finetune, tmp_path):
    flags = ("--num_epochs", 4, "--checkpointing_steps", 2, "--checkpoints_total_limit", 0)
    run = finetune("run", *flags)
    first = weights(run)
    finetune("run", *flags, "--learning_rate", 1e-3, "--resume_from_checkpoint", run / "checkpoints" / "step-00000002")
    assert [row["step"] for row in read_metrics(run / "metrics.csv")] == [*range(1, 9)]
    assert largest_difference(first, weights(run)) > 0
    with pytest.raises(InputError, match="not a complete checkpoint of this run"):
        finetune("other", *flags, "--resume_from_checkpoint", run / "checkpoints" / "step-00000002")


def test_a_model_folder_is_not_overwritten_and_other_files_are_kept(finetune, tiny_model, tmp_path):
    with pytest.raises(InputError, match=r"contains model_index\.json, which no run wrote"):
        finetune("run", "--output_dir", tiny_model)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("mine")
    with pytest.raises(InputError, match=r"contains README\.md, which no run wrote"):
        finetune("notes")
    assert (tmp_path / "notes" / "README.md").read_text() == "mine"
    other = tmp_path / "run" / "other" / ".tmp-other"
    other.parent.mkdir(parents=True)
    other.write_text("")
    finetune("run")
    assert other.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "-1"], "must be at least 0"),
        (["--sample_steps", "0"], "--sample_steps is 0; it must be at least 1"),
        (["--learning_rate", "nan"], "must be a finite number"),
        (["--ema_power", "-5"], "must be greater than 0"),
        (["--train_data_dir", ""], "--train_data_dir is empty"),
        (["--min_snr_gamma", "0"], "must be greater than 0"),
        (["--ema_inv_gamma", "0"], "must be greater than 0"),
        (["--resolution", "8", "0"], "must be at least 1"),
    ],
)
def test_meaningless_numbers_are_rejected(finetune, flags, message):
    with pytest.raises(InputError, match=message):
        finetune("run", *flags)


def test_models_that_cannot_be_trained_are_rejected(finetune, tmp_path):
    from diffusers import LDMPipeline, VQModel

    sizes = {"block_out_channels": (8,), "norm_num_groups": 4, "latent_channels": 3}
    LDMPipeline(VQModel(**sizes), tiny_unet(), DDIMScheduler()).save_pretrained(tmp_path / "latent")
    with pytest.raises(InputError, match="vqvae"):
        finetune("run", "--start_model", tmp_path / "latent")
    DDPMPipeline(tiny_unet(in_channels=6, out_channels=6), DDPMScheduler()).save_pretrained(tmp_path / "six")
    with pytest.raises(InputError, match="takes 6 channels"):
        finetune("run", "--start_model", tmp_path / "six")
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False}
    DDPMPipeline(tiny_unet(**blocks), DDPMScheduler()).save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="leaves nothing to train"):
        finetune("run", "--start_model", tmp_path / "plain", "--freeze", "all_but_attention")


def test_a_pipeline_of_another_kind_is_rejected_with_its_components(finetune, tmp_path):
    from diffusers import UNet2DConditionModel

    sizes = {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": 8}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DConditionModel(**sizes, **blocks, attention_head_dim=4)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="unconditional UNet2DModel"):
        finetune("run", "--start_model", tmp_path / "other")


def test_a_run_that_cannot_be_sampled_is_rejected_before_it_writes_anything(finetune, tmp_path):
    with pytest.raises(InputError, match="1001 inference steps are more than the 1000 timesteps"):
        finetune("run", "--sample_steps", 1001)
    assert not (tmp_path / "run").exists()


def test_a_start_model_with_another_schedule_of_betas_is_trained_and_sampled(finetune, tmp_path):
    tiny_pipeline(DDPMScheduler(beta_schedule="sigmoid")).save_pretrained(tmp_path / "sigmoid")
    run = finetune("run", "--start_model", tmp_path / "sigmoid", "--max_train_steps", 1)
    assert (run / "samples" / "step-00000001.png").exists()


def test_weights_that_are_not_finite_are_not_saved(finetune):
    """The loss of the only step is finite, since it is that of the weights before it."""
    with pytest.raises(RunError, match=r"The weights after step 1 are not finite\. Nothing was overwritten"):
        finetune(
            "run", "--learning_rate", 1e39, "--max_train_steps", 1, "--lr_scheduler", "constant", "--ema_decay", 0
        )


def test_names_that_are_not_utf8_are_trained_in_and_written_to_the_card(finetune, images, tmp_path):
    odd = os.fsdecode("caf\xe9".encode("latin-1"))
    shutil.copytree(images, tmp_path / odd)
    run = finetune(f"{odd} run", "--train_data_dir", tmp_path / odd, "--max_train_steps", 1)
    assert "| data | caf?, 13 images |" in (run / "README.md").read_text()


def test_the_code_on_cards_is_valid_whatever_the_names(finetune, images, tmp_path, monkeypatch):
    odd = 'my "best"\n\\run|'
    shutil.copytree(images, tmp_path / odd / "images")
    evaluated = ("--eval_every", 1, "--feature_extractor", "pixels-8x8", "--eval_images", 12)
    run = finetune(odd + "1", "--train_data_dir", tmp_path / odd, "--max_train_steps", 1, *evaluated)
    card = (run / "README.md").read_text()
    assert '# my "best" \\run|1\n' in card and '| data | my "best" \\run\\|, 13 images |' in card
    for folder in (run, run / "best"):
        monkeypatch.chdir(folder.parent)
        code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
        names = {}
        exec(code, names)
        assert names["image"].size == (8, 8)
    with snapshot(run, "ann/model") as copy:
        assert 'DDPMPipeline.from_pretrained("ann/model")' in Path(copy, "README.md").read_text()


def test_center_crop_takes_the_middle_of_every_image(finetune, tmp_path):
    wide = write_images(tmp_path / "wide", 4, (16, 8))
    for path in wide.iterdir():
        (tmp_path / "middle").mkdir(exist_ok=True)
        Image.open(path).crop((4, 0, 12, 8)).save(tmp_path / "middle" / path.name)
    flags = ("--max_train_steps", 1, "--batch_size", 4, "--train_data_dir")
    of_middle = finetune("of-middle", *flags, tmp_path / "middle")
    assert largest_difference(weights(finetune("centered", *flags, wide, "--center_crop")), weights(of_middle)) == 0
    assert largest_difference(weights(finetune("random", *flags, wide)), weights(of_middle)) > 0
