"""Convert an official checkpoint of Denoising Diffusion GANs into a pipeline folder.

    python scripts/convert_ddgan_checkpoint.py --checkpoint_path netG_1200.pth --recipe cifar10 --output_dir cifar10

The checkpoint is a generator (netG_*.pth) or a full training state (content.pth). The latter also contains the
training arguments and the discriminator, which is saved to the subfolder discriminator/. Its EMA weights, which the
optimizer keeps, are converted, as netG_*.pth files contain them.
"""

from ddgan.commands.arguments import ConvertArguments
from ddgan.core.cli import parse_arguments
from ddgan.core.errors import run_command


def main(argv: list[str] | None = None) -> None:
    run(*parse(argv))


def parse(argv: list[str] | None = None, *more: type) -> tuple:
    """Parse the arguments of `run`, and those of `more` dataclasses."""
    return parse_arguments(ConvertArguments, *more, argv=argv)


def run(args: ConvertArguments) -> None:
    from ddgan.commands.convert import convert  # imports PyTorch and Diffusers, which takes seconds

    convert(args)


if __name__ == "__main__":
    run_command(main)
