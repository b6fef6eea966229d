"""Convert a published checkpoint of Denoising Diffusion GANs into a pipeline folder."""

import json
from pathlib import Path
from typing import Any

from .. import DDGANPipeline, DDGANScheduler
from ..conversion.ddgan_checkpoints import (
    convert_discriminator,
    convert_generator,
    generator_arguments,
    read_checkpoint,
)
from ..conversion.published_models import COMMON_ARGUMENTS, PUBLISHED_MODELS
from ..core.errors import InputError
from ..core.files import replace_file, replace_tree
from ..core.locks import locked
from ..hub.cards import CARD_NAME, CardFacts, card_text, string_literal
from ..hub.folders import code_files
from ..sampling.generation import sample
from ..sampling.grids import image_grid
from .arguments import ConvertArguments


def convert(args: ConvertArguments) -> Path:
    """Convert the checkpoint, write the pipeline with its model card, and print where it is.

    Returns:
        The pipeline folder.

    Raises:
        InputError: if the checkpoint cannot be read, its training arguments are unknown or do not fit, or another
            command is writing to the folder.
    """
    assert args.output_dir is not None
    output = Path(args.output_dir)
    with locked(output):
        convert_checkpoint(args, output)
    return output


def convert_checkpoint(args: ConvertArguments, output: Path) -> None:
    """Convert the checkpoint, and write the pipeline with its model card to a folder."""
    assert args.checkpoint_path is not None
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
        usage=USAGE.format(model=string_literal(output.resolve().name)),
        training_heading="Conversion",
        samples={"samples.png": f"Seeds 0 to {len(images) - 1}, uncurated."} if images else {},
        training={
            "network": f"{type(generator).__name__}, {generator.num_parameters():,} parameters",
            "image size": f"{size}x{size}, {generator.config.in_channels} channels",
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

pipe = DiffusionPipeline.from_pretrained({model}, trust_remote_code=True)
image = pipe().images[0]
"""
