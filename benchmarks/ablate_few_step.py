"""Quality of few-step models after adversarial training with other losses and discriminators.

    python benchmarks/ablate_few_step.py --start_model demo --work_dir ablation

All settings continue from the same distilled network, with the same samples of the start model, random numbers and
number of steps. Both are made first and kept in `--work_dir`, as are the results of each setting, so that the command
can be interrupted. `default` is what `ddgan few-step` does.
"""

import argparse
import copy
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from common import ROOT, hardware, synchronized_time
from diffusers import DDPMPipeline, UNet2DModel
from torchvision.transforms.v2.functional import pil_to_tensor

from ddgan import UNetDiscriminator
from ddgan.commands.few_step import DISCRIMINATOR_HEAD_START, few_step_scheduler
from ddgan.data.images import to_bytes
from ddgan.data.preprocessing import Preprocessing, read_image
from ddgan.data.sources import open_source
from ddgan.evaluation.extractors import load_extractor
from ddgan.evaluation.metrics import Gaussian, frechet_distance, manifold_metrics
from ddgan.sampling.generation import sample, sample_in_full_batches
from ddgan.sampling.grids import image_grid
from ddgan.training.augmentation import DifferentiableAugmentation
from ddgan.training.lr_schedules import two_stage_schedule
from ddgan.training.objectives.few_step import FewStepProcess, FewStepSetup, NoisyImages, TeacherSamples, Transition
from ddgan.training.objectives.micro_batch import MicroBatch
from ddgan.training.randomness import PerSampleRNG, fold_in
from ddgan.training.start_model import load_start_model
from ddgan.training.teacher import Teacher, generate_samples

STEP_COUNTS = [4, 2, 1]
TEACHER_SAMPLES, TEACHER_STEPS = 2048, 20
DISTILLATION_STEPS, DISTILLATION_LR = 500, 1e-3
LR_G, LR_D, EMA_DECAY = 5e-5, 2e-4, 0.995
PENALTY_STEP = 0.02
LAZY_INTERVAL = 8


@dataclass
class Setting:
    """A row of the table: the discriminator, its loss, and the weight of distillation.

    Attributes:
        gamma: weight of the gradient penalties.
        penalties: how many images are penalized: 2 for R1 and R2, 1 for R1 alone.
        interval: steps between penalties, whose weight is multiplied by it.
        exact: compute the penalties with a second derivative instead of finite differences.
        relativistic: compare the logits of a real and a generated image (arXiv 1807.00734).
        pair: the discriminator also sees the noisier image.
        pretrained: its encoder is a copy of the start model's, not randomly initialized.
        weight: of the distillation loss.
        instance_noise: probability that clean images get noise before the discriminator.
        augmentation: differentiable augmentations of its inputs.
    """

    gamma: float = 0.1
    penalties: int = 2
    interval: int = 1
    exact: bool = False
    relativistic: bool = False
    pair: bool = False
    pretrained: bool = True
    weight: float = 20.0
    instance_noise: float = 0.5
    augmentation: tuple[str, ...] = ()


SETTINGS = {
    "default": Setting(),
    "pair": Setting(pair=True),
    "relativistic": Setting(relativistic=True),
    "R1 alone, lazily": Setting(penalties=1, interval=LAZY_INTERVAL),
    "R1 and R2, lazily": Setting(interval=LAZY_INTERVAL),
    "exact R1 and R2": Setting(exact=True),
    "no penalty": Setting(gamma=0),
    "random discriminator": Setting(pretrained=False),
    "weight 5": Setting(weight=5),
    "weight 100": Setting(weight=100),
    "no instance noise": Setting(instance_noise=0),
    "augmentation": Setting(augmentation=("color", "translation", "cutout")),
}


class Losses:
    """The losses of both networks in one setting."""

    def __init__(self, setting: Setting, setup: FewStepSetup, teacher: TeacherSamples):
        self.setting, self.setup, self.teacher = setting, setup, teacher

    def discriminator(self, samples: MicroBatch) -> torch.Tensor:
        setting, setup = self.setting, self.setup
        transition = setup.transition(samples)
        with torch.no_grad():
            (image,) = setup.predict(setup.generator, NoisyImages(transition.noisier, transition.t, {}))
            fake = setup.less_noisy(samples, image, transition)
        timesteps, real, fake = self._inputs(samples, transition, setup.real(samples, transition), fake)
        has_penalty = setting.gamma and samples.step % setting.interval == 0
        images = torch.stack([real, fake]).requires_grad_(bool(has_penalty and setting.exact))
        logits = self._logits(images, timesteps, transition)
        if setting.relativistic:
            loss = F.softplus(logits[1] - logits[0]).mean()
        else:
            loss = F.softplus(-logits[0]).mean() + F.softplus(logits[1]).mean()
        if has_penalty:
            if setting.exact:
                (gradient,) = torch.autograd.grad(logits.mean(2).sum(), images, create_graph=True)
                squares = gradient.square().sum(dim=(2, 3, 4))
            else:
                noise = torch.stack([PENALTY_STEP * samples.rng.normal(*real.shape[1:]) for _ in range(2)])
                change = self._logits(images + noise, timesteps, transition) - logits
                squares = change.mean(2).square() / PENALTY_STEP**2
            penalty = squares[: setting.penalties].sum(0).mean()
            loss = loss + setting.interval * setting.gamma / 2 * penalty
        return loss

    def generator(self, samples: MicroBatch) -> torch.Tensor:
        setting, setup = self.setting, self.setup
        noisy, targets = self.teacher.random_samples(samples)
        if samples.step < DISTILLATION_STEPS:
            (image,) = setup.predict(setup.generator, noisy)
            return (image - targets).square().mean()
        transition = setup.transition(samples)
        inputs = NoisyImages(transition.noisier, transition.t, {})
        distilled, image = setup.predict(setup.generator, noisy, inputs)
        fake = setup.less_noisy(samples, image, transition)
        timesteps, real, fake = self._inputs(samples, transition, setup.real(samples, transition), fake)
        if setting.relativistic:
            logits = self._logits(torch.stack([real, fake]), timesteps, transition)
            adversarial = F.softplus(logits[0] - logits[1]).mean()
        else:
            adversarial = F.softplus(-self._logits(fake[None], timesteps, transition)).mean()
        return adversarial + setting.weight * (distilled - targets).square().mean()

    def _inputs(
        self, samples: MicroBatch, transition: Transition, real: torch.Tensor, fake: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Return timesteps, real and generated images, as the discriminator sees them."""
        timesteps, *images = self.setup.add_instance_noise(samples, transition.s, real, fake)
        augment = DifferentiableAugmentation(self.setting.augmentation, samples.rng, *real.shape[2:])
        return timesteps, *map(augment, images)

    def _logits(self, images: torch.Tensor, timesteps: torch.Tensor, transition: Transition) -> torch.Tensor:
        """Return the logits (N, B, heads) of images (N, B, C, H, W)."""
        assert self.setup.discriminator is not None
        count = len(images)
        flat = images.flatten(0, 1)
        if self.setting.pair:
            flat = torch.cat([flat, transition.noisier.repeat(count, 1, 1, 1)], dim=1)
        return self.setup.discriminator(flat, timesteps.repeat(count)).unflatten(0, (count, -1))


def build_discriminator(unet: UNet2DModel, setting: Setting) -> UNetDiscriminator:
    """Return a discriminator from the encoder of a UNet; that of a pair ignores the noisier image before training."""
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    if not setting.pretrained:
        unet = UNet2DModel(**config)
    if setting.pair:
        state = unet.state_dict()
        weight = state["conv_in.weight"]
        state["conv_in.weight"] = torch.cat([weight, torch.zeros_like(weight)], dim=1)
        unet = UNet2DModel(**config | {"in_channels": 2 * unet.config.in_channels})
        unet.load_state_dict(state)
    return UNetDiscriminator.from_unet(unet)


class Ablation:
    """Data, start model, and what all settings share."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.folder = args, Path(args.work_dir)
        self.start = load_start_model(args.start_model)
        self.start.scheduler.register_to_config(timestep_spacing="trailing")
        scheduler = few_step_scheduler(self.start.scheduler, STEP_COUNTS)
        self.unet, self.process = self.start.unet, FewStepProcess(scheduler, STEP_COUNTS)
        self.pipeline = DDPMPipeline(copy.deepcopy(self.unet).eval(), scheduler)
        self.pipeline.set_progress_bar_config(disable=True)
        source = open_source(args.images)
        config = self.unet.config
        preprocessing = Preprocessing(config.in_channels, config.sample_size, config.sample_size)
        cells = (source[index] for index in range(len(source)))
        self.images = torch.stack([preprocessing.finish(read_image(cell, preprocessing), 0) for cell in cells])
        self.folder.mkdir(parents=True, exist_ok=True)
        known = {key: value for key, value in vars(args).items() if key != "settings"}
        arguments = self.folder / "arguments.json"
        if arguments.exists() and json.loads(arguments.read_text()) != known:
            sys.exit(f"{self.folder} has results with other arguments ({arguments}): choose another --work_dir.")
        arguments.write_text(json.dumps(known))
        teacher = Teacher(self.start, FewStepProcess(self.start.scheduler, STEP_COUNTS), TEACHER_STEPS)
        self.teacher = generate_samples(
            teacher, TEACHER_SAMPLES, 0, self.folder / "teacher.safetensors", Accelerator(cpu=True)
        )
        self.extractor = load_extractor(args.feature_extractor)
        self.reference = self.extractor(to_bytes(self.images))["features"]

    def micro_batch(self, step: int, network: int) -> MicroBatch:
        """Random images, half of them mirrored; others in each step and for each network."""
        keys = [fold_in(0, step, index) for index in range(self.args.batch_size)]
        rng = PerSampleRNG(keys, torch.device("cpu"), stream=network)
        images = self.images[rng.integers(len(self.images))]
        mirrored = (rng.uniform() < 0.5)[:, None, None, None]
        return MicroBatch(torch.where(mirrored, images.flip(3), images), None, rng, step)

    def distilled(self) -> UNet2DModel:
        """Return the network after the first stage, which is trained once."""
        folder = self.folder / "distilled"
        if not folder.exists():
            steps = range(DISTILLATION_STEPS)
            setup = FewStepSetup(copy.deepcopy(self.unet), None, self.process)
            self.train(Losses(Setting(), setup, self.teacher), steps, DISTILLATION_LR).save_pretrained(folder)
        unet = UNet2DModel.from_pretrained(folder)
        assert isinstance(unet, UNet2DModel)
        return unet

    def train(self, losses: Losses, steps: range, lr: float) -> UNet2DModel:
        """Train both networks and return the generator with its EMA weights.

        The discriminator, if there is one, begins to train before the second stage.
        """
        setup = losses.setup
        generator, discriminator = setup.generator.train(), setup.discriminator
        ema = copy.deepcopy(generator)
        optimizers = [torch.optim.Adam(generator.parameters(), lr, betas=(0.5, 0.99), fused=True)]
        schedules = [two_stage_schedule(optimizers[0], len(steps))]
        head_start = 0
        if discriminator:
            head_start = DISCRIMINATOR_HEAD_START
            optimizers.append(
                torch.optim.Adam(discriminator.train().parameters(), LR_D, betas=(0.5, 0.99), fused=True)
            )
            schedules.append(two_stage_schedule(optimizers[1], len(steps) + head_start))
        for step in range(steps.start - head_start, steps.stop):
            if discriminator:
                generator.requires_grad_(False)
                discriminator.requires_grad_(True)
                self.update(losses.discriminator(self.micro_batch(step, 1)), optimizers[1], schedules[1])
                discriminator.requires_grad_(False)
            if step in steps:
                generator.requires_grad_(True)
                self.update(losses.generator(self.micro_batch(step, 0)), optimizers[0], schedules[0])
                count = 1 + step - steps.start
                decay = min(EMA_DECAY, count / (9 + count))
                with torch.no_grad():
                    for average, parameter in zip(ema.parameters(), generator.parameters(), strict=True):
                        average.lerp_(parameter, 1 - decay)
        assert isinstance(ema, UNet2DModel)
        return ema.eval()

    @staticmethod
    def update(
        loss: torch.Tensor, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LambdaLR
    ) -> None:
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    def measure(self, unet: UNet2DModel, name: str) -> dict[str, list[float]]:
        """Return Frechet distance, recall and coverage for each number of steps, and save grids of samples."""
        self.pipeline.unet.load_state_dict(unet.state_dict())
        metrics: dict[str, list[float]] = {}
        for count in STEP_COUNTS:
            images = sample_in_full_batches(
                lambda seeds, count=count: sample(self.pipeline, seeds, count), range(self.args.num_images), 32
            )
            image_grid(images[:36]).save(self.path(name, f"-{count}.png"))
            features = self.extractor(torch.stack([pil_to_tensor(image) for image in images]))["features"]
            manifold = manifold_metrics(features, self.reference)
            distance = frechet_distance(Gaussian.of(features), Gaussian.of(self.reference))
            values = {"FD": distance} | {key: manifold[key].value for key in ("recall", "coverage")}
            for key, value in values.items():
                metrics.setdefault(key, []).append(value)
        return metrics

    def path(self, name: str, suffix: str) -> Path:
        return self.folder / (name.replace(",", "").replace(" ", "-") + suffix)

    def result(self, name: str) -> dict[str, list[float]]:
        """Return the metrics of a setting, or of the distilled network; from the file, if it was measured before."""
        path = self.path(name, ".json")
        if not path.exists():
            start = synchronized_time()
            unet = self.distilled()
            if name in SETTINGS:
                setting = SETTINGS[name]
                torch.manual_seed(0)
                setup = FewStepSetup(
                    unet, build_discriminator(self.unet, setting), self.process, setting.instance_noise
                )
                steps = range(DISTILLATION_STEPS, DISTILLATION_STEPS + self.args.steps)
                unet = self.train(Losses(setting, setup, self.teacher), steps, LR_G)
            metrics = self.measure(unet, name) | {"seconds": [synchronized_time() - start]}
            path.write_text(json.dumps({"setting": asdict(SETTINGS.get(name, Setting())), "metrics": metrics}))
        return json.loads(path.read_text())["metrics"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--start_model", required=True, help="an unconditional pipeline, such as the result of ddgan demo"
    )
    parser.add_argument("--images", default=str(ROOT / "examples" / "data" / "twemoji-32"))
    parser.add_argument("--work_dir", default="ablation")
    parser.add_argument("--settings", nargs="+", choices=["distillation alone", *SETTINGS], metavar="NAME")
    parser.add_argument("--steps", type=int, default=250, help="adversarial steps")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_images", type=int, default=746)
    parser.add_argument("--feature_extractor", default="pixels-8x8")
    args = parser.parse_args()
    ablation = Ablation(args)
    print(f"{hardware()}; {args.steps} adversarial steps of {args.batch_size} images, {args.num_images} samples\n")
    steps = ", ".join(map(str, STEP_COUNTS))
    print(f"| | FD in {steps} steps | recall | coverage |\n|---|--:|--:|--:|")
    for name in args.settings or ["distillation alone", *SETTINGS]:
        metrics = ablation.result(name)
        cells = (" ".join(f"{value:.2f}" for value in metrics[key]) for key in ("FD", "recall", "coverage"))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
