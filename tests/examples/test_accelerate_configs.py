"""The files in examples/accelerate, as `accelerate launch --config_file` reads them."""

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from tiny import ROOT, tiny_unet

FOLDER = ROOT / "examples" / "accelerate"
EXPECTED = {
    "one_gpu": (DistributedType.NO, 1, 1),
    "several_gpus": (DistributedType.MULTI_GPU, 1, 8),
    "several_nodes": (DistributedType.MULTI_GPU, 4, 32),
    "fsdp": (DistributedType.FSDP, 1, 8),
}


def test_every_file_is_tested():
    assert {path.stem for path in FOLDER.iterdir()} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_settings_match_the_file_name(name):
    path = FOLDER / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert (config.distributed_type, config.num_machines, config.num_processes) == EXPECTED[name]
    assert config.mixed_precision == "bf16"
    assert not config.use_cpu
    assert f"ddgan finetune --config_file examples/accelerate/{name}.yaml" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_launch_accepts_the_file(name):
    flags = ["--config_file", str(FOLDER / f"{name}.yaml"), "finetune_model.py", "--output_dir", "faces"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(flags))
    distributed_type, machines, processes = EXPECTED[name]
    assert (args.num_machines, args.num_processes, args.mixed_precision) == (machines, processes, "bf16")
    assert (args.multi_gpu, args.use_fsdp) == (
        distributed_type == DistributedType.MULTI_GPU,
        distributed_type == DistributedType.FSDP,
    )
    assert args.training_script_args == ["--output_dir", "faces"]


def test_fsdp_is_version_2_and_wraps_existing_block_classes():
    config = load_config_from_file(str(FOLDER / "fsdp.yaml")).fsdp_config
    assert config["fsdp_version"] == 2
    modules = {type(module).__name__ for module in tiny_unet().modules()}
    assert set(config["fsdp_transformer_layer_cls_to_wrap"].split(",")) <= modules
