"""Convert an official checkpoint of Denoising Diffusion GANs into a pipeline folder.

    python scripts/convert_ddgan_checkpoint.py --checkpoint_path netG_1200.pth --recipe cifar10 --output_dir cifar10

The checkpoint is a generator (netG_*.pth) or a full training state (content.pth). The latter also contains the
training arguments and the discriminator, which is saved to the subfolder discriminator/. Its EMA weights, which the
optimizer keeps, are converted, as netG_*.pth files contain them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddgan import DDGANPipeline, DDGANScheduler
from ddgan.conversion.ddgan_checkpoints import (
    COMMON_ARGUMENTS,
    PUBLISHED_MODELS,
    convert_discriminator,
    convert_generator,
    generator_arguments,
    read_checkpoint,
)
from ddgan.core.cli import Arguments, option, parse_arguments
from ddgan.core.errors import InputError, run_command
from ddgan.core.files import replace_file, replace_tree
from ddgan.hub.cards import CARD_NAME, CardFacts, card_text
from ddgan.hub.folders import code_files
from ddgan.sampling.generation import sample
from ddgan.sampling.grids import image_grid


@dataclass
class ConvertArguments(Arguments):
    """The checkpoint, its training arguments, and the output folder."""

    checkpoint_path: str | None = option(None, "checkpoint to convert: netG_*.pth or content.pth")
    config_path: str | None = option(None, "JSON file with the training arguments of the checkpoint")
    recipe: str | None = option(
        None,
        "published model to take the training arguments from, instead of --config_path",
        choices=PUBLISHED_MODELS,
    )
    output_dir: str | None = option(None, "folder for the pipeline")
    num_samples: int = option(
        16, "images to generate on the CPU for the model card, slow at 256x256; 0 for none", minimum=0, maximum=10_000
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.checkpoint_path or not self.output_dir:
            raise InputError("Pass the checkpoint with --checkpoint_path and the output folder with --output_dir.")
        if self.config_path and self.recipe:
            raise InputError("Pass only one of --config_path and --recipe: both define the training arguments.")


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_arguments(ConvertArguments, argv=argv)
    output = Path(args.output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output_dir {output} already exists and is not empty: choose another folder.")
    checkpoint = read_checkpoint(Path(args.checkpoint_path))
    if args.config_path:
        known_arguments = read_config(Path(args.config_path))
    elif args.recipe:
        known_arguments = PUBLISHED_MODELS[args.recipe]
    elif checkpoint.arguments:
        known_arguments = checkpoint.arguments
    else:
        raise InputError(
            f"{args.checkpoint_path} does not contain its training arguments. Pass them with --config_path, or name "
            f"the published model: --recipe {'|'.join(PUBLISHED_MODELS)}."
        )
    try:
        arguments = generator_arguments(checkpoint.generator, known_arguments)
        generator = convert_generator(checkpoint.generator, arguments)
        scheduler = DDGANScheduler(
            arguments["num_timesteps"],
            arguments["beta_min"],
            arguments["beta_max"],
            variance_schedule="geometric" if arguments["use_geometric"] else "vp",
        )
        discriminator = None
        if checkpoint.discriminator:
            discriminator = convert_discriminator(checkpoint.discriminator, arguments)
    except KeyError as error:
        raise InputError(
            f"The training arguments lack {error}, which cannot be inferred from the checkpoint. Pass it with "
            "--config_path."
        ) from error
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:  # of arguments that do not fit
        raise InputError(f"The checkpoint cannot be converted: {error}") from error

    pipeline = DDGANPipeline(generator.eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    images = [sample(pipeline, [seed])[0] for seed in range(args.num_samples)]

    def write(folder: Path) -> None:
        if discriminator is not None:
            discriminator.save_pretrained(folder / "discriminator")
        pipeline.save_pretrained(folder)
        if images:
            image_grid(images).save(folder / "samples.png")

    replace_tree(output, write)
    size = arguments["image_size"]
    card = CardFacts(
        title=output.resolve().name,
        summary="A Denoising Diffusion GAN ([arXiv 2112.07804](https://arxiv.org/abs/2112.07804)) by NVIDIA, "
        f"converted to Diffusers. It generates an image of {size}x{size} pixels in {arguments['num_timesteps']} "
        "network evaluations.",
        usage=USAGE.format(model=output.resolve().name),
        training_heading="Conversion",
        images={"samples.png": f"Seeds 0 to {len(images) - 1}, nothing left out."} if images else {},
        training={
            "checkpoint": Path(args.checkpoint_path).name,
            "weights": "EMA, from the state of the optimizer" if checkpoint.is_ema else "those of the checkpoint",
            "discriminator": "yes" if discriminator else "no",
        },
        settings={
            name: arguments[name] for name in sorted({*COMMON_ARGUMENTS, "image_size", "ch_mult", "num_timesteps"})
        },
        license="other",
        license_name="nvidia-source-code-license",
        license_link="https://github.com/NVlabs/denoising-diffusion-gan/blob/main/LICENSE",
        license_note="The weights are by NVIDIA, under the NVIDIA Source Code License of their repository: for "
        "non-commercial use (research or evaluation) only. The conversion does not change that.",
        code=code_files(output),
        tags=["ddgan", "gan", "non-commercial"],
    )
    replace_file(output / CARD_NAME, lambda path: path.write_text(card_text(card), encoding="utf-8"))
    print(f"pipeline       {output}")
    print(f"weights        {card.training['weights']}")
    if discriminator is not None:
        print(f"discriminator  {output / 'discriminator'}")
    print(f"load with      pipe = ddgan.DDGANPipeline.from_pretrained({str(output)!r})")


def read_config(path: Path) -> dict[str, Any]:
    """Read training arguments from a JSON file.

    Raises:
        InputError: if the file cannot be read or does not contain a JSON object.
    """
    try:
        arguments = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--config_path {path} cannot be read: {error}") from error
    if not isinstance(arguments, dict):
        raise InputError(f"--config_path {path} must contain the training arguments as a JSON object.")
    return arguments


USAGE = """
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{model}", trust_remote_code=True)
image = pipe().images[0]
"""


if __name__ == "__main__":
    run_command(main)
