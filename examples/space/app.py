"""A Gradio page that generates images: plain, by class, guided by a color or a text prompt, and in few steps or many.

    ddgan space
    ddgan space --pipeline google/ddpm-cifar10-32 --port 8080

It offers the embedded pipelines, or those in the environment variable DDGAN_PIPELINE: folders or Hub repositories,
separated by commas. DDGAN_CLIP sets the CLIP model for text guidance, and DDGAN_AUTOGUIDANCE a worse version of a
pipeline for autoguidance.

Together with the package `ddgan` this folder is a Hugging Face Space: ddgan push --space uploads both.
"""

import functools
import json
import os
import random
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read by the next import

import gradio as gr
from generation import (
    ALL_CLASSES,
    DEFAULT_STEPS,
    MAX_AUTOGUIDANCE,
    MAX_CLASS_GUIDANCE,
    MAX_IMAGES,
    MAX_PROMPT_LENGTH,
    MAX_SEED,
    GenerationRequest,
    GenerationResult,
    Model,
    StepProgress,
    enlarge,
    find_clip,
    find_model,
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

from ddgan.core.errors import InputError, run_command

HEADLINE = """
# Diffusion models
Generate images in many steps or in few, and guide them towards a color, a text prompt or a class.
"""
COLOR_EXAMPLES = [["#BB2266", 10], ["#44CCAA", 15]]
# JavaScript: put the settings of a tab into the address of the page, and of the Hub's page around it
LINK = """(...values) => {{
    const kept = [...new URLSearchParams(location.search)].filter(([name]) => name.startsWith("__"));
    const settings = {names}.map((name, i) => [name, values[i]]).filter(([, value]) => value !== null);
    const query = new URLSearchParams([...kept, ["tab", {tab}], ...settings]);
    history.replaceState(null, "", `?${{query}}`);
    if (parent !== window) parent.postMessage({{queryString: `${{query}}`}}, "https://huggingface.co");
}}"""
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
    few = [model for model in models.values() if model.is_few_step]
    many = [model for model in models.values() if not model.is_few_step]
    guidable = {model.name: model for model in (*many, *few) if guidance_kinds(model, clip)}  # guided in many steps
    title, text = headline(list(models.values()))
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as page:
        gr.Markdown(text)
        panels = {}
        with gr.Tabs() as tabs:
            with gr.Tab("Generate", id="generate"):
                panels["generate"] = generation_tab(models)
            if guidable:
                with gr.Tab("Guidance", id="guidance"):
                    panels["guidance"] = guidance_tab(guidable, clip, why_no_clip)
            if few and many:
                with gr.Tab("Few steps vs. many", id="steps"):
                    comparison_tab(few, many)

        def open_link(request: gr.Request) -> dict:
            """Return the updates that restore the settings in the address of the page."""
            tab = request.query_params.get("tab")
            if tab not in panels:
                return {tabs: gr.skip()}
            return {tabs: gr.update(selected=tab), **panels[tab].restore(request.query_params)}

        fields = {field for panel in panels.values() for field in panel.outputs}
        page.load(open_link, None, {tabs, *fields}, **SILENT)  # pyright: ignore[reportArgumentType]
    return page.queue(max_size=MAX_QUEUE)


def headline(models: list[Model]) -> tuple[str, str]:
    """Return the title of the page, and its first lines as Markdown: a single model is described."""
    if len(models) > 1:
        return "Diffusion models", HEADLINE
    (model,) = models
    title = model.name.rpartition("/")[2]
    link = f"[Model card](https://huggingface.co/{model.repo_id})" if model.repo_id else ""
    return title, "\n\n".join(filter(None, (f"# {title}", model.summary(), link)))


# ---------------------------------------------------------------------------------------------------------------------
# Shareable links: the settings of a tab in the address of the page


def panel(tab: str, fields: dict[str, gr.components.Component], choice: SimpleNamespace, select: Callable):
    """Connect the settings of a tab with the address of the page.

    Args:
        fields: the settings by their names in the address.
        choice: the components of `model_choice`.
        select: returns the updates for a model of that name.

    Returns:
        `restore`, which returns the updates for the settings in an address; `outputs`, the components that it updates;
        `share`, the arguments of an event that puts the settings into the address.
    """

    def restore(query: Mapping[str, str]) -> dict:
        name = query.get("model") if query.get("model") in models else choice.name.value
        updates = select(name)
        for key, field in fields.items():
            value = parse_setting({**vars(field), **updates.get(field, {})}, field, query.get(key))
            if value is not None:
                updates.setdefault(field, gr.update())["value"] = value
        return updates

    models = [value for _, value in choice.name.choices]
    outputs = [*select(choice.name.value), *fields.values()]
    choice.name.input(select, choice.name, list(select(choice.name.value)), **SILENT)
    script = LINK.format(tab=json.dumps(tab), names=json.dumps(list(fields)))
    share = {"fn": None, "inputs": list(fields.values()), "js": script, "api_visibility": "private"}
    return SimpleNamespace(restore=restore, outputs=outputs, share=share)


def parse_setting(properties: Mapping[str, Any], field: gr.components.Component, text: str | None) -> Any:
    """Return a setting in an address as the value of its field; None if it is missing or not possible there."""
    if text is None:
        return None
    if isinstance(field, gr.Checkbox):
        return text == "true"
    if isinstance(field, (gr.Radio, gr.Dropdown)):
        values = [choice[1] if isinstance(choice, tuple | list) else choice for choice in properties["choices"]]
        return next((value for value in values if str(value) == text), None)
    if isinstance(field, (gr.Slider, gr.Number)):
        try:
            value = int(text) if properties["precision"] == 0 else float(text)
        except ValueError:
            return None
        return value if properties["minimum"] <= value <= properties["maximum"] else None
    return text[:MAX_PROMPT_LENGTH]


# ---------------------------------------------------------------------------------------------------------------------
# Generation without a guidance loss


def generation_tab(models: dict[str, Model]) -> SimpleNamespace:
    first = next(iter(models.values()))
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            choice = model_choice(first, list(models))
            class_guidance = gr.Slider(
                *(1, MAX_CLASS_GUIDANCE, first.class_guidance),
                step=0.25,
                precision=2,
                label="Class guidance scale",
                info="Classifier-free guidance towards the class; 1 turns it off.",
                visible=first.supports_class_guidance,
            )
            vary = gr.Radio(
                [("z and noise", "both"), ("z only", "z"), ("noise only", "noise")],
                value="both",
                label="What differs between the images",
                info="The latent z, the noise (initial and in each step), or both. Unless both vary, in one class.",
                visible=first.is_ddgan,
            )
            button = gr.Button("Generate", variant="primary")
            with gr.Accordion("Settings", open=False):
                settings = settings_controls(first)
        with gr.Column(scale=6, min_width=300):
            result = result_components("")

    def select_model(name: str) -> dict:
        model = models[name]
        guidance = gr.update(visible=model.supports_class_guidance, value=model.class_guidance)
        varied = gr.update(visible=model.is_ddgan, value="both")
        return {**update_model(model, choice, settings), class_guidance: guidance, vary: varied}

    @show_errors
    def generate_plain(data, progress=PROGRESS):
        model, request = find_model(models, data[choice.name]), read_request(data, settings, choice)
        if model.is_ddgan and data[vary] != "both":
            request = replace(request, vary=data[vary])
        generated = generate(model, request, StepProgress(progress), data[class_guidance])
        return show(result, model, request, generated, caption(request, generated))

    fields = {"model": choice.name, "class": choice.label, "class_guidance": class_guidance}
    fields |= {"vary": vary, **vars(settings)}
    link = panel("generate", fields, choice, select_model)
    event = {"outputs": list(vars(result).values()), "show_progress_on": result.images, **ONE_AT_A_TIME}
    button.click(generate_plain, set(fields.values()), **event)
    button.click(**link.share)
    return link


# ---------------------------------------------------------------------------------------------------------------------
# Guidance towards a color or a prompt


def guidance_kinds(model: Model, clip: str | None) -> list[tuple[str, str]]:
    """Return the kinds of guidance that a model can have, as labels and values of a choice."""
    return [("Color", "color")] * model.is_color + [("Text prompt", "prompt")] * bool(clip)


def guidance_tab(models: dict[str, Model], clip: str | None, why_no_clip: str) -> SimpleNamespace:
    first = next(iter(models.values()))
    kinds = guidance_kinds(first, clip)
    first_kind = kinds[0][1]
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            choice = model_choice(first, list(models))
            kind = gr.Radio(kinds, value=first_kind, label="Guidance", visible=len(kinds) > 1)
            with gr.Column(visible=first_kind == "color") as color_column:
                color = gr.ColorPicker("#BB2266", label="Color", elem_classes="picker")
            prompt = gr.Textbox(
                label="Prompt",
                placeholder="a red rose",
                max_length=MAX_PROMPT_LENGTH,
                visible=first_kind == "prompt",
            )
            scale = gr.Slider(
                *(0, 100, first.guidance),
                step=0.5,
                precision=1,
                label="Guidance scale",
                info=f"Strength of the guidance, as a scale at {DEFAULT_STEPS} steps; 0 turns it off.",
            )
            button = gr.Button("Generate", variant="primary", elem_id="generate-guided")
            with gr.Row(visible=first_kind == "color") as examples:
                # filled in by the browser, so that a click on Generate right afterwards uses the new values
                for example in COLOR_EXAMPLES:
                    example_button = gr.Button("{} at scale {}".format(*example), size="sm")
                    script = f"() => {json.dumps(example)}"
                    example_button.click(None, None, [color, scale], js=script, api_visibility="private")
            if not clip:
                gr.Markdown(why_no_clip, elem_classes="note")
            with gr.Accordion("Settings", open=False):
                settings = settings_controls(first)
                gradient = gr.Radio(
                    [("through the network", "model"), ("predicted image only", "sample")],
                    value="model",
                    label="Guidance gradient",
                    info="Backpropagating through the network guides more strongly and takes twice as long.",
                )
                show_unguided = gr.Checkbox(True, label="Also generate the same seeds without guidance")
        with gr.Column(scale=6, min_width=300):
            result = result_components("guided-")

    def select_kind(value: str) -> dict:
        is_color = value == "color"
        shown = {color_column: is_color, examples: is_color, prompt: not is_color}
        return {component: gr.update(visible=visible) for component, visible in shown.items()}

    def select_model(name: str) -> dict:
        model = models[name]
        kinds = guidance_kinds(model, clip)
        update = gr.update(choices=kinds, value=kinds[0][1], visible=len(kinds) > 1)
        updates = {kind: update, scale: gr.update(value=model.guidance), **select_kind(kinds[0][1])}
        return {**update_model(model, choice, settings), **updates}

    @show_errors
    def generate_with_guidance(data, progress=PROGRESS):
        name, target = data[kind], data[color] or "" if data[kind] == "color" else data[prompt]
        loss = guidance_loss(name, target, clip)
        model, request = find_model(models, data[choice.name]), read_request(data, settings, choice)
        step_progress = StepProgress(progress)
        guided = generate_guided(model, request, step_progress, loss, data[scale], data[gradient])
        unguided = generate(model, request, step_progress) if data[show_unguided] else None
        text = f"Distance to the {name}: **{mean_loss(guided.images, loss):.2f}**"
        if unguided:
            text += f", unguided {mean_loss(unguided.images, loss):.2f}"
        return show(result, model, request, guided, f"{text} · {caption(request, guided)}", unguided)

    fields = {"model": choice.name, "class": choice.label, "guidance": kind, "color": color, "prompt": prompt}
    fields |= {"scale": scale, **vars(settings), "gradient": gradient, "unguided": show_unguided}
    link = panel("guidance", fields, choice, select_model)

    kind.change(select_kind, kind, [color_column, examples, prompt], **SILENT)
    event = {"outputs": list(vars(result).values()), "show_progress_on": result.images, **ONE_AT_A_TIME}
    gr.on([button.click, prompt.submit], generate_with_guidance, set(fields.values()), **event)
    gr.on([button.click, prompt.submit], **link.share)
    return link


# ---------------------------------------------------------------------------------------------------------------------
# Components of both tabs


def model_choice(first: Model, names: list[str]) -> SimpleNamespace:
    name = gr.Radio(names, value=first.name, label="Model", visible=len(names) > 1)
    description = gr.Markdown(first.describe(), elem_classes="note")
    classes = class_choices(first)
    label = gr.Radio(classes, value=ALL_CLASSES, label="Class", visible=bool(first.classes), elem_classes="classes")
    return SimpleNamespace(name=name, description=description, label=label)


def class_choices(model: Model) -> list[tuple[str, int]]:
    return [("all in turn", ALL_CLASSES), *((name, label) for label, name in enumerate(model.classes))]


def settings_controls(first: Model) -> SimpleNamespace:
    return SimpleNamespace(
        images=gr.Slider(1, MAX_IMAGES, 4, step=1, precision=0, label="Images"),
        steps=gr.Slider(1, first.max_steps, first.default_steps, step=1, precision=0, label="Steps"),
        scheduler=scheduler_choice(first, "Scheduler"),
        seed=seed_field(),
        autoguidance=gr.Slider(
            *(1, MAX_AUTOGUIDANCE, 1),
            step=0.25,
            precision=2,
            label="Autoguidance scale",
            info="Guidance by a worse version of the model; 1 turns it off.",
            visible=first.guide is not None,
        ),
    )


def scheduler_choice(model: Model, label: str) -> gr.Dropdown:
    schedulers = model.schedulers
    return gr.Dropdown(schedulers, value=schedulers[0], label=label, visible=len(schedulers) > 1)


def update_model(model: Model, choice: SimpleNamespace, settings: SimpleNamespace) -> dict:
    """Return the updates of `model_choice` and `settings_controls` for another model."""
    schedulers = model.schedulers
    return {
        choice.name: gr.update(value=model.name),
        choice.description: model.describe(),
        choice.label: gr.update(choices=class_choices(model), value=ALL_CLASSES, visible=bool(model.classes)),
        settings.steps: gr.update(maximum=model.max_steps, value=model.default_steps),
        settings.scheduler: gr.update(choices=schedulers, value=schedulers[0], visible=len(schedulers) > 1),
        settings.autoguidance: gr.update(value=1, visible=model.guide is not None),
    }


def read_request(data: dict, settings: SimpleNamespace, choice: SimpleNamespace) -> GenerationRequest:
    controls = (settings.images, settings.steps, settings.scheduler, settings.seed, choice.label)
    return GenerationRequest(*(data[control] for control in controls), autoguidance=data[settings.autoguidance])


def seed_field() -> gr.Number:
    seed = gr.Number(0, label="Seed of the first image", precision=0, minimum=0, maximum=MAX_SEED)
    random_button = gr.Button("Random seed", size="sm")
    random_button.click(lambda: random.randrange(MAX_SEED), outputs=seed, **SILENT)
    return seed


def result_components(prefix: str) -> SimpleNamespace:
    """Return the components that show images; `prefix` makes their HTML ids unique."""
    hidden = {**VIEW, "visible": False, "elem_classes": "view"}
    return SimpleNamespace(
        images=gr.Gallery(label="Images", elem_id=f"{prefix}images", elem_classes="view", **VIEW),
        caption=gr.Markdown(elem_id=f"{prefix}caption", elem_classes="note"),
        unguided=gr.Gallery(label="Same seeds without guidance", elem_id=f"{prefix}unguided", **hidden),
        strip=gr.Image(
            label="Denoising steps of the first image", elem_id=f"{prefix}strip", **{**hidden, "buttons": []}
        ),
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


def count_steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def caption(request: GenerationRequest, result: GenerationResult) -> str:
    first, last = request.seeds[0], request.seeds[-1]
    seeds = f"seeds {first} to {last}" if request.num_images > 1 else f"seed {first}"
    scheduler = "" if request.scheduler == "as-saved" else f"{request.scheduler} · "
    text = f"{count_steps(request.steps)} in {result.seconds:.2g} s · {scheduler}{seeds}"
    if request.autoguidance > 1:
        text += f" · autoguidance scale {request.autoguidance:g}"
    return f"{text}\n\n{result.warning}" if result.warning else text


# ---------------------------------------------------------------------------------------------------------------------
# A few-step model next to one of many steps


def comparison_tab(few: list[Model], many: list[Model]) -> None:
    models = {model.name: model for model in (*few, *many)}
    first, first_other = few[0], most_similar(few[0], many)
    gr.Markdown(
        "A few-step model takes one or a few large denoising steps, a diffusion model many small ones. Both generate "
        "the same number of images on this machine; class-conditional models cycle through their classes. Choosing a "
        "few-step model also selects the diffusion model most similar to it."
    )
    with gr.Row():
        left = comparison_choice("Few-step model", few, first)
        right = comparison_choice("Diffusion model", many, first_other)
    with gr.Accordion("Settings", open=False):
        num_images = gr.Slider(1, MAX_IMAGES, 10, step=1, precision=0, label="Images")
        counts = first.few_step_counts
        few_steps = gr.Radio(counts, value=counts[0], label="Steps of the few-step model", visible=len(counts) > 1)
        steps = gr.Slider(
            *(1, first_other.max_steps, first_other.default_steps),
            step=1,
            precision=0,
            label="Steps of the diffusion model",
        )
        scheduler = scheduler_choice(first_other, "Scheduler of the diffusion model")
        seed = seed_field()
    button = gr.Button("Generate with both", variant="primary")
    with gr.Row():
        left_result, right_result = comparison_result("few"), comparison_result("many")

    @show_errors
    def compare(data, progress=PROGRESS):
        step_progress = StepProgress(progress)
        few_step, other = (find_model(models, data[side.name]) for side in (left, right))
        few_request = GenerationRequest(data[num_images], data[few_steps], "as-saved", data[seed])
        other_request = GenerationRequest(data[num_images], data[steps], data[scheduler], data[seed])
        sides = ((left_result, few_step, few_request), (right_result, other, other_request))
        updates = {}
        for side, model, request in sides:
            generated = generate(model, request, step_progress, model.class_guidance)
            updates[side.images] = [enlarge(image) for image in generated.images]
            guidance = f", class guidance scale {model.class_guidance:g}" if model.supports_class_guidance else ""
            updates[side.time] = (
                f"## {generated.seconds:.2g} s\n{count_steps(request.steps)} of {model.name}{guidance}"
            )
            if generated.warning:
                updates[side.time] += f"\n\n{generated.warning}"
        return updates

    def select_other(name: str) -> dict:
        model = models[name]
        schedulers = model.schedulers
        return {
            right.name: gr.update(value=name),
            right.description: model.describe(),
            steps: gr.update(maximum=model.max_steps, value=model.default_steps),
            scheduler: gr.update(choices=schedulers, value=schedulers[0], visible=len(schedulers) > 1),
        }

    def select_few(name: str) -> dict:
        counts = models[name].few_step_counts
        return {
            left.description: models[name].describe(),
            few_steps: gr.update(choices=counts, value=counts[0], visible=len(counts) > 1),
            **select_other(most_similar(models[name], many).name),
        }

    outputs = [left_result.images, left_result.time, right_result.images, right_result.time]
    inputs = {left.name, right.name, num_images, few_steps, steps, scheduler, seed}
    progress_on = [left_result.images, right_result.images]
    button.click(compare, inputs, outputs, show_progress_on=progress_on, **ONE_AT_A_TIME)
    left.name.input(select_few, left.name, list(select_few(first.name)), **SILENT)
    right.name.input(select_other, right.name, list(select_other(first_other.name)), **SILENT)


def comparison_choice(label: str, models: list[Model], default: Model) -> SimpleNamespace:
    with gr.Column(min_width=300):
        names = [model.name for model in models]
        name = gr.Dropdown(names, value=default.name, label=label, visible=len(names) > 1)
        return SimpleNamespace(name=name, description=gr.Markdown(default.describe(), elem_classes="note"))


def comparison_result(elem_id: str) -> SimpleNamespace:
    with gr.Column(min_width=300):
        time = gr.Markdown(elem_id=f"{elem_id}-time")
        images = gr.Gallery(label="Images", elem_id=elem_id, elem_classes=["view", "five"], **VIEW)
        return SimpleNamespace(time=time, images=images)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--host", help="address to listen on (default: GRADIO_SERVER_NAME, or 127.0.0.1)")
    parser.add_argument(
        "--port", type=int, help="port to listen on (default: the first free one from GRADIO_SERVER_PORT or 7860)"
    )
    args = parser.parse_args()
    sys.stderr = ShortLines(sys.stderr)
    page = build(load_models(), *find_clip())
    try:
        page.launch(
            server_name=args.host,
            server_port=args.port,
            theme=THEME,
            css=CSS,
            show_error=False,
            ssr_mode=False,
            enable_monitoring=False,
            app_kwargs={"middleware": [Middleware(RequestLimits)]},
            footer_links=[],
        )
    except OSError as error:
        raise InputError(
            f"The page cannot be served (--host {args.host or 'default'}, --port {args.port or 'default'}): the port "
            "is in use, or the host is not an address of this machine. Choose another --port or --host."
        ) from error


if __name__ == "__main__":
    run_command(main)
