"""Sampling from a network that is conditioned on a class or a context, with any scheduler and with guidance."""

import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image


class ClassConditionalPipeline(DiffusionPipeline):
    """
    Draws pictures of the classes that are asked for.

    With [classifier-free guidance](https://arxiv.org/abs/2207.12598) the network's output is
    unconditional + guidance_scale (conditional - unconditional); both come from one batch of twice the size, the first
    with the null class that the network was trained with.

    Args:
        unet (`ClassConditionedUnet`, `ContextUnet` or `UNet2DModel` with `num_class_embeds`):
            The network. Its config tells the number of classes (`num_classes`, `n_cfeat` or `num_class_embeds`), the
            null class, whose label is that number (there is one if `class_dropout` is above 0), and the names of the
            classes (`id2label`).
        scheduler (`SchedulerMixin`): any scheduler for the noise process that the network was trained with.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs: ClassVar = ["latents", "class_labels"]

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @property
    def num_classes(self) -> int:
        """The number of classes that the network knows, without the null class."""
        for name in ("num_classes", "n_cfeat", "num_class_embeds"):
            if self.unet.config.get(name):
                return self.unet.config[name]
        raise ValueError(
            f"This {type(self.unet).__name__} is not conditioned on a class: its config has none of `num_classes`, "
            "`n_cfeat` and `num_class_embeds`."
        )

    @property
    def has_null_class(self) -> bool:
        """Whether the network was trained with a null class, whose label is `num_classes`."""
        return bool(self.unet.config.get("class_dropout"))

    @property
    def labels(self) -> dict[str, int]:
        """The label of each name of a class; empty if the network knows no names."""
        id2label = self.unet.config.get("id2label") or {}
        pairs = id2label.items() if isinstance(id2label, dict) else enumerate(id2label)
        return {name: int(label) for label, name in pairs}

    def get_label_ids(self, names: Sequence[str]) -> list[int]:
        """
        The labels of classes by their names.

        Raises:
            `ValueError`: for a name that the network does not know, with the nearest ones.
        """
        labels = self.labels
        if not labels:
            raise ValueError(
                f"Class names {list(names)} were given, but this network knows none (its config has no `id2label`): "
                f"give labels from 0 to {self.num_classes - 1}."
            )
        for name in names:
            if name not in labels:
                nearest = difflib.get_close_matches(name, labels, cutoff=0)
                raise ValueError(
                    f"There is no class {name!r} among the {len(labels)} of this network. The nearest names are "
                    f"{', '.join(map(repr, nearest))}."
                )
        return [labels[name] for name in names]

    def encode_class_labels(self, class_labels, batch_size: int | None = None) -> torch.Tensor:
        """
        Makes what the network is conditioned on from what `__call__` takes as `class_labels` and `batch_size`.

        Returns:
            `torch.Tensor`: integers of shape `(batch_size,)`, or float contexts of shape `(batch_size, n_cfeat)`.

        Raises:
            `ValueError`: for labels out of range, unknown names, contexts of the wrong width or for a network that
                takes none, and if their number is not `batch_size`.
        """
        if isinstance(class_labels, str):
            class_labels = self.get_label_ids([class_labels])[0]
        elif isinstance(class_labels, list | tuple):
            names = [label for label in class_labels if isinstance(label, str)]
            ids = iter(self.get_label_ids(names) if names else [])
            class_labels = [next(ids) if isinstance(label, str) else label for label in class_labels]
        encoded = torch.as_tensor(class_labels)

        classes, width = self.num_classes, self.unet.config.get("n_cfeat")
        if encoded.is_floating_point() or encoded.ndim > 1:
            if width is None:
                raise ValueError(
                    f"`class_labels` is {encoded.dtype} of shape {tuple(encoded.shape)}, but a "
                    f"{type(self.unet).__name__} takes no contexts: give one integer label a picture."
                )
            if encoded.ndim not in (1, 2) or encoded.shape[-1] != width:
                raise ValueError(
                    f"`class_labels` is a context of shape {tuple(encoded.shape)}, but must be a matrix of {width} "
                    f"columns, one for each class of this network: (batch_size, {width}), or ({width},) for all "
                    "pictures alike."
                )
            encoded = encoded.to(torch.promote_types(self.unet.dtype, torch.float32))
            is_single = encoded.ndim == 1
        else:
            encoded = encoded.long()
            is_single = encoded.ndim == 0
            known = range(classes + self.has_null_class)
            unknown = sorted({label for label in encoded.flatten().tolist() if label not in known})
            if unknown:
                null = f", and {classes} for the null class" if self.has_null_class else ""
                raise ValueError(
                    f"`class_labels` holds {', '.join(map(str, unknown))}, but this network has {classes} classes, "
                    f"whose labels are 0 to {classes - 1}{null}."
                )

        if is_single:
            encoded = encoded.expand(1 if batch_size is None else batch_size, *encoded.shape)
        elif batch_size not in (None, len(encoded)):
            raise ValueError(
                f"`class_labels` has {len(encoded)} entries, but `batch_size` is {batch_size}: give one label a "
                "picture, or a single one for all of them."
            )
        return encoded

    def check_inputs(
        self,
        batch_size: int | None,
        guidance_scale: float,
        num_inference_steps: int,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ):
        if not hasattr(self.scheduler, "init_noise_sigma"):
            raise ValueError(
                f"A {type(self.scheduler).__name__} cannot sample here: it does not say the scale of the noise to "
                "begin with (`init_noise_sigma`), as those of flow matching do not. DDPM, DDIM, DPM-Solver++, UniPC "
                "and Euler do."
            )
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}, but must be at least 1.")
        if num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` is {num_inference_steps}, but must be at least 1.")
        if guidance_scale > 1 and not self.has_null_class:
            raise ValueError(
                f"`guidance_scale` is {guidance_scale}, but this {type(self.unet).__name__} was not trained with a "
                "null class (its config has no `class_dropout` above 0), so there is nothing to guide away from. "
                "Sample with `guidance_scale=1`, or train it with class dropout."
            )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` is {output_type!r}, but must be 'pil', 'np', 'pt' or 'latent'.")
        if not set(callback_on_step_end_tensor_inputs) <= set(self._callback_tensor_inputs):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` is {callback_on_step_end_tensor_inputs}, but a callback can be "
                f"given only {self._callback_tensor_inputs}."
            )

    def prepare_latents(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """The noise that sampling begins with, drawn or as given, at the scale of the scheduler."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, self.unet.config.in_channels, height, width)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` is a list of {len(generator)}, but must have one for each of the {batch_size} pictures "
                "that `class_labels` and `batch_size` ask for."
            )
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=dtype)
        elif latents.shape != shape:
            raise ValueError(f"`latents` has the shape {tuple(latents.shape)}, but must have {shape}.")
        return latents.to(self._execution_device, dtype) * self.scheduler.init_noise_sigma

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int] | Sequence[str] | np.ndarray | torch.Tensor,
        batch_size: int | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
    ) -> ImagePipelineOutput | tuple[list[Image.Image] | np.ndarray | torch.Tensor]:
        """
        Draws one picture for each class label.

        Noise is drawn and the sample is kept in float32; the network alone runs in its own dtype.

        Args:
            class_labels (`int`, `str`, a list of them, or `torch.Tensor`):
                Labels of classes, or their names if the network knows them. For a `ContextUnet` also a float matrix
                `(batch_size, n_cfeat)` of contexts, zeros for none. A single label, name or context is for all
                pictures alike.
            batch_size (`int`, *optional*):
                Number of pictures; needed only with a single label, where it is 1 if left out.
            guidance_scale (`float`, defaults to 1.0):
                Strength of classifier-free guidance, which is used above 1 and needs a null class.
            num_inference_steps (`int`, defaults to 50): number of steps, as the scheduler counts them.
            eta (`float`, defaults to 0.0):
                For `DDIMScheduler` and others whose `step` takes it: 0 adds no noise, 1 that of DDPM.
            generator (`torch.Generator` or a list of one for each picture, *optional*):
                Source of all noise; with a list, picture i depends on generator i alone.
            latents (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`, *optional*):
                Standard normal noise to begin with, in place of that drawn first.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`: PIL images, of mode L for one channel; `"np"`: an array `(batch_size, height, width,
                channels)` in [0, 1]; `"pt"`: a tensor `(batch_size, channels, height, width)` in [0, 1]; `"latent"`:
                that tensor as sampling leaves it, about [-1, 1].
            return_dict (`bool`, defaults to `True`): an [`ImagePipelineOutput`] or a tuple of its images.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step as `callback(pipe, step, timestep, callback_kwargs)`; tensors in the dictionary
                that it returns take the place of those here. `pipe._interrupt = True` ends sampling.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                What `callback_kwargs` holds: `"latents"`, and `"class_labels"` as the network is given them, with the
                null class first where there is guidance.

        Raises:
            `ValueError`: for labels out of range, unknown names (with the nearest ones), contexts of the wrong width,
                guidance of a network without null class, numbers of pictures that contradict one another, fewer than
                one step, and a scheduler of flow matching.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_inputs(
            batch_size, guidance_scale, num_inference_steps, output_type, callback_on_step_end_tensor_inputs
        )
        self._guidance_scale = guidance_scale
        self._interrupt = False

        device, dtype = self._execution_device, torch.promote_types(self.unet.dtype, torch.float32)
        class_labels = self.encode_class_labels(class_labels, batch_size).to(device)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        self._num_timesteps = len(self.scheduler.timesteps)
        latents = self.prepare_latents(len(class_labels), generator, latents, dtype)
        if self.do_classifier_free_guidance:
            null = 0 if class_labels.is_floating_point() else self.num_classes
            class_labels = torch.cat([torch.full_like(class_labels, null), class_labels])
        accepted = inspect.signature(self.scheduler.step).parameters
        # guidance leaves the range of pictures: where DDIM clips its prediction, the noise must be that of the clipped
        # one, or the two lead away from anything that the network knows
        clipped = self.do_classifier_free_guidance
        step_kwargs = {"eta": eta, "generator": generator, "use_clipped_model_output": clipped}
        step_kwargs = {name: value for name, value in step_kwargs.items() if name in accepted}

        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            if self.interrupt:
                continue
            model_input = torch.cat([latents, latents]) if self.do_classifier_free_guidance else latents
            model_input = self.scheduler.scale_model_input(model_input, t).to(self.unet.dtype)
            output = self.unet(model_input, t, class_labels=class_labels, return_dict=False)[0].to(dtype)
            if self.do_classifier_free_guidance:
                unconditional, conditional = output.chunk(2)
                output = unconditional + self.guidance_scale * (conditional - unconditional)
            latents = self.scheduler.step(output, t, latents, **step_kwargs).prev_sample

            if callback_on_step_end is not None:
                available = {"latents": latents, "class_labels": class_labels}
                chosen = {name: available[name] for name in callback_on_step_end_tensor_inputs}
                returned = callback_on_step_end(self, i, t, chosen)
                latents = returned.get("latents", latents)
                class_labels = returned.get("class_labels", class_labels)

        self.maybe_free_model_hooks()

        images = latents
        if output_type != "latent":
            images = (images / 2 + 0.5).clamp(0, 1)
        if output_type in ("np", "pil"):
            images = images.permute(0, 2, 3, 1).cpu().float().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)


"""Pipeline folders that are complete in themselves: code beside the weights, in the form that plain Diffusers reads.

The text of this file is added to that of each pipeline that is saved, so that a pipeline which was loaded with nothing
but Diffusers can be saved and pushed the same way, any number of times. It needs nothing that Diffusers does not.
"""

import hashlib
import json
import os
import re
import sys
import time
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers.utils import make_image_grid
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image
from PIL.PngImagePlugin import PngInfo

SAMPLES = "card_samples.png"


def complete_in_itself(pipeline_class: type) -> type:
    """
    Class decorator: `save_pretrained` and `push_to_hub` of this pipeline give folders that load anywhere.

    Beside the weights lie the files that define the pipeline and those of its components that are not Diffusers' or
    Transformers' own:

        model_index.json  pipeline_x_0123456789ab.py  unet/{config.json, unet_x_0123456789ab.py, ...}  scheduler/...

    Their names change with their contents, because Diffusers keeps the files of all pipelines in one folder, under
    these names. `AutoModel` loads a model alone, by its folder or, if the pipeline has only this one, by `subfolder`.
    No file tells from where something was loaded. Other versions of the files that are in the folder stay, and nothing
    refers to them: the folder can be loaded at any time while it is written.

    What is pushed to the Hub has the card of `card_of_parts` in the place of the template that Diffusers fills in with
    nothing, with pictures that are drawn then. A card that somebody wrote stays: that of the folder, or else that of
    the repository.

    Diffusers executes such a file again at each load, in the same module: what a method finds under the name of a
    class of its file may be a newer class than that of its own object.

    Raises:
        ValueError: on saving, for a class whose file cannot travel: there is none, or it has relative imports.
    """

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Writes model_index.json, which Diffusers does when all else is saved and before it uploads anything."""
        folder = Path(json_file_path).parent
        self._own_card = _read_text(folder / "README.md")  # the next that Diffusers writes
        index = json.loads(self.to_json_string())
        index.pop("_name_or_path", None)

        auto_map, models = {}, 0
        for name in self.components:
            library, class_name = index.get(name) or (None, None)
            module, in_config = sys.modules.get(library), {}
            if module is not None and library.partition(".")[0] not in ("diffusers", "transformers"):
                index[name] = [_add_code(folder / name, module, class_name), class_name]
                in_config = _auto_map(*index[name])
            for file in (folder / name).glob("*.json"):
                _edit_json(file, in_config if file.name == "config.json" else {})
            if (folder / name / "config.json").is_file():
                auto_map, models = auto_map or in_config, models + 1
        if models == 1:  # what AutoModel reads here it takes for every subfolder
            index |= auto_map

        module, class_name = sys.modules[type(self).__module__], type(self).__name__
        this_file = ""
        if module.__name__ != complete_in_itself.__module__:
            this_file = f"\n\n{Path(__file__).read_text(encoding='utf-8')}\n\ncomplete_in_itself({class_name})\n"
        index["_class_name"] = [_add_code(folder, module, class_name, this_file), class_name]
        _write(Path(json_file_path), _json_text(index))

    def _upload_folder(self, working_dir: str | os.PathLike, repo_id: str, *args, **kwargs):
        """Uploads what was saved, which Diffusers does when it has put its card there."""
        file = Path(working_dir, "README.md")
        card = self._own_card if self._own_card and not is_unwritten(self._own_card) else _read_text(file)
        if card and (is_unwritten(card) or shows_samples(card)):
            draw_samples(self, file.parent)
        if card:
            _write(file, card_of_parts(file.parent, repo_id) if is_unwritten(card) else card)
        return super(pipeline_class, self)._upload_folder(working_dir, repo_id, *args, **kwargs)

    pipeline_class.to_json_file = to_json_file
    pipeline_class._upload_folder = _upload_folder
    return pipeline_class


def pipeline_parts(folder: Path) -> dict[str, str]:
    """The class names of a pipeline's parts, by the names of the parts."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    pairs = {name: value for name, value in index.items() if isinstance(value, list) and not name.startswith("_")}
    return {name: class_name for name, (_, class_name) in pairs.items() if class_name}


def code_files(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of code that Diffusers runs when it loads a pipeline folder, by its path in there."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    named = [Path(f"{index['_class_name'][0]}.py")] if isinstance(index["_class_name"], list) else []
    named += [Path(name, f"{index[name][0]}.py") for name in pipeline_parts(folder)]
    there = [path for path in named if (folder / path).is_file()]
    return {path.as_posix(): hashlib.sha256((folder / path).read_bytes()).hexdigest() for path in there}


def card_of_parts(folder: Path, repo_id: str) -> str:
    """The model card of a pipeline folder of which nothing is known but what it holds, as the repository `repo_id`."""
    name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    parts = [f"`{class_name}` ({part})" for part, class_name in pipeline_parts(folder).items()]
    rows = [f"| `{file}` | SHA-256 `{digest}` |" for file, digest in code_files(folder).items()]
    trust = ", trust_remote_code=True" if rows else ""
    caption = _caption(folder / SAMPLES)
    lines = [
        "---",
        "library_name: diffusers",
        "pipeline_tag: unconditional-image-generation",
        "tags:",
        "- diffusers",
        "- unconditional-image-generation",
        "---",
        f"\n# {repo_id.rpartition('/')[2]}",
        f"\nA `{name if isinstance(name, str) else name[1]}` of {' and '.join(parts)}.",
        *([f"\n![{caption}]({SAMPLES})\n\n*{caption}*"] if caption else []),
        "\n## Use",
        "\n```python\nfrom diffusers import DiffusionPipeline",
        f'\npipe = DiffusionPipeline.from_pretrained("{repo_id}"{trust})\n```',
    ]
    if rows:
        lines += ["\n## Code", "\n`trust_remote_code=True` runs these files of this repository:"]
        lines += ["\n| | |", "|---|---|", *rows]
    lines += [
        "\n## Limits and licence",
        "\nWhat it was trained on, what it draws well, and the licence of the weights are not known here: look them "
        "up before passing this on.",
    ]
    text = "\n".join(lines) + "\n"
    return f"{text}\n<!-- Pushing this pipeline renews the card, until somebody changes it: {_digest(text)} -->\n"


def draw_samples(pipe: Any, folder: Path) -> None:
    """
    Puts the pictures that `card_of_parts` shows into a folder, in the place of those of earlier weights.

    They are of seeds 0 to 8, of a network's classes in turn. If they cannot be drawn there are none, which a warning
    says. A file of that name which this function has not made stays.
    """
    file = folder / SAMPLES
    if file.exists() and not _caption(file):
        return
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    in_training = [module for network in networks for module in network.modules() if module.training]
    try:
        for module in in_training:
            module.training = False
        arguments = sample_arguments(pipe, 9)
        images = pipe(**arguments).images
        how = [f"Seeds 0 to 8, {len(pipe.scheduler.timesteps)} steps"]
        how += ["the classes in turn"] * ("class_labels" in arguments) + ["no guidance"] * ("loss" in arguments)
        caption = PngInfo()
        caption.add_text("Caption", f"{', '.join(how)}; nothing left out.")
        factor = max(1, 96 // max(images[0].size))
        images = [image.resize((factor * image.width, factor * image.height), Image.NEAREST) for image in images]
        temporary = file.with_name(f".tmp-{os.getpid()}-{file.name}")
        make_image_grid(images, 3, 3).save(temporary, pnginfo=caption)
        os.replace(temporary, file)
    except Exception as error:  # whatever it is, it is no reason not to publish the weights
        file.unlink(missing_ok=True)
        warnings.warn(f"The model card has no pictures, because none could be drawn: {error}", stacklevel=2)
    finally:
        for module in in_training:
            module.training = True


def _caption(file: Path) -> str | None:
    """How the pictures were drawn that `draw_samples` has put into a file; None if it has not."""
    try:
        with Image.open(file) as picture:
            return picture.info.get("Caption")
    except OSError:  # there is none, or something else
        return None


def sample_arguments(pipe: Any, count: int, num_inference_steps: int | None = None) -> dict[str, Any]:
    """What a pipeline is called with for the pictures of the seeds from 0 on, of a network's classes in turn.

    Args:
        num_inference_steps: None leaves it to the pipeline, up to 50.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    arguments: dict[str, Any] = {"generator": [torch.Generator().manual_seed(seed) for seed in range(count)]}
    if steps := num_inference_steps or accepted["num_inference_steps"].default:
        arguments["num_inference_steps"] = min(steps, 50, pipe.scheduler.config.get("num_train_timesteps", 50))
    if "loss" in accepted:  # which does not move them
        arguments |= {"loss": lambda images: images.square().mean((1, 2, 3)), "guidance_scale": 0.0}
    if "class_labels" in accepted:
        sizes = [pipe.unet.config.get(name) for name in ("num_classes", "n_cfeat", "num_class_embeds")]
        if classes := next(filter(None, sizes), None):
            arguments["class_labels"] = [seed % classes for seed in range(count)]
    if "batch_size" in accepted:
        arguments["batch_size"] = count
    return arguments


def shows_samples(card: str) -> bool:
    """Whether a card shows the pictures of `draw_samples`, as one that somebody has changed may still do."""
    return f"]({SAMPLES})" in card


def is_unwritten(card: str) -> bool:
    """Whether a card is as `card_of_parts` made it, or the template of Diffusers."""
    if made := re.search(r"\n<!-- Pushing .*: ([0-9a-f]{12}) -->\n$", card):
        return _digest(card[: made.start()]) == made[1]
    said = re.search(r"^This is the model card of .* automatically generated\.$", card, re.MULTILINE)
    metadata = ModelCardData(library_name="diffusers")
    return bool(said) and card == str(ModelCard.from_template(metadata, model_description=said[0]))


def _add_code(folder: Path, module: ModuleType, class_name: str, more_code: str = "") -> str:
    """Puts a module's file with `more_code` at its end into a folder; returns its name there, without the suffix."""
    source = getattr(module, "__file__", None)
    if source is None or module.__name__ == "__main__":
        raise ValueError(
            f"The class {class_name} cannot be saved with its code, because it was not imported from a file of its "
            "own. Define it in a file that imports installed packages only, and import it from there."
        )
    code = _read_code(Path(source)) + more_code
    if re.search(r"^\s*(from|import)\s+\.", code, re.MULTILINE):
        raise ValueError(
            f"The class {class_name} cannot be saved with its code, because {Path(source).name} has relative imports, "
            "and it travels alone. Have it import installed packages only."
        )
    stem = re.sub("_[0-9a-f]{12}$", "", Path(source).stem) + f"_{_digest(code)}"
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / f"{stem}.py", code)
    return stem


def _read_code(file: Path) -> str:
    """
    The text of a file. One that is named by its contents may not be whole for a moment, while Diffusers in another
    process copies it anew to where all its files of code lie: it is read again until it is, or for some seconds.
    """
    named = re.search("_([0-9a-f]{12})$", file.stem)
    for _ in range(100):
        code = file.read_text(encoding="utf-8")
        if named is None or _digest(code) == named[1]:
            break
        time.sleep(0.05)
    return code


def _digest(code: str) -> str:
    return hashlib.sha256(code.encode("utf-8")).hexdigest()[:12]


def _auto_map(stem: str, class_name: str) -> dict:
    """What names a model's class to `AutoModel`, and keeps Diffusers from warning of it as an unknown setting."""
    return {"auto_map": {"AutoModel": f"{stem}.{class_name}"}, "_use_default_values": {"auto_map": True}}


def _edit_json(file: Path, more: dict) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(config, dict) and (more or "_name_or_path" in config):
        config.pop("_name_or_path", None)
        _write(file, _json_text({**config, **more}))


def _json_text(config: dict) -> str:
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _read_text(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _write(file: Path, text: str) -> None:
    """Writes a file under a temporary name and renames it, so that it is always whole."""
    temporary = file.with_name(f".tmp-{os.getpid()}-{file.name}")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, file)


complete_in_itself(ClassConditionalPipeline)
