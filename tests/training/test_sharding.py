"""FSDP on two CPU processes. Accelerate shards on GPUs only, so the script pretends that there are some."""

import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import finetune_flags, largest_difference, run_ranks

from ddgan.evaluation.classifier import ImageClassifier
from ddgan.training.tracking import read_metrics

SCRIPT = """
from accelerate.state import PartialState
from accelerate.utils import DistributedType

PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

from ddgan import finetune_model
from ddgan.core import accelerator

accelerator._device_count = lambda: 2
finetune_model.main()
"""
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "ResnetBlock2D,Attention",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


class ExitWhenLoaded:
    def __reduce__(self):
        return os._exit, (1,)


@pytest.mark.slow
def test_a_sharded_run_saves_whole_pipelines_and_resumes_bit_identical(tiny_model, images, tmp_path, monkeypatch):
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    script = tmp_path / "sharded.py"
    script.write_text(SCRIPT)
    torch.manual_seed(0)
    ImageClassifier(8, 3, 3, (8,)).save_pretrained(tmp_path / "classifier")
    flags = ("--batch_size", 4, "--max_train_steps", 5, "--checkpointing_steps", 3, "--log_samples_every", 2)
    # three batches: in the second round one process generates images that are discarded, as both must call the network
    flags += ("--posthoc_ema", "--eval_every", 2, "--eval_images", 12, "--feature_extractor", tmp_path / "classifier")
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    for run, more in ((straight, ()), (resumed, ("--resume_from_checkpoint", "latest"))):
        run_ranks(script, *finetune_flags(tiny_model, images, run, *flags, *more), output=tmp_path / "output.txt")
        if run == straight:
            shutil.copytree(straight, resumed)
            damaged = resumed / "checkpoints" / "step-00000005" / "pytorch_model_fsdp_0"
            assert {".metadata", "__1_0.distcp"} <= {path.name for path in damaged.iterdir()}
            (damaged / ".metadata").write_bytes(pickle.dumps(ExitWhenLoaded()))
    assert "pytorch_model_fsdp_0/.metadata has" in (tmp_path / "output.txt").read_text()
    assert (straight / "checkpoints" / "step-00000005" / "ema_1.safetensors").exists()
    assert (straight / "metrics.csv").read_text() == (resumed / "metrics.csv").read_text()
    assert [row["step"] for row in read_metrics(straight / "metrics.csv") if row["fid@12"] > 0] == [2, 4, 5]
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert largest_difference(load_file(straight / unet), load_file(resumed / unet)) == 0
    assert load_file(straight / unet).keys() == load_file(tiny_model / unet).keys()
    assert largest_difference(load_file(straight / "best" / unet), load_file(resumed / "best" / unet)) == 0
    assert load_file(straight / "best" / unet).keys() == load_file(tiny_model / unet).keys()
    first, *others = [path.name for path in sorted((straight / "ema_snapshots").iterdir())]
    assert len(others) == 4
    for name in (first, *others):
        ours, theirs = (load_file(run / "ema_snapshots" / name) for run in (straight, resumed))
        assert largest_difference(ours, theirs) == 0
    start, after_a_step = load_file(tiny_model / unet), load_file(straight / "ema_snapshots" / first)
    for length in (0.05, 0.1):  # Adam's first step is at most the learning rate, plus weight decay
        whole = {name: after_a_step[f"{length}/{name}"] for name in start}
        assert 0 < largest_difference(whole, start) < 1.1e-2
