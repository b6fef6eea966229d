"""A page that draws pictures and pulls them towards a colour, a sentence or a class.

    python examples/space/app.py
    DDGAN_PIPELINE=google/ddpm-cifar10-32 python examples/space/app.py

It shows the embedded pipelines, or those that the environment variable DDGAN_PIPELINE names: folders or repositories
on the Hub, with commas between them. DDGAN_CLIP names the CLIP model that sentences pull with.

With the package `ddgan` beside it this folder is a Hugging Face Space: scripts/push_to_hub.py --space uploads both.
"""

import functools
import json
import os
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read by the next import

import gradio as gr
from drawing import (
    CLASS_GUIDANCE,
    IN_TURN,
    MAX_PICTURES,
    MAX_SEED,
    MAX_SENTENCE,
    Drawn,
    Model,
    Wanted,
    Watch,
    draw,
    draw_pulled,
    find_clip,
    in_words,
    legible,
    load_models,
    mean_loss,
    rival,
    save_zip,
    sentence_loss,
)

from ddgan import ColorLoss
from ddgan.core.errors import run_command

TITLE = """
# Diffusion, steered
Draw with a diffusion model while a colour, a sentence or a class pulls, and see how few steps a Denoising Diffusion
GAN needs.
"""
COURSE_EXAMPLES = [["#BB2266", 3], ["#44CCAA", 5]]
WAITING = 16  # visitors that may wait for their turn; one is drawn for at a time
THEME = gr.themes.Default(  # with fonts that need not be fetched, and buttons that can be read
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
ONE_AT_A_TIME = {"concurrency_limit": 1, "concurrency_id": "drawing"}
UNSEEN = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
PROGRESS = gr.Progress()
DOWNLOADS = TemporaryDirectory()


def said_in_the_page(handler):
    """A handler of an event, of which the page shows what goes wrong."""

    @functools.wraps(handler)
    def wrapped(*args):
        try:
            return handler(*args)
        except Exception as error:
            message = in_words(error)
        raise gr.Error(message, duration=30, print_exception=False)

    return wrapped


def build(models: dict[str, Model], clip: str | None, why_no_clip: str) -> gr.Blocks:
    """The page for these models; without a CLIP model it says why."""
    ddgans = [model for model in models.values() if model.is_ddgan]
    others = [model for model in models.values() if not model.is_ddgan]
    with gr.Blocks(
        title="Diffusion, steered", analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)
    ) as page:
        gr.Markdown(TITLE)
        with gr.Tabs():
            with gr.Tab("Draw"):
                drawing_tab(models, clip, why_no_clip)
            if ddgans and others:
                with gr.Tab("Few steps beside many"):
                    comparison_tab(ddgans, others)
    return page.queue(max_size=WAITING)


# ---- drawing, and what pulls: its parts, and what happens when they are used


def drawing_tab(models: dict[str, Model], clip: str | None, why_no_clip: str) -> None:
    first = next(iter(models.values()))
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            choice = model_choice(models, first)
            with gr.Tabs() as pulls:
                with gr.Tab("Colour", id="colour"):
                    by_color = color_parts(first)
                with gr.Tab("Sentence", id="sentence"):
                    by_sentence = sentence_parts() if clip else gr.Markdown(why_no_clip, elem_classes="note")
                with gr.Tab("Freely", id="freely"):
                    freely = free_parts(first)
            settings = settings_parts(first)
        with gr.Column(scale=6, min_width=300):
            result = result_parts()

    inputs = {*vars(choice).values(), *vars(settings).values()}
    outputs = list(vars(result).values())

    def read(data: dict) -> tuple[Model, Wanted]:
        asked = [data[part] for part in (settings.pictures, settings.steps, settings.scheduler, settings.seed)]
        return models[data[choice.name]], Wanted(*asked, data[choice.label])

    def draw_pull(data: dict, loss, scale: float, progress) -> dict:
        model, wanted = read(data)
        watch = Watch(progress)
        drawn = draw_pulled(model, wanted, watch, loss, scale, data[settings.gradient])
        free = draw(model, wanted, watch) if data[settings.unguided_too] else None
        return show(result, model, wanted, drawn, pull_caption(wanted, drawn, free, loss), free)

    @said_in_the_page
    def draw_in_color(data, progress=PROGRESS):
        return draw_pull(data, ColorLoss(data[by_color.color] or ""), data[by_color.scale], progress)

    @said_in_the_page
    def draw_by_sentence(data, progress=PROGRESS):
        return draw_pull(data, sentence_loss(data[by_sentence.sentence], clip), data[by_sentence.scale], progress)

    @said_in_the_page
    def draw_freely(data, progress=PROGRESS):
        model, wanted = read(data)
        drawn = draw(model, wanted, Watch(progress), data[freely.class_guidance])
        return show(result, model, wanted, drawn, caption(wanted, drawn))

    shown = {"outputs": outputs, "show_progress_on": result.pictures, **ONE_AT_A_TIME}
    by_color.button.click(draw_in_color, inputs | {by_color.color, by_color.scale}, **shown)
    freely.button.click(draw_freely, inputs | {freely.class_guidance}, **shown)
    if clip:
        asked = inputs | {by_sentence.sentence, by_sentence.scale}
        gr.on([by_sentence.button.click, by_sentence.sentence.submit], draw_by_sentence, asked, **shown)

    def choose(name: str) -> dict:
        model = models[name]
        return {
            choice.about: model.describe(),
            choice.label: class_choice(model),
            by_color.in_color: gr.Column(visible=model.is_in_color),
            by_color.in_grey: gr.Column(visible=not model.is_in_color),
            freely.class_guidance: gr.Slider(visible=model.takes_class_guidance, value=CLASS_GUIDANCE),
            settings.steps: gr.Slider(maximum=model.max_steps, value=model.steps),
            settings.scheduler: gr.Dropdown(model.schedulers, value=model.schedulers[0]),
            pulls: gr.Tabs(selected="colour" if model.is_in_color else "freely"),
        }

    changed = [choice.about, choice.label, by_color.in_color, by_color.in_grey, freely.class_guidance]
    changed += [settings.steps, settings.scheduler, pulls]
    choice.name.change(choose, choice.name, changed, **UNSEEN)


def model_choice(models: dict[str, Model], first: Model) -> SimpleNamespace:
    name = gr.Radio(list(models), value=first.name, label="Model")
    about = gr.Markdown(first.describe(), elem_classes="note")
    return SimpleNamespace(name=name, about=about, label=class_choice(first))


def class_choice(model: Model) -> gr.Radio:
    choices = [("one after the other", IN_TURN), *((name, label) for label, name in enumerate(model.classes))]
    return gr.Radio(choices, value=IN_TURN, label="Class", visible=bool(model.classes), elem_classes="classes")


def color_parts(first: Model) -> SimpleNamespace:
    with gr.Column(visible=first.is_in_color) as in_color:
        color = gr.ColorPicker("#BB2266", label="Colour", elem_classes="picker")
        scale = guidance_slider()
        button = gr.Button("Draw in this colour", variant="primary")
        with gr.Row():
            for example in COURSE_EXAMPLES:  # filled in by the browser itself, for who draws at once
                filled = gr.Button("{} at {}".format(*example), size="sm")
                filled.click(None, None, [color, scale], js=f"() => {json.dumps(example)}", api_visibility="private")
    with gr.Column(visible=not first.is_in_color) as in_grey:
        gr.Markdown("This model draws in grey, and so has no colours to pull: see *Freely*.", elem_classes="note")
    return SimpleNamespace(in_color=in_color, in_grey=in_grey, color=color, scale=scale, button=button)


def sentence_parts() -> SimpleNamespace:
    sentence = gr.Textbox(label="Sentence", placeholder="a red rose", max_length=MAX_SENTENCE)
    scale = guidance_slider()
    return SimpleNamespace(sentence=sentence, scale=scale, button=gr.Button("Draw what it says", variant="primary"))


def free_parts(first: Model) -> SimpleNamespace:
    class_guidance = gr.Slider(
        *(1, 10, CLASS_GUIDANCE),
        step=0.5,
        label="Guidance towards the class",
        info="1 draws as trained",
        visible=first.takes_class_guidance,
    )
    return SimpleNamespace(class_guidance=class_guidance, button=gr.Button("Draw", variant="primary"))


def guidance_slider() -> gr.Slider:
    return gr.Slider(0, 100, 5, step=0.5, label="Guidance scale", info="how strongly it pulls")


def settings_parts(first: Model) -> SimpleNamespace:
    with gr.Accordion("Settings", open=False):
        pictures = gr.Slider(1, MAX_PICTURES, 4, step=1, precision=0, label="Pictures")
        steps = gr.Slider(1, first.max_steps, first.steps, step=1, precision=0, label="Steps")
        scheduler = gr.Dropdown(first.schedulers, value=first.schedulers[0], label="Scheduler")
        seed = seed_field()
        gradient = gr.Radio(
            [("through the network", "model"), ("through its prediction alone", "sample")],
            value="model",
            label="Gradient of the pull",
            info="Through the network it pulls harder and takes twice the time.",
        )
        unguided_too = gr.Checkbox(True, label="Draw the same seeds without the pull, too")
    parts = {"pictures": pictures, "steps": steps, "scheduler": scheduler, "seed": seed}
    return SimpleNamespace(**parts, gradient=gradient, unguided_too=unguided_too)


def seed_field() -> gr.Number:
    seed = gr.Number(0, label="Seed of the first picture", precision=0, minimum=0, maximum=MAX_SEED)
    another = gr.Button("Another seed", size="sm")
    another.click(lambda: random.randrange(MAX_SEED), outputs=seed, **UNSEEN)
    return seed


def result_parts() -> SimpleNamespace:
    hidden = {**VIEW, "visible": False, "elem_classes": "view"}
    return SimpleNamespace(
        pictures=gr.Gallery(label="Pictures", elem_id="pictures", elem_classes="view", **VIEW),
        caption=gr.Markdown(elem_id="caption", elem_classes="note"),
        unguided=gr.Gallery(label="The same seeds without the pull", elem_id="unguided", **hidden),
        strip=gr.Image(label="The way to the first picture", elem_id="strip", **{**hidden, "buttons": []}),
        download=gr.DownloadButton("Download the pictures", visible=False),
    )


def show(
    result: SimpleNamespace, model: Model, wanted: Wanted, drawn: Drawn, text: str, unguided: Drawn | None = None
) -> dict:
    path = Path(DOWNLOADS.name, "pictures.zip")
    save_zip(path, model, wanted, drawn)
    free = [legible(picture) for picture in unguided.pictures] if unguided else []
    return {
        result.pictures: [legible(picture) for picture in drawn.pictures],
        result.caption: text,
        result.unguided: gr.Gallery(free, visible=bool(free)),
        result.strip: gr.Image(drawn.strip, visible=True),
        result.download: gr.DownloadButton(value=path, visible=True),
    }


def caption(wanted: Wanted, drawn: Drawn) -> str:
    seeds = f"seeds {wanted.seeds[0]} to {wanted.seeds[-1]}" if wanted.pictures > 1 else f"seed {wanted.seed}"
    return f"{wanted.steps} steps in {drawn.seconds:.2g} s · {wanted.scheduler} · {seeds}"


def pull_caption(wanted: Wanted, drawn: Drawn, free: Drawn | None, loss) -> str:
    what = "Distance to the colour" if isinstance(loss, ColorLoss) else "Distance to the sentence"
    without = f", without the pull {mean_loss(free.pictures, loss):.2f}" if free else ""
    return f"{what}: **{mean_loss(drawn.pictures, loss):.2f}**{without} · {caption(wanted, drawn)}"


# ---- a DDGAN beside a model of many steps


def comparison_tab(ddgans: list[Model], others: list[Model]) -> None:
    models = {model.name: model for model in (*ddgans, *others)}
    few, many = ddgans[0], rival(ddgans[0], others)
    gr.Markdown(
        "A Denoising Diffusion GAN takes a few large steps, another model many small ones. Both draw the same number "
        "of pictures here and now, and those that draw by class take one class after the other."
    )
    with gr.Row():
        left, right = side_parts(ddgans, few), side_parts(others, many)
    with gr.Accordion("Settings", open=False):
        pictures = gr.Slider(1, MAX_PICTURES, 10, step=1, precision=0, label="Pictures")
        steps = gr.Slider(1, many.max_steps, many.steps, step=1, precision=0, label="Steps of the model of many steps")
        scheduler = gr.Dropdown(many.schedulers, value=many.schedulers[0], label="Its scheduler")
        seed = seed_field()
    button = gr.Button("Draw with both", variant="primary")
    with gr.Row():
        of_few, of_many = side_result("few"), side_result("many")

    @said_in_the_page
    def compare(data, progress=PROGRESS):
        watch = Watch(progress)
        few, many = models[data[left.name]], models[data[right.name]]
        count, first = data[pictures], data[seed]
        of_left = Wanted(count, few.max_steps, "as-saved", first)
        of_right = Wanted(count, data[steps], data[scheduler], first)
        sides = ((of_few, few, of_left), (of_many, many, of_right))
        answer = {}
        for side, model, wanted in sides:
            drawn = draw(model, wanted, watch, CLASS_GUIDANCE)
            answer[side.pictures] = [legible(picture) for picture in drawn.pictures]
            guided = f", guided towards the class at {CLASS_GUIDANCE}" if model.takes_class_guidance else ""
            answer[side.time] = f"## {drawn.seconds:.2g} s\n{wanted.steps} steps of {model.name}{guided}"
        return answer

    def choose(name: str) -> tuple:
        many = models[name]
        steps = gr.Slider(maximum=many.max_steps, value=many.steps)
        return many.describe(), steps, gr.Dropdown(many.schedulers, value=many.schedulers[0])

    outputs = [of_few.pictures, of_few.time, of_many.pictures, of_many.time]
    inputs = {left.name, right.name, pictures, steps, scheduler, seed}
    button.click(compare, inputs, outputs, show_progress_on=[of_few.pictures, of_many.pictures], **ONE_AT_A_TIME)
    left.name.change(lambda name: models[name].describe(), left.name, left.about, **UNSEEN)
    right.name.change(choose, right.name, [right.about, steps, scheduler], **UNSEEN)


def side_parts(models: list[Model], chosen: Model) -> SimpleNamespace:
    with gr.Column(min_width=300):
        name = gr.Dropdown([model.name for model in models], value=chosen.name, label="Model")
        return SimpleNamespace(name=name, about=gr.Markdown(chosen.describe(), elem_classes="note"))


def side_result(elem_id: str) -> SimpleNamespace:
    with gr.Column(min_width=300):
        time = gr.Markdown(elem_id=f"{elem_id}-time")
        pictures = gr.Gallery(label="Pictures", elem_id=elem_id, elem_classes=["view", "five"], **VIEW)
        return SimpleNamespace(time=time, pictures=pictures)


def main() -> None:
    page = build(load_models(), *find_clip())
    page.launch(
        theme=THEME,
        css=CSS,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        max_file_size="1mb",  # nothing is uploaded
        footer_links=[],
    )


if __name__ == "__main__":
    run_command(main)
