"""Claims about ddgan.api: the commands as functions, with objects, for notebooks."""

import inspect
import signal
import subprocess
import sys
import threading
from functools import partial

import datasets
import numpy as np
import pytest
import yaml
from accelerate import notebook_launcher
from accelerate.state import AcceleratorState, PartialState
from diffusers import DDPMPipeline
from PIL import Image
from tiny import largest_difference, tiny_pipeline, weights

from ddgan import ClassConditionalPipeline
from ddgan.api import InputError, evaluate, finetune, generate, push, train_class_conditional
from ddgan.training.loop import Trainer

SHORT = {"report_to": "none", "sample_steps": 2, "num_samples": 2, "batch_size": 8, "max_train_steps": 2}


@pytest.fixture(autouse=True)
def no_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def pil_images(images) -> list[Image.Image]:
    return [Image.open(path) for path in sorted(images.iterdir())]


def dataset(images: list[Image.Image], **columns) -> datasets.Dataset:
    features = datasets.Features(image=datasets.Image())
    if columns:
        features["label"] = datasets.ClassLabel(names=["a", "b", "c"])
    return datasets.Dataset.from_dict({"image": images, **columns}, features=features)


def test_a_folder_a_list_and_a_dataset_of_the_same_images_train_the_same_weights(
    tiny_model, images, pil_images, tmp_path
):
    kinds = {"folder": images, "list": pil_images, "dataset": dataset(pil_images)}
    for name, train_data in kinds.items():
        finetune(start_model=tiny_model, train_data=train_data, output_dir=tmp_path / name, **SHORT)
    folder = weights(tmp_path / "folder")
    assert largest_difference(folder, weights(tmp_path / "list")) == 0
    assert largest_difference(folder, weights(tmp_path / "dataset")) == 0


def test_a_pipeline_in_memory_is_fine_tuned_as_if_loaded_and_is_not_changed(tiny_model, pil_images, tmp_path):
    pipe = DDPMPipeline.from_pretrained(tiny_model)
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    run = finetune(start_model=pipe, train_data=pil_images, output_dir=tmp_path / "object", **SHORT)
    finetune(start_model=tiny_model, train_data=pil_images, output_dir=tmp_path / "folder", **SHORT)
    assert largest_difference(weights(tmp_path / "object"), weights(tmp_path / "folder")) == 0
    assert largest_difference(before, pipe.unet.state_dict()) == 0
    assert [row["step"] for row in run.metrics] == [1, 2]
    assert run.files.before_after.is_file()
    assert run.pipeline.unet.config.sample_size == 8
    assert "tiny, fine-tuned on a list of images" in run.files.card.read_text()


def test_the_config_of_a_run_on_objects_does_not_start_another_run(pil_images, tmp_path):
    finetune(start_model=tiny_pipeline(), train_data=pil_images, output_dir=tmp_path / "run", **SHORT)
    config = tmp_path / "run" / "config.yaml"
    assert yaml.safe_load(config.read_text())["start_model"] == "a DDPMPipeline (in memory)"
    with pytest.raises(InputError, match=r"--train_data_dir a list of images \(in memory\) does not exist"):
        finetune(config=config, output_dir=tmp_path / "again")


def test_two_runs_in_one_process_have_their_own_mixed_precision_and_leave_nothing_behind(tiny_model, images, tmp_path):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for precision in ("no", "bf16"):
        run = finetune(
            start_model=tiny_model,
            train_data=images,
            output_dir=tmp_path / precision,
            mixed_precision=precision,
            **SHORT,
        )
        assert run.facts.precision.startswith("fp32" if precision == "no" else "bf16")
        assert not AcceleratorState._shared_state and not PartialState._shared_state
        assert not list(run.folder.glob(".lock*"))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_run_outside_the_main_thread_trains(tiny_model, images, tmp_path):
    call = partial(finetune, start_model=tiny_model, train_data=images, output_dir=tmp_path / "run", **SHORT)
    runs = []
    thread = threading.Thread(target=lambda: runs.append(call()))
    thread.start()
    thread.join()
    assert len(runs[0].metrics) == 2


def test_ctrl_c_saves_a_checkpoint_and_raises_keyboard_interrupt(tiny_model, images, tmp_path, monkeypatch):
    train_step = Trainer._train_step

    def interrupted(trainer, batches):
        train_step(trainer, batches)
        if trainer.progress.step == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    call = partial(finetune, start_model=tiny_model, train_data=images, output_dir=tmp_path / "run", **SHORT)
    with pytest.raises(KeyboardInterrupt, match="saved a checkpoint"):
        call()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]
    assert not AcceleratorState._shared_state
    assert len(call(resume_from_checkpoint="latest").metrics) == 2


@pytest.mark.slow
def test_notebook_launcher_trains_in_two_processes_after_a_run_in_this_one(
    tiny_model, pil_images, tmp_path, two_threads, monkeypatch
):
    # where it is installed, Diffusers imports it, and Accelerate then starts no processes from a notebook
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)

    def train(name: str) -> None:  # images large enough for several threads
        flags = {"start_model": tiny_model, "train_data": pil_images, "image_size": 32}
        finetune(**flags, output_dir=tmp_path / name, **SHORT)

    train("first")
    notebook_launcher(train, ("run",), num_processes=2)
    assert "| global batch size | 16, 2 processes |" in (tmp_path / "run" / "README.md").read_text()


def test_a_stream_trains(tiny_model, pil_images, tmp_path):
    rows = dataset(pil_images).to_iterable_dataset()
    call = partial(finetune, start_model=tiny_model, train_data=rows, output_dir=tmp_path / "run")
    with pytest.raises(InputError, match="streaming=True"):
        call(**SHORT)
    assert len(call(streaming=True, **SHORT).metrics) == 2


def test_a_dataset_with_labels_trains_a_class_conditional_model(tmp_path):
    images = [Image.new("L", (8, 8), 20 * i) for i in range(12)]
    small = {"block_out_channels": [8, 16], "norm_num_groups": 4, "attention_levels": [], "layers_per_block": 1}
    small |= {"image_size": 8, "num_epochs": 1, "batch_size": 8, "num_samples": 3, "report_to": "none"}
    call = partial(train_class_conditional, output_dir=tmp_path / "run", sample_steps=2, **small)
    with pytest.raises(InputError, match=r"no class labels. Pass a datasets.Dataset"):
        call(train_data=images)
    run = call(train_data=dataset(images, label=[i % 3 for i in range(12)]))
    assert isinstance(run.pipeline, ClassConditionalPipeline)
    assert run.pipeline.labels == {"a": 0, "b": 1, "c": 2}
    config = yaml.safe_load(run.files.config.read_text())
    assert (config["batch_size"], config["train_data_dir"]) == (8, "a Dataset (in memory)")


def test_generate_and_evaluate_take_and_return_objects(tiny_model, pil_images, tmp_path):
    pipe = DDPMPipeline.from_pretrained(tiny_model)
    options = {"num_images": 12, "num_inference_steps": 2}
    samples = generate(pipeline=pipe, output_dir=tmp_path / "object", grid=True, **options)
    loaded = generate(pipeline=str(tiny_model), output_dir=tmp_path / "folder", **options)
    assert list(samples) == list(loaded) and len(samples) == 12
    assert samples[1:3] == [samples[1], samples[2]] and samples[-1] == list(samples)[-1]
    assert samples.paths[3].name == "000003.png" and samples.grid.is_file() and loaded.grid is None
    guided = [
        generate(pipeline=pipe, autoguidance=guide, guidance_scale=2, output_dir=tmp_path / name, **options)
        for name, guide in (("guide", tiny_pipeline()), ("guide folder", str(tiny_model)))
    ]
    assert list(guided[0]) == list(guided[1])
    common = {"reference": pil_images, "feature_extractor": "pixels-8x8", "cache_dir": tmp_path / "cache"}
    of_pipeline = evaluate(pipeline=pipe, output=tmp_path / "a.json", **common, **options)
    of_images = evaluate(images=list(samples), output=tmp_path / "b.json", **common)
    assert of_pipeline.metrics["fid@12"].value == of_images.metrics["fid@12"].value > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"learning_rat": 1}, "takes no argument learning_rat. Did you mean learning_rate?"),
        ({"batch_size": "8"}, "--batch_size is '8'; it must be an integer"),
        ({"batch_size": 8.5}, "--batch_size is 8.5; it must be an integer"),
        ({"batch_size": True}, "--batch_size is True; it must be an integer"),
        ({"learning_rate": "1e-4"}, "--learning_rate is '1e-4'; it must be a number"),
        ({"random_flip": "no"}, "--random_flip is 'no'; it must be True or False"),
        ({"resolution": 64}, "--resolution is 64; it must be a list"),
        ({"freeze": "all"}, "--freeze is 'all'; choose from none"),
        ({"report_to": "mlflow"}, "--report_to is 'mlflow'; choose from tensorboard"),
        ({"batch_size": None}, "--batch_size is None; it must be an integer"),
        ({"start_model": 5}, "--start_model has the type int; it must be a string, a path or a DiffusionPipeline"),
        ({"start_model": {}}, "--start_model has the type dict; it must be a string, a path or a DiffusionPipeline"),
        ({"start_model": [1]}, "a list of images (in memory) is not a pipeline"),
        ({"train_data": 5}, "--train_data_dir has the type int; it must be a string, a path or a list of PIL images"),
        ({"train_data": {"a": 1}}, "--train_data_dir has the type dict"),
        ({"train_data": iter([1])}, "A list_iterator is not a set of images"),
        ({"freeze": ["none"]}, "--freeze has the type list; it must be a string or a path"),
        ({"train_data": []}, "--train_data_dir is an empty list"),
        ({"train_data": "a", "train_data_dir": "b"}, "train_data and train_data_dir both name the images"),
        ({"hub_model_id": "ann/model"}, "--hub_model_id ann/model has no effect without --push_to_hub"),
        ({"train_data": "nowhere/at/all"}, "--dataset_name nowhere/at/all: there is no such file or folder"),
    ],
)
def test_wrong_arguments_are_refused(tiny_model, tmp_path, flags, message):
    with pytest.raises(InputError) as error:
        finetune(**{"start_model": tiny_model, "output_dir": tmp_path / "run", **flags})
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("call", "flags", "message"),
    [
        (generate, {"color": (1, 2, 3)}, "--color has the type list; it must be a string or a path"),
        (generate, {"output_dir": None}, "--output_dir has the type NoneType; it must be a string or a path"),
        (generate, {"output_dir": b"x"}, "--output_dir has the type bytes; it must be a string or a path"),
        (
            generate,
            {"class_labels": [0.5]},
            "--class_labels has the type float; it must be a string, a path or an int",
        ),
        (
            evaluate,
            {"images": np.zeros((12, 8, 8, 3))},
            "--images has the type ndarray; it must be a string, a path or",
        ),
        (evaluate, {"classifier": 5}, "--classifier has the type int; it must be a string or a path"),
        (push, {"repo_id": 5}, "--repo_id has the type int; it must be a string or a path"),
    ],
)
def test_a_value_of_another_type_than_text_is_refused(call, flags, message):
    with pytest.raises(InputError) as error:
        call(**flags)
    assert message in str(error.value)


def test_a_config_sets_values_which_keywords_and_their_alternatives_override(tiny_model, images, tmp_path):
    (tmp_path / "run.yaml").write_text("max_train_steps: 100\nlearning_rate: 1e-3\nbatch_size: 13\n")
    flags = {name: value for name, value in SHORT.items() if name not in ("max_train_steps", "batch_size")}
    run = finetune(
        config=tmp_path / "run.yaml",
        num_epochs=1,
        start_model=tiny_model,
        train_data=images,
        output_dir=tmp_path / "run",
        **flags,
    )
    assert [(row["step"], row["images"], row["learning_rate"]) for row in run.metrics] == [(1, 13, 1e-3)]


def test_the_signature_lists_the_flags_and_importing_the_module_is_cheap():
    parameters = inspect.signature(finetune).parameters
    assert parameters["batch_size"].default == 16 and "train_data" in parameters
    assert "train_data" not in inspect.signature(generate).parameters
    code = "import sys, ddgan.api; assert not {'torch', 'diffusers', 'accelerate', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
