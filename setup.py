"""Metadata of the package `ddgan`, whose folder is the root of this repository."""

from pathlib import Path

from setuptools import setup

PARTS = (
    "conversion",
    "core",
    "data",
    "evaluation",
    "guidance",
    "hub",
    "models",
    "pipelines",
    "sampling",
    "schedulers",
    "training",
    "training.objectives",
)
EXTRAS = {
    "train": ["accelerate>=1.10", "datasets>=4.0", "matplotlib>=3.8", "tensorboard>=2.16", "tqdm>=4.66"],
    "clip": ["open-clip-torch>=2.24", "protobuf>=4.25", "sentencepiece>=0.2"],  # the last two for SigLIP's tokenizer
    "wandb": ["wandb>=0.18"],
    "gradio": ["gradio>=6.20"],
    "eval": ["torch-fidelity>=0.4", "scipy>=1.11"],
}
EXTRAS["all"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})
EXTRAS["dev"] = [
    *EXTRAS["all"],
    "playwright>=1.49",
    "pytest>=8.2",
    "pytest-xdist>=3.6",
    "ruff>=0.11",
    "torchmetrics>=1.4",
    "trackio>=0.2",
]

setup(
    name="diffusers-ddgan",
    version="0.1.0",
    description="Fine-tune diffusion models and train Denoising Diffusion GANs with Hugging Face Diffusers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"ddgan": "."},
    packages=["ddgan", *(f"ddgan.{part}" for part in PARTS)],
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "diffusers>=0.42",
        "transformers>=4.57",
        "huggingface_hub>=1.0",
        "safetensors>=0.5",
        "numpy>=1.26",
        "pillow>=11.0",
        "pyyaml>=6.0",
    ],
    extras_require=EXTRAS,
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
)
