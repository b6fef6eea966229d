"""Fine-tune a pretrained diffusion pipeline into one that samples in a few steps.

    accelerate launch finetune_few_step.py --start_model google/ddpm-celebahq-256 --train_data_dir path/to/images \
        --num_inference_steps 4 --output_dir my-4-step-model

The network first learns from samples of the start model to reach in one evaluation what DDIM reaches in many
(distillation), then also from a discriminator that compares its samples with the images (adversarial training). The
result samples with the exact posterior steps of `DDPMScheduler`. It is a plain `DDPMPipeline`, or a
`ClassConditionalPipeline` if the start model is class-conditional.
From Python, call `ddgan.api.few_step`.
"""

from ddgan.commands.arguments import FEW_STEP_ARGUMENTS
from ddgan.core.cli import parse_arguments
from ddgan.core.errors import run_command


def main(argv: list[str] | None = None) -> None:
    run(*parse(argv))


def parse(argv: list[str] | None = None, *more: type) -> tuple:
    """Parse the arguments of `run`, and those of `more` dataclasses."""
    return parse_arguments(*FEW_STEP_ARGUMENTS, *more, argv=argv)


def run(*arguments) -> None:
    from ddgan.commands.few_step import finetune_few_step  # imports PyTorch and Diffusers, which takes seconds
    from ddgan.training.model_card import print_summary

    print_summary(finetune_few_step(*arguments))


if __name__ == "__main__":
    run_command(main)
