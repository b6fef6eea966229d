"""Setup shared by all training scripts, from Python or the command line.

Each command is a function that takes its argument dataclasses and opens a session; `ddgan.api` calls these functions
from Python with the flags as keywords.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration
from PIL import Image

from ..core.accelerator import start_accelerate
from ..core.errors import InputError
from ..core.locks import check_unlocked
from ..data.arguments import check_value_range
from ..data.preprocessing import Preprocessing
from ..data.sources import ImageSource
from ..sampling.grids import image_grid, rows_by_class
from .arguments import (
    MAX_GRID_IMAGES,
    DataArguments,
    EvaluationArguments,
    LabelArguments,
    RunArguments,
    ValidationArguments,
)
from .evaluator import Evaluator
from .job import TrainingJob
from .loading import TrainingData
from .loop import Trainer
from .model_card import FinishedRun, repository_id
from .run_folder import RunFolder
from .tracking import tracker_names

logger = logging.getLogger(__name__)


@dataclass
class Session:
    """A training run that is ready to start.

    Attributes:
        run: its arguments.
        accelerator: the Accelerate setup that it runs on.
        repo_id: the repository to upload it to, in the main process.
    """

    run: RunArguments
    accelerator: Accelerator
    repo_id: str | None = None

    @classmethod
    def open(cls, run: RunArguments, supports_fsdp: bool = False, supports_fp16: bool = True) -> "Session":
        """Check that the run folder can be used and the user is logged in to the Hub, and start Accelerate.

        Args:
            supports_fsdp: whether the network of the run and its optimizer can be sharded.
            supports_fp16: whether the losses of the run can be computed in fp16.

        Raises:
            InputError: if the folder holds a run that is not being resumed, another command is writing to it, a
                tracker is not installed, the configuration of Accelerate or the mixed precision is not supported, or
                the Hub does not accept the user.
        """
        accelerator = _start(run, supports_fp16)
        if accelerator.is_fsdp2 and not supports_fsdp:
            raise InputError(
                "FSDP is supported by ddgan finetune alone, and not with --use_8bit_adam, which bitsandbytes cannot "
                "shard. Train without sharding, in one or several processes, or omit --use_8bit_adam."
            )
        uploads = run.push_to_hub and not run.dry_run
        repo_id = repository_id(run) if uploads and accelerator.is_main_process else None
        return cls(run, accelerator, repo_id)

    def load_data(
        self,
        args: DataArguments,
        channels: int,
        size: Sequence[int],
        labels: LabelArguments | None = None,
        source: ImageSource | None = None,
        classes: Sequence[str] | None = None,
        validation: ValidationArguments | None = None,
    ) -> TrainingData:
        """Open the training images, and those for the validation loss.

        Args:
            channels: channels of the images that the network takes, 1 to 4.
            size: height and width.
            labels: where the class labels are, if the run uses them.
            source: the images, if they are only a subset of those in `args`.
            classes: class names of the start model, which the labels must fit.
            validation: which images to hold out; None if the run has no validation loss. The loss is that of the
                first network.
        """
        height, width = size
        return TrainingData(
            args,
            Preprocessing(
                channels,
                height,
                width,
                args.center_crop,
                args.random_flip,
                check_value_range(args.value_range),
            ),
            self.accelerator.process_index,
            labels,
            source,
            classes,
            validation,
            batch_size=self.run.batch_size,
            accumulation=self.run.grad_accumulation_steps,
            processes=self.accelerator.num_processes,
            seed=self.run.seed,
        )

    def plan_grid(
        self, classes: Sequence[str] | None
    ) -> tuple[list[int] | None, Callable[[list[Image.Image]], Image.Image]]:
        """Plan the sample grids of the run, with one row per class if there are classes.

        `run.num_samples` is then rounded up to full rows, as far as a grid may have so many images.

        Returns:
            `labels` and `grid` of a `TrainingJob`.
        """
        if not classes:
            return None, image_grid
        classes = classes[:MAX_GRID_IMAGES]
        most = MAX_GRID_IMAGES // len(classes) * len(classes)
        labels, grid = rows_by_class(min(self.run.num_samples, most), classes)
        self.run = replace(self.run, num_samples=len(labels))
        return labels, grid

    def train(
        self, job: TrainingJob, data: TrainingData, evaluation: EvaluationArguments | None = None
    ) -> FinishedRun:
        """Run a training job, with evaluations if `evaluation.eval_every` is set, or only describe it in a dry run.

        Raises:
            InputError, RunError, RunStopped: see `Evaluator` and `Trainer.train`.
        """
        evaluator = None
        if evaluation and evaluation.eval_every and not self.run.dry_run:  # it writes the features that it measures
            evaluator = Evaluator(evaluation, self.run, data, self.accelerator)
        trainer = Trainer(job, data, self.run, self.accelerator, evaluator, self.repo_id)
        return trainer.preview() if self.run.dry_run else trainer.train()


def _start(run: RunArguments, supports_fp16: bool = True) -> Accelerator:
    """Check that the run folder can be used, and start Accelerate; no file is written yet."""
    folder = RunFolder(run.output_dir)
    folder.check_usable(resuming=bool(run.resume_from_checkpoint))
    accelerator = start_accelerate(
        run.grad_accumulation_steps,
        mixed_precision=run.mixed_precision,
        log_with=tracker_names(run.report_to) or None,
        project_config=ProjectConfiguration(project_dir=str(folder.path), logging_dir=str(folder.logs)),
        step_scheduler_with_optimizer=False,
    )
    if accelerator.mixed_precision == "fp16" and not supports_fp16:
        raise InputError(
            "This run would use fp16 (--mixed_precision, or the configuration of Accelerate), whose range is too "
            "small for the gradients that a generator gets through its discriminator. Use --mixed_precision bf16, "
            "which has the range of float32, or no."
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("--mixed_precision fp16 needs a GPU. On a CPU, use bf16 or no.")
    if accelerator.mixed_precision == "bf16" and accelerator.device.type == "cpu":
        logger.warning(
            "On most CPUs bf16 trains several times slower than fp32: pass --mixed_precision no (bf16 comes from "
            "--mixed_precision or the configuration of Accelerate)."
        )
    if accelerator.distributed_type == DistributedType.FSDP and (run.channels_last or not accelerator.is_fsdp2):
        raise InputError(
            "FSDP training needs FSDP version 2 (fsdp_version: 2, as in examples/accelerate/fsdp.yaml) and does not "
            "support --channels_last, since FSDP shards contiguous parameters only."
        )
    check_unlocked(folder.path, accelerator)
    accelerator.wait_for_everyone()  # all processes must check the folder before the main process writes to it
    return accelerator
