"""Create a dataset folder of 32x32 emoji from one of 64x64 emoji; Twemoji and Noto Emoji get the same subjects.

    python examples/data/make_emoji_32.py path/to/twemoji-64 examples/data/twemoji-32
    python examples/data/make_emoji_32.py path/to/noto-emoji-64 path/to/noto-emoji-32

The source has 64x64 RGB emoji on white in the column `image`, their category in `label` and their Unicode name in
`name`. The result is deterministic. Only the first of the two datasets is part of this repository.
"""

import argparse
import io
from pathlib import Path

from datasets import Dataset, load_dataset
from PIL.Image import Resampling

SIZE = 32
# faces, figures and solid objects, which show flat colors, outlines and palette; not flags and most signs, which look
# alike in every emoji set, and not categories with many small parts, which 32x32 pixels cannot show
CATEGORIES = ["Smileys & Emotion", "People & Body", "Animals & Nature", "Food & Drink"]
# near-duplicates, or figures that are too small to recognize
EXCLUDED = ["family", "kiss: ", "couple with heart: ", "holding hands", "facing right", "wheelchair", "white cane"]
EXCLUDED += ["kneeling", "standing", "bunny ears", "wrest", "biking", "rowing boat", "lifting weights"]
EXCLUDED += ["bouncing ball", "cartwheel", "playing", "middle finger extended"]

TWEMOJI = """"Twemoji" by Twitter, Inc and other contributors (<https://github.com/twitter/twemoji>, now maintained at
<https://github.com/jdecked/twemoji>), as packed in the npm package
emoji-datasource-twitter 16.0.0. The graphics are licensed
under [CC-BY 4.0](https://creativecommons.org/licenses/by/4.0/), and so is this dataset. They are provided as is,
without warranties. Neither Twitter, Inc nor the other contributors endorse this dataset."""
NOTO = """Noto Emoji by Google (<https://github.com/googlefonts/noto-emoji>), as packed in the npm package
emoji-datasource-google 16.0.0, under the Apache
License 2.0."""
README = """---
license: {license}
pretty_name: {title}
task_categories:
- unconditional-image-generation
size_categories:
- n<1K
configs:
- config_name: default
  data_files: data/*.parquet
---

# {title}

{count} emoji, 32x32 RGB on white, one split (`train`).

| Column | Content |
|---|---|
| `image` | the image, PNG |
| `label` | its category, one of nine, four of which occur here: {categories} |
| `name` | its Unicode name |

## Credits and license

{credits}

Changes: the 64x64 images were placed on a white background, downscaled to 32x32 (Lanczos filter) and saved as PNG.
{count} of {total} were selected; flags, objects, places, activities, signs and near-duplicates were excluded.
`make_emoji_32.py` of diffusers-ddgan creates this folder, including this file.
"""


def to_png(image) -> dict:
    small = image.convert("RGB").resize((SIZE, SIZE), Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, format="PNG", optimize=True)
    return {"bytes": file.getvalue(), "path": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="dataset folder of 64x64 emoji")
    parser.add_argument("output", type=Path, help="folder to create; its name becomes the title of the dataset")
    args = parser.parse_args()
    source = load_dataset(str(args.source), split="train")
    category = source.features["label"].int2str
    rows = [
        {"image": to_png(row["image"]), "label": row["label"], "name": row["name"]}
        for row in source
        if category(row["label"]) in CATEGORIES and not any(part in row["name"] for part in EXCLUDED)
    ]
    counts = {name: sum(category(row["label"]) == name for row in rows) for name in CATEGORIES}
    (args.output / "data").mkdir(parents=True, exist_ok=True)
    dataset = Dataset.from_list(rows, features=source.features)
    dataset.to_parquet(args.output / "data" / "train-00000-of-00001.parquet")
    categories = ", ".join(f"{name} ({count})" for name, count in counts.items())
    license_id, credits = ("cc-by-4.0", TWEMOJI) if "twemoji" in args.source.name else ("apache-2.0", NOTO)
    text = README.format(
        license=license_id,
        title=args.output.name,
        credits=credits,
        count=len(rows),
        total=len(source),
        categories=categories,
    )
    (args.output / "README.md").write_text(text, encoding="utf-8")
    print(f"{len(rows)} images in {args.output}: {categories}")


if __name__ == "__main__":
    main()
