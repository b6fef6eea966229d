# %% [markdown]
# # Fine-tune, sample and measure a model from Python
#
# A script in cells, which Jupyter, VS Code and PyCharm open as a notebook (`jupytext --to ipynb notebook.py` converts
# it). As it is, it takes a few minutes on a CPU.

# %%
from datasets import Dataset

from ddgan.api import evaluate, finetune, generate
from ddgan.core.locations import EXAMPLES
from ddgan.sampling.grids import image_grid

START_MODEL = EXAMPLES / "models" / "noto-emoji-32"  # or the name of a model on the Hub, or a pipeline
STEPS = 100
SAMPLING_STEPS = 20
NUM_IMAGES = 16

# %% [markdown]
# ## Images
#
# `train_data` takes a list of PIL images, a `datasets.Dataset`, the path of a folder, or the name of a dataset on the
# Hub. Here it is the rows 0 to 199 of the embedded emoji; those after them are kept for measuring.

# %%
emoji = Dataset.from_parquet(str(EXAMPLES / "data" / "twemoji-32" / "data" / "train-00000-of-00001.parquet"))
train_images, held_out = emoji.select(range(200)), emoji.select(range(200, 300))
image_grid(train_images[:NUM_IMAGES]["image"])

# %% [markdown]
# ## Fine-tuning
#
# The keywords are the flags of `ddgan finetune`. To resume a stopped run, repeat the call with
# `resume_from_checkpoint="latest"`.

# %%
run = finetune(
    start_model=START_MODEL,
    train_data=train_images,
    output_dir="notebook-model",
    max_train_steps=STEPS,
    batch_size=8,
    learning_rate=1e-4,
    sample_steps=SAMPLING_STEPS,
    log_samples_every=0,
    report_to="none",
)

# %%
losses = [row["loss"] for row in run.metrics]
print(f"{len(losses)} steps, loss {losses[0]:.4f} to {losses[-1]:.4f}; samples: {run.files.before_after}")

# %% [markdown]
# ## Sampling

# %%
samples = generate(
    pipeline=run.pipeline,
    num_images=NUM_IMAGES,
    scheduler="ddim",
    num_inference_steps=SAMPLING_STEPS,
    output_dir="notebook-samples",
    overwrite=True,
)
image_grid(list(samples))

# %% [markdown]
# ## Measuring
#
# Pixels are a weak feature; for FID leave out `feature_extractor`. Lists of images and datasets are references, too.

# %%
results = evaluate(
    images=list(samples),
    reference=held_out,
    feature_extractor="pixels-8x8",
    output="notebook-evaluation.json",
)
print({name: round(metric.value, 3) for name, metric in results.metrics.items()})
