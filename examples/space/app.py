"""A Gradio page that generates images guided by a color, a text prompt or a class.

    ddgan space
    ddgan space --pipeline google/ddpm-cifar10-32

It offers the embedded pipelines, or those in the environment variable DDGAN_PIPELINE: folders or Hub repositories,
separated by commas. DDGAN_CLIP sets the CLIP model for text guidance.

Together with the package `ddgan` this folder is a Hugging Face Space: ddgan push --space uploads both.
"""

import functools
import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read by the next import

import gradio as gr
from generation import (
    ALL_CLASSES,
    DEFAULT_CLASS_GUIDANCE,
    MAX_IMAGES,
    MAX_PROMPT_LENGTH,
    MAX_SEED,
    GenerationRequest,
    GenerationResult,
    Model,
    StepProgress,
    enlarge,
    find_clip,
    generate,
    generate_guided,
    guidance_loss,
    load_models,
    mean_loss,
    most_similar,
    save_zip,
    user_message,
)
from limits import RequestLimits, ShortLines
from starlette.middleware import Middleware

from ddgan.core.errors import run_command

TITLE = """
# Guided diffusion
Generate images guided by a color, a text prompt or a class, and see how few steps a Denoising Diffusion GAN needs.
"""
COURSE_EXAMPLES = [["#BB2266", 3], ["#44CCAA", 5]]
MAX_QUEUE = 16  # waiting requests; one is processed at a time
THEME = gr.themes.Default(  # system fonts need no download; darker buttons have enough contrast
    primary_hue="teal", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800")
CSS = """
.gradio-container {width: 100%; max-width: 1180px !important; margin: auto}
.note * {color: var(--block-title-text-color); font-size: var(--text-md)}
.picker, .picker > div {overflow: visible !important; position: relative; z-index: 100}
.picker .color-picker {position: absolute; z-index: 100; background: var(--background-fill-primary)}
.picker .dialog-button {width: 100%; height: var(--size-9); border-radius: var(--radius-md)}
.classes .wrap {max-height: 16rem; overflow-y: auto}
.classes label {min-width: 2.6rem; justify-content: center}
.classes label.selected {background: var(--button-primary-background-fill); color: var(--button-primary-text-color)}
.classes label:focus-within {outline: 2px solid var(--color-accent)}
.classes input {position: absolute; opacity: 0}
.classes label span {margin: 0 !important}
.view label {position: static !important; border: none !important; background: none !important}
.view .grid-wrap {min-height: 0 !important; max-height: none !important; overflow: visible !important}
.view .grid-container {
  grid-template-columns: repeat(auto-fill, minmax(min(var(--side), 45%), 1fr)) !important;
  grid-template-rows: none !important;
  grid-auto-rows: auto !important;
  --side: 136px;
}
.five .grid-container {--side: 84px}
"""
VIEW = {"format": "png", "interactive": False, "buttons": ["download", "fullscreen"]}
ONE_AT_A_TIME = {"concurrency_limit": 1, "concurrency_id": "generation"}
SILENT = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
PROGRESS = gr.Progress()
DOWNLOADS = TemporaryDirectory()


def show_errors(handler: Callable) -> Callable:
    """Wrap an event handler so that the page shows its errors."""

    @functools.wraps(handler)
    def wrapped(*args):
        try:
            return handler(*args)
        except Exception as error:
            message = user_message(error)
        raise gr.Error(message, duration=30, print_exception=False)

    return wrapped


def build(models: dict[str, Model], clip: str | None, why_no_clip: str) -> gr.Blocks:
    """Build the page for these models; without a CLIP model, it shows `why_no_clip` in place of text guidance."""
    ddgans = [model for model in models.values() if model.is_ddgan]
    others = [model for model in models.values() if not model.is_ddgan]
    with gr.Blocks(
        title="Guided diffusion", analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)
    ) as page:
        gr.Markdown(TITLE)
        with gr.Tabs():
            with gr.Tab("Generate"):
                generation_tab(models, clip, why_no_clip)
            if ddgans and others:
                with gr.Tab("Compare"):
                    comparison_tab(ddgans, others)
    return page.queue(max_size=MAX_QUEUE)


# ---------------------------------------------------------------------------------------------------------------------
# Generation, with or without guidance: the components and their events


def generation_tab(models: dict[str, Model], clip: str | None, why_no_clip: str) -> None:
    first = next(iter(models.values()))
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            choice = model_choice(first, list(models))
            with gr.Tabs() as guidance_tabs:
                with gr.Tab("Color", id="color"):
                    by_color = color_controls(first)
                with gr.Tab("Text prompt", id="prompt"):
                    by_prompt = prompt_controls() if clip else gr.Markdown(why_no_clip, elem_classes="note")
                with gr.Tab("Plain sampling", id="plain"):
                    plain = plain_controls(first)
            settings = settings_controls(first)
        with gr.Column(scale=6, min_width=300):
            result = result_components()

    inputs = {*vars(choice).values(), *vars(settings).values()}
    outputs = list(vars(result).values())

    def read_request(data: dict) -> tuple[Model, GenerationRequest]:
        controls = (settings.num_images, settings.steps, settings.scheduler, settings.seed, choice.label)
        return models[data[choice.name]], GenerationRequest(*(data[control] for control in controls))

    def run_guided(data: dict, kind: str, target: str, scale: float, progress) -> dict:
        loss = guidance_loss(kind, target, clip)
        model, request = read_request(data)
        step_progress = StepProgress(progress)
        guided = generate_guided(model, request, step_progress, loss, scale, data[settings.gradient])
        unguided = generate(model, request, step_progress) if data[settings.show_unguided] else None
        text = f"Distance to the {kind}: **{mean_loss(guided.images, loss):.2f}**"
        if unguided:
            text += f", unguided {mean_loss(unguided.images, loss):.2f}"
        return show(result, model, request, guided, f"{text} · {caption(request, guided)}", unguided)

    @show_errors
    def generate_by_color(data, progress=PROGRESS):
        return run_guided(data, "color", data[by_color.color] or "", data[by_color.scale], progress)

    @show_errors
    def generate_by_prompt(data, progress=PROGRESS):
        return run_guided(data, "prompt", data[by_prompt.prompt], data[by_prompt.scale], progress)

    @show_errors
    def generate_plain(data, progress=PROGRESS):
        model, request = read_request(data)
        if model.is_ddgan and data[plain.vary] != "both":
            request = replace(request, vary=data[plain.vary])
        generated = generate(model, request, StepProgress(progress), data[plain.class_guidance])
        return show(result, model, request, generated, caption(request, generated))

    event = {"outputs": outputs, "show_progress_on": result.images, **ONE_AT_A_TIME}
    by_color.button.click(generate_by_color, inputs | {by_color.color, by_color.scale}, **event)
    plain.button.click(generate_plain, inputs | {plain.class_guidance, plain.vary}, **event)
    if clip:
        triggers = [by_prompt.button.click, by_prompt.prompt.submit]
        gr.on(triggers, generate_by_prompt, inputs | {by_prompt.prompt, by_prompt.scale}, **event)

    def select_model(name: str) -> dict:
        model = models[name]
        return {
            choice.description: model.describe(),
            choice.label: class_choice(model),
            by_color.available: gr.Column(visible=model.is_color),
            by_color.unavailable: gr.Column(visible=not model.is_color),
            plain.class_guidance: gr.Slider(visible=model.supports_class_guidance, value=DEFAULT_CLASS_GUIDANCE),
            plain.vary: gr.Radio(visible=model.is_ddgan),
            settings.steps: gr.Slider(maximum=model.max_steps, value=model.default_steps),
            settings.scheduler: gr.Dropdown(model.schedulers, value=model.schedulers[0]),
            guidance_tabs: gr.Tabs(selected="color" if model.is_color else "plain"),
        }

    updated = [choice.description, choice.label, by_color.available, by_color.unavailable, plain.class_guidance]
    updated += [plain.vary, settings.steps, settings.scheduler, guidance_tabs]
    choice.name.change(select_model, choice.name, updated, **SILENT)


def model_choice(first: Model, names: list[str]) -> SimpleNamespace:
    name = gr.Radio(names, value=first.name, label="Model")
    description = gr.Markdown(first.describe(), elem_classes="note")
    return SimpleNamespace(name=name, description=description, label=class_choice(first))


def class_choice(model: Model) -> gr.Radio:
    choices = [("all in turn", ALL_CLASSES), *((name, label) for label, name in enumerate(model.classes))]
    return gr.Radio(choices, value=ALL_CLASSES, label="Class", visible=bool(model.classes), elem_classes="classes")


def color_controls(first: Model) -> SimpleNamespace:
    with gr.Column(visible=first.is_color) as available:
        color = gr.ColorPicker("#BB2266", label="Color", elem_classes="picker")
        scale = guidance_slider()
        button = gr.Button("Generate", variant="primary")
        with gr.Row():
            # filled in by the browser, so that a click on Generate right afterwards uses the new values
            for example in COURSE_EXAMPLES:
                example_button = gr.Button("{} at scale {}".format(*example), size="sm")
                script = f"() => {json.dumps(example)}"
                example_button.click(None, None, [color, scale], js=script, api_visibility="private")
    with gr.Column(visible=not first.is_color) as unavailable:
        gr.Markdown("This model generates grayscale images. Use *Plain sampling* instead.", elem_classes="note")
    return SimpleNamespace(available=available, unavailable=unavailable, color=color, scale=scale, button=button)


def prompt_controls() -> SimpleNamespace:
    prompt = gr.Textbox(label="Prompt", placeholder="a red rose", max_length=MAX_PROMPT_LENGTH)
    scale = guidance_slider()
    return SimpleNamespace(prompt=prompt, scale=scale, button=gr.Button("Generate", variant="primary"))


def plain_controls(first: Model) -> SimpleNamespace:
    class_guidance = gr.Slider(
        *(1, 10, DEFAULT_CLASS_GUIDANCE),
        step=0.5,
        label="Class guidance scale",
        info="Classifier-free guidance towards the class; 1 turns it off.",
        visible=first.supports_class_guidance,
    )
    vary = gr.Radio(
        [("z and noise", "both"), ("z only", "z"), ("noise only", "noise")],
        value="both",
        label="What differs between the images",
        info="The latents z, the noise (at the start and in each step), or both. With one only, all have one class.",
        visible=first.is_ddgan,
    )
    return SimpleNamespace(class_guidance=class_guidance, vary=vary, button=gr.Button("Generate", variant="primary"))


def guidance_slider() -> gr.Slider:
    return gr.Slider(0, 100, 5, step=0.5, label="Guidance scale", info="Strength of the guidance; 0 turns it off.")


def settings_controls(first: Model) -> SimpleNamespace:
    with gr.Accordion("Settings", open=False):
        num_images = gr.Slider(1, MAX_IMAGES, 4, step=1, precision=0, label="Images")
        steps = gr.Slider(1, first.max_steps, first.default_steps, step=1, precision=0, label="Steps")
        scheduler = gr.Dropdown(first.schedulers, value=first.schedulers[0], label="Scheduler")
        seed = seed_field()
        gradient = gr.Radio(
            [("through the network", "model"), ("predicted image only", "sample")],
            value="model",
            label="Guidance gradient",
            info="Backpropagating through the network guides more strongly and takes twice as long.",
        )
        show_unguided = gr.Checkbox(True, label="Also generate the same seeds without guidance")
    controls = {"num_images": num_images, "steps": steps, "scheduler": scheduler, "seed": seed}
    return SimpleNamespace(**controls, gradient=gradient, show_unguided=show_unguided)


def seed_field() -> gr.Number:
    seed = gr.Number(0, label="Seed of the first image", precision=0, minimum=0, maximum=MAX_SEED)
    random_button = gr.Button("Random seed", size="sm")
    random_button.click(lambda: random.randrange(MAX_SEED), outputs=seed, **SILENT)
    return seed


def result_components() -> SimpleNamespace:
    hidden = {**VIEW, "visible": False, "elem_classes": "view"}
    return SimpleNamespace(
        images=gr.Gallery(label="Images", elem_id="images", elem_classes="view", **VIEW),
        caption=gr.Markdown(elem_id="caption", elem_classes="note"),
        unguided=gr.Gallery(label="Same seeds without guidance", elem_id="unguided", **hidden),
        strip=gr.Image(label="Denoising steps of the first image", elem_id="strip", **{**hidden, "buttons": []}),
        download=gr.DownloadButton("Download images", visible=False),
    )


def show(
    result: SimpleNamespace,
    model: Model,
    request: GenerationRequest,
    generated: GenerationResult,
    text: str,
    unguided: GenerationResult | None = None,
) -> dict:
    """Return the updates that show a result with `text` as its caption, and offer it for download."""
    path = Path(DOWNLOADS.name, "images.zip")
    save_zip(path, model, request, generated)
    unguided_images = [enlarge(image) for image in unguided.images] if unguided else []
    return {
        result.images: [enlarge(image) for image in generated.images],
        result.caption: text,
        result.unguided: gr.Gallery(unguided_images, visible=bool(unguided_images)),
        result.strip: gr.Image(generated.strip, visible=True),
        result.download: gr.DownloadButton(value=path, visible=True),
    }


def caption(request: GenerationRequest, result: GenerationResult) -> str:
    first, last = request.seeds[0], request.seeds[-1]
    seeds = f"seeds {first} to {last}" if request.num_images > 1 else f"seed {first}"
    text = f"{request.steps} steps in {result.seconds:.2g} s · {request.scheduler} · {seeds}"
    return f"{text}\n\n{result.warning}" if result.warning else text


# ---------------------------------------------------------------------------------------------------------------------
# A DDGAN next to a diffusion model


def comparison_tab(ddgans: list[Model], others: list[Model]) -> None:
    models = {model.name: model for model in (*ddgans, *others)}
    first_ddgan, first_diffusion = ddgans[0], most_similar(ddgans[0], others)
    gr.Markdown(
        "A Denoising Diffusion GAN takes a few large denoising steps, a diffusion model many small ones. Both "
        "generate the same number of images on this machine; class-conditional models cycle through their classes."
    )
    with gr.Row():
        left = comparison_choice("DDGAN", ddgans, first_ddgan)
        right = comparison_choice("Diffusion model", others, first_diffusion)
    with gr.Accordion("Settings", open=False):
        num_images = gr.Slider(1, MAX_IMAGES, 10, step=1, precision=0, label="Images")
        steps = gr.Slider(
            *(1, first_diffusion.max_steps, first_diffusion.default_steps),
            step=1,
            precision=0,
            label="Steps of the diffusion model",
        )
        schedulers = first_diffusion.schedulers
        scheduler = gr.Dropdown(schedulers, value=schedulers[0], label="Scheduler of the diffusion model")
        seed = seed_field()
    button = gr.Button("Generate with both", variant="primary")
    with gr.Row():
        left_result, right_result = comparison_result("few"), comparison_result("many")

    @show_errors
    def compare(data, progress=PROGRESS):
        step_progress = StepProgress(progress)
        ddgan, diffusion = models[data[left.name]], models[data[right.name]]
        ddgan_request = GenerationRequest(data[num_images], ddgan.max_steps, "as-saved", data[seed])
        diffusion_request = GenerationRequest(data[num_images], data[steps], data[scheduler], data[seed])
        sides = ((left_result, ddgan, ddgan_request), (right_result, diffusion, diffusion_request))
        updates = {}
        for side, model, request in sides:
            generated = generate(model, request, step_progress, DEFAULT_CLASS_GUIDANCE)
            updates[side.images] = [enlarge(image) for image in generated.images]
            guidance = f", class guidance scale {DEFAULT_CLASS_GUIDANCE}" if model.supports_class_guidance else ""
            updates[side.time] = f"## {generated.seconds:.2g} s\n{request.steps} steps of {model.name}{guidance}"
            if generated.warning:
                updates[side.time] += f"\n\n{generated.warning}"
        return updates

    def select_diffusion(name: str) -> tuple:
        model = models[name]
        steps = gr.Slider(maximum=model.max_steps, value=model.default_steps)
        return model.describe(), steps, gr.Dropdown(model.schedulers, value=model.schedulers[0])

    outputs = [left_result.images, left_result.time, right_result.images, right_result.time]
    inputs = {left.name, right.name, num_images, steps, scheduler, seed}
    progress_on = [left_result.images, right_result.images]
    button.click(compare, inputs, outputs, show_progress_on=progress_on, **ONE_AT_A_TIME)
    left.name.change(lambda name: models[name].describe(), left.name, left.description, **SILENT)
    right.name.change(select_diffusion, right.name, [right.description, steps, scheduler], **SILENT)


def comparison_choice(label: str, models: list[Model], default: Model) -> SimpleNamespace:
    with gr.Column(min_width=300):
        name = gr.Dropdown([model.name for model in models], value=default.name, label=label)
        return SimpleNamespace(name=name, description=gr.Markdown(default.describe(), elem_classes="note"))


def comparison_result(elem_id: str) -> SimpleNamespace:
    with gr.Column(min_width=300):
        time = gr.Markdown(elem_id=f"{elem_id}-time")
        images = gr.Gallery(label="Images", elem_id=elem_id, elem_classes=["view", "five"], **VIEW)
        return SimpleNamespace(time=time, images=images)


def main() -> None:
    sys.stderr = ShortLines(sys.stderr)
    page = build(load_models(), *find_clip())
    page.launch(
        theme=THEME,
        css=CSS,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        app_kwargs={"middleware": [Middleware(RequestLimits)]},
        footer_links=[],
    )


if __name__ == "__main__":
    run_command(main)
