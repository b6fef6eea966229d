"""Convert an official checkpoint of Denoising Diffusion GANs into a pipeline folder.

    python scripts/convert_ddgan_checkpoint.py --checkpoint_path netG_1200.pth --recipe cifar10 --output_dir cifar10

Takes the generator alone (netG_*.pth) or a whole training state (content.pth), which also holds the discriminator and
the arguments it was trained with; the discriminator goes into discriminator/ beside the pipeline.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ddgan import DDGANPipeline, DDGANScheduler
from ddgan.conversion.ddgan_checkpoints import (
    COMMON,
    convert_discriminator,
    convert_generator,
    generator_arguments,
    read_checkpoint,
)
from ddgan.core.cli import option, parse_arguments, require_at_least
from ddgan.core.errors import InputError, run_command
from ddgan.core.files import replace_file, replace_tree
from ddgan.hub.cards import CARD_NAME, CardFacts, card_text
from ddgan.hub.folders import code_files
from ddgan.sampling.grids import image_grid
from ddgan.sampling.pipelines import sample

RECIPES = {
    "cifar10": {"image_size": 32, "ch_mult": [1, 2, 2, 2], "num_timesteps": 4},
    "celebahq_256": {"image_size": 256, "ch_mult": [1, 1, 2, 2, 4, 4], "num_timesteps": 2},
    "lsun_church_256": {"image_size": 256, "ch_mult": [1, 1, 2, 2, 4, 4], "num_timesteps": 4},
}


@dataclass
class ConvertArguments:
    """Which checkpoint, what it was trained with, and where the pipeline goes."""

    checkpoint_path: str | None = option(None, "netG_*.pth, or content.pth")
    config_path: str | None = option(None, "JSON file with the arguments it was trained with, by their own names")
    recipe: Literal[tuple(RECIPES)] | None = option(None, "or the published model that it is")
    output_dir: str | None = option(None, "folder for the pipeline")
    num_samples: int = option(16, "pictures that are drawn on the CPU for its card, slow at 256x256; 0: none")

    def __post_init__(self):
        if not self.checkpoint_path or not self.output_dir:
            raise InputError("Name the checkpoint with --checkpoint_path and the pipeline's folder with --output_dir.")
        if self.config_path and self.recipe:
            raise InputError("--config_path and --recipe both say what the checkpoint was trained with: give one.")
        require_at_least(0, self, "num_samples")


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_arguments(ConvertArguments, argv=argv)
    output = Path(args.output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output_dir {output} is there already and not empty: name another folder.")
    generator_state, discriminator_state, saved = read_checkpoint(Path(args.checkpoint_path))
    if args.config_path:
        given = read_config(Path(args.config_path))
    elif args.recipe:
        given = RECIPES[args.recipe]
    elif saved:
        given = saved
    else:
        raise InputError(
            f"{args.checkpoint_path} does not hold the arguments that it was trained with. Give them with "
            f"--config_path, or name the published model that it is: --recipe {'|'.join(RECIPES)}."
        )
    config = generator_arguments(generator_state, given)
    try:
        generator = convert_generator(generator_state, config)
        scheduler = DDGANScheduler(
            config["num_timesteps"],
            config["beta_min"],
            config["beta_max"],
            variance_schedule="geometric" if config["use_geometric"] else "vp",
        )
        discriminator = convert_discriminator(discriminator_state, config) if discriminator_state else None
    except KeyError as error:
        raise InputError(f"The arguments of the checkpoint lack {error}, which its keys do not tell.") from error
    except ValueError as error:
        raise InputError(str(error)) from error

    pipeline = DDGANPipeline(generator.eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pictures = [sample(pipeline, [seed])[0] for seed in range(args.num_samples)]

    def write(folder: Path) -> None:
        if discriminator is not None:
            discriminator.save_pretrained(folder / "discriminator")
        pipeline.save_pretrained(folder)
        if pictures:
            image_grid(pictures).save(folder / "samples.png")

    replace_tree(output, write)
    size = config["image_size"]
    card = CardFacts(
        title=output.resolve().name,
        summary="A Denoising Diffusion GAN ([arXiv 2112.07804](https://arxiv.org/abs/2112.07804)) of NVIDIA's, "
        f"converted to Diffusers: it draws a picture of {size}x{size} pixels in {config['num_timesteps']} evaluations "
        "of its network.",
        usage=USAGE.format(model=output.resolve().name),
        training_heading="Conversion",
        images={"samples.png": f"Seeds 0 to {len(pictures) - 1}, nothing left out."} if pictures else {},
        training={"checkpoint": Path(args.checkpoint_path).name, "discriminator": "yes" if discriminator else "no"},
        settings={name: config[name] for name in sorted({*COMMON, "image_size", "ch_mult", "num_timesteps"})},
        license="other",
        license_name="nvidia-source-code-license",
        license_link="https://github.com/NVlabs/denoising-diffusion-gan/blob/main/LICENSE",
        license_note="The weights are NVIDIA's, under the NVIDIA Source Code License of their repository: for "
        "non-commercial use (research or evaluation) only. The conversion changes nothing about that.",
        code=code_files(output),
        tags=["ddgan", "gan", "non-commercial"],
    )
    replace_file(output / CARD_NAME, lambda path: path.write_text(card_text(card), encoding="utf-8"))
    print(f"pipeline       {output}")
    if discriminator is not None:
        print(f"discriminator  {output / 'discriminator'}")
    print(f"load it with   pipe = ddgan.DDGANPipeline.from_pretrained({str(output)!r})")


def read_config(path: Path) -> dict[str, Any]:
    """The arguments in a JSON file.

    Raises:
        InputError: if there is none.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--config_path {path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"--config_path {path} must hold the arguments as one JSON object.")
    return config


USAGE = """
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{model}", trust_remote_code=True)
image = pipe().images[0]
"""


if __name__ == "__main__":
    run_command(main)
