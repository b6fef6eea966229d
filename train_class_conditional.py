"""Train a network that draws the class it is told: handwritten digits, or any images with class labels.

    accelerate launch train_class_conditional.py --recipe fast --dataset mnist --data_dir data

Where no --recipe or --config is named it is `--recipe tutorial`, and where no data are named they are MNIST.
"""

import json
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from diffusers import DDPMScheduler
from torchvision.datasets import MNIST, FashionMNIST

from ddgan import ClassConditionalPipeline, ClassConditionedUnet, ContextUnet
from ddgan.core.cli import option, parse_arguments, require_above, require_at_least
from ddgan.core.errors import InputError, run_command
from ddgan.data.preprocessing import Preprocessing
from ddgan.hub.cards import CardFacts
from ddgan.sampling.grids import rows_by_class
from ddgan.sampling.pipelines import PipelineSampler
from ddgan.training.arguments import (
    DataArguments,
    EvaluationArguments,
    LabelArguments,
    LearningRateArguments,
    RunArguments,
)
from ddgan.training.evaluator import open_evaluator
from ddgan.training.job import TrainedNetwork, TrainingJob
from ddgan.training.loading import TrainingData
from ddgan.training.loop import Trainer, prepare_accelerator
from ddgan.training.lr_schedules import schedule
from ddgan.training.model_card import repository_for, settings_for_card
from ddgan.training.objectives.denoising import ClassConditionalObjective

RECIPES = {
    name: Path(__file__).parent / "examples" / "recipes" / f"class_conditional_{name}.yaml"
    for name in ("tutorial", "fast", "emoji_32")
}
DATASETS = {"mnist": MNIST, "fashion_mnist": FashionMNIST}
NUM_TRAIN_TIMESTEPS = 1000
MIN_WIDTH = 8  # channels of one head of attention in the blocks of Diffusers


@dataclass
class ClassConditionalArguments:
    """Which network learns to draw by class, and towards which loss."""

    _argument_group_name = "class conditioning"
    _alternatives = ({"dataset", "dataset_name", "train_data_dir"},)

    dataset: Literal[tuple(DATASETS)] | None = option(
        None, "images in --data_dir, downloaded where they are not there (default: mnist, where no others are named)"
    )
    data_dir: str = option("data", "folder with torchvision's MNIST/raw or FashionMNIST/raw")

    unet: Literal["class_conditioned", "context"] = option(
        "class_conditioned", "the class as further channels of the input, or as factors of the features"
    )
    image_channels: Literal[1, 2, 3, 4] = option(1, "channels of the images: grey, grey and alpha, RGB, RGBA")
    class_dropout: float = option(
        0.0, "how often the null class stands in for the class; above 0 allows classifier-free guidance"
    )
    block_out_channels: list[int] = field(
        default_factory=lambda: [32, 64, 64],
        metadata={"help": "width of each level, finest first; of the context network the finest alone"},
    )
    class_emb_size: int = option(4, "class_conditioned: length of the embedding of a class; 0: one-hot vectors")
    layers_per_block: int = option(2, "class_conditioned: residual blocks a level")
    attention_levels: list[int] = field(
        default_factory=lambda: [1, 2], metadata={"help": "class_conditioned: levels with attention, 0 the finest"}
    )
    norm_num_groups: int = option(32, "class_conditioned: groups of the group norms; must divide every width")

    prediction_type: Literal["epsilon", "sample", "v_prediction"] = option("epsilon", "what the network predicts")
    min_snr_gamma: float | None = option(None, "weigh the loss by min(SNR, gamma); 5 is usual (default: no weights)")
    timestep_sampling: Literal["uniform", "logit_normal"] = option(
        "uniform", "how timesteps are drawn: all alike, or those in the middle more often"
    )
    sample_steps: int = option(50, "network evaluations (DDIM) for a sample in the grids")
    guidance_scale: float = option(1.0, "classifier-free guidance of those samples; above 1 needs --class_dropout")

    def __post_init__(self):
        require_at_least(1, self, "layers_per_block", "norm_num_groups", "sample_steps")
        require_at_least(0, self, "class_emb_size", "class_dropout")
        require_at_least(MIN_WIDTH, self, "block_out_channels")
        require_above(0, self, "min_snr_gamma")
        if not self.block_out_channels:
            raise InputError("--block_out_channels needs at least one width.")
        if self.guidance_scale > 1 and not self.class_dropout:
            raise InputError(
                f"--guidance_scale {self.guidance_scale} needs a null class to guide away from: train one with "
                "--class_dropout 0.1, or sample with --guidance_scale 1."
            )


@dataclass
class ClassConditionalLearningRateArguments(LearningRateArguments):
    """How fast the network learns, and when."""

    learning_rate: float = option(1e-3, "peak learning rate (Adam)")


@dataclass
class ClassConditionalRunArguments(RunArguments):
    """How a training run goes: its length, what it shows and what it keeps."""

    _default_output_dir: ClassVar = "class-conditional"

    num_samples: int = option(80, "images in a grid of samples, rounded up to full rows, one for each class")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not any(flag.split("=")[0] in ("--config", "--recipe") for flag in argv):
        argv = ["--recipe", "tutorial", *argv]
    arguments = parse_arguments(
        ClassConditionalRunArguments,
        ClassConditionalLearningRateArguments,
        DataArguments,
        LabelArguments,
        EvaluationArguments,
        ClassConditionalArguments,
        argv=argv,
        recipes=RECIPES,
    )
    run, rate, data_args, label_args, eval_args, args = arguments
    accelerator = prepare_accelerator(run)
    if accelerator.is_fsdp2:
        raise InputError("A class-conditional network trains on several processes with --multi_gpu; it needs no FSDP.")
    repo_id = repository_for(run) if run.push_to_hub and accelerator.is_main_process else None

    with accelerator.main_process_first():  # the others find what it has downloaded
        data_args = choose_data(args, data_args)
    size = data_args.resolution or [data_args.image_size or 28] * 2
    preprocessing = Preprocessing(args.image_channels, *size, data_args.center_crop, data_args.random_flip)
    data = TrainingData(
        data_args,
        preprocessing,
        accelerator.process_index,
        label_args,
        batch_size=run.batch_size,
        accumulation=run.grad_accumulation_steps,
        processes=accelerator.num_processes,
        seed=run.seed,
    )
    classes = data.classes
    labels, grid = rows_by_class(run.num_samples, classes)
    run.num_samples = len(labels)
    torch.manual_seed(run.seed)  # the network begins the same in every process and every run of this seed
    unet = build(args, size, classes)
    scheduler = DDPMScheduler(
        NUM_TRAIN_TIMESTEPS, beta_schedule="squaredcos_cap_v2", prediction_type=args.prediction_type
    )
    if run.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    optimizer = torch.optim.Adam(unet.parameters(), lr=rate.learning_rate, fused=True)
    objective = ClassConditionalObjective(
        scheduler,
        len(classes),
        args.class_dropout,
        min_snr_gamma=args.min_snr_gamma,
        timestep_sampling=args.timestep_sampling,
    )

    card = CardFacts(
        title=run.model_save_name,
        summary=f"A diffusion model that draws by class, trained on {data.name}, for pictures of {size[0]}x{size[1]} "
        f"pixels. Its {len(classes)} classes are {', '.join(classes)}; the grid has a row for each.",
        usage=USAGE.format(
            model=Path(run.output_dir).resolve().name,
            name=json.dumps(classes[0], ensure_ascii=False),
            guidance=f"guidance_scale={args.guidance_scale}, " if args.class_dropout else "",
            steps=args.sample_steps,
        ),
        settings=settings_for_card(*arguments),
        dataset=data.name,
        tags=["ddpm", "class-conditional"],
    )
    pipeline = ClassConditionalPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    player = TrainedNetwork("", unet, objective, optimizer, partial(schedule, args=rate))
    sampler = PipelineSampler("ddim", args.sample_steps, {"guidance_scale": args.guidance_scale})
    evaluator = open_evaluator(eval_args, run, data, accelerator)
    job = TrainingJob([player], pipeline, unet, sampler, card, arguments, labels, grid)
    trainer = Trainer(job, data, run, accelerator, repo_id, evaluator)
    trainer.run()
    if accelerator.is_main_process:
        trainer.finish()


def choose_data(args: ClassConditionalArguments, data_args: DataArguments) -> DataArguments:
    """The arguments with the folder of `--dataset` as `--train_data_dir`, downloaded where it is not there.

    Raises:
        InputError: if other data are named too, or the folder is not there and cannot be downloaded.
    """
    other = data_args.dataset_name or data_args.train_data_dir
    if args.dataset and other:
        raise InputError(f"--dataset {args.dataset} and {other} both name the images to train on. Give one of them.")
    if other:
        return data_args
    dataset_class = DATASETS[args.dataset or "mnist"]
    folder = Path(args.data_dir) / dataset_class.__name__
    part = "t10k" if data_args.split == "test" else "train"
    files = [folder / "raw" / f"{part}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
    if not all(file.is_file() for file in files):
        try:
            dataset_class(args.data_dir, download=True)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"The images of {dataset_class.__name__} are not in {folder} (looked for "
                f"{' and '.join(file.name for file in files)} in its folder raw), and downloading them failed: "
                f"{' '.join(str(error).split())} Name the folder that holds {dataset_class.__name__} with --data_dir, "
                "or other images with --dataset_name or --train_data_dir."
            ) from error
    return replace(data_args, train_data_dir=str(folder))


def build(args: ClassConditionalArguments, size: list[int], classes: list[str]) -> ClassConditionedUnet | ContextUnet:
    """A new network for pictures of this height and width and these classes.

    Raises:
        InputError: if it cannot be like that.
    """
    widths = args.block_out_channels
    shared = {
        "in_channels": args.image_channels,
        "out_channels": args.image_channels,
        "class_dropout": args.class_dropout,
        "id2label": dict(enumerate(classes)),
    }
    try:
        if args.unet == "context":
            if size[0] != size[1]:
                raise InputError(f"The context network draws squares; {size[0]} x {size[1]} is none.")
            return ContextUnet(
                n_feat=widths[0],
                n_cfeat=len(classes),
                height=size[0],
                num_train_timesteps=NUM_TRAIN_TIMESTEPS,
                **shared,
            )
        factor = 2 ** (len(widths) - 1)
        if any(side % factor for side in size):
            raise InputError(
                f"--block_out_channels {' '.join(map(str, widths))} halves the picture {len(widths) - 1} times, so "
                f"height and width must be multiples of {factor}; {size[0]} x {size[1]} is not."
            )
        if unknown := set(args.attention_levels) - set(range(len(widths))):
            raise InputError(
                f"--attention_levels {' '.join(map(str, sorted(unknown)))}: the levels of this network are 0 to "
                f"{len(widths) - 1}, one for each of --block_out_channels."
            )
        attention = ["Attn" if level in args.attention_levels else "" for level in range(len(widths))]
        return ClassConditionedUnet(
            sample_size=size[0] if size[0] == size[1] else tuple(size),
            num_classes=len(classes),
            class_emb_size=args.class_emb_size or None,
            layers_per_block=args.layers_per_block,
            block_out_channels=widths,
            down_block_types=[f"{kind}DownBlock2D" for kind in attention],
            up_block_types=[f"{kind}UpBlock2D" for kind in reversed(attention)],
            norm_num_groups=args.norm_num_groups,
            **shared,
        )
    except ValueError as error:
        raise InputError(str(error)) from error


USAGE = """
from diffusers import DDIMScheduler, DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{model}", trust_remote_code=True)
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
image = pipe(class_labels={name}, {guidance}num_inference_steps={steps}).images[0]
"""


if __name__ == "__main__":
    run_command(main)
