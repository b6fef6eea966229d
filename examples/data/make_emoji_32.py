"""Make a dataset folder of emoji at 32x32 from one at 64x64: of Twemoji, or of Noto Emoji with the same subjects.

    python examples/data/make_emoji_32.py path/to/twemoji-64 examples/data/twemoji-32
    python examples/data/make_emoji_32.py path/to/noto-emoji-64 path/to/noto-emoji-32

The source has 64x64 RGB emoji on white in `image`, their category in `label`, their Unicode name in `name`. The same
source gives the same pixels and the same rows. Only the first of the two stands in this repository.
"""

import argparse
import io
from pathlib import Path

from datasets import Dataset, load_dataset
from PIL.Image import Resampling

SIZE = 32
# Faces, figures and solid things, in which flat colours, outlines and palette show. Left out: flags and most of the
# signs, which look alike in every emoji set, and the categories with many small parts that 32x32 cannot show.
CATEGORIES = ["Smileys & Emotion", "People & Body", "Animals & Nature", "Food & Drink"]
# Nearly the same picture many times over, or figures too small to make out.
LEFT_OUT = ["family", "kiss: ", "couple with heart: ", "holding hands", "facing right", "wheelchair", "white cane"]
LEFT_OUT += ["kneeling", "standing", "bunny ears", "wrest", "biking", "rowing boat", "lifting weights"]
LEFT_OUT += ["bouncing ball", "cartwheel", "playing", "middle finger extended"]

TWEMOJI = """"Twemoji" by Twitter, Inc and other contributors (<https://github.com/twitter/twemoji>, now maintained at
<https://github.com/jdecked/twemoji>), as packed in the npm package
emoji-datasource-twitter 16.0.0. The graphics are licensed
under [CC-BY 4.0](https://creativecommons.org/licenses/by/4.0/), and so is this dataset. They come as they are, without
warranties. Neither Twitter, Inc nor the other contributors endorse this dataset."""
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
| `image` | the picture, PNG |
| `label` | its category, one of nine names of which four occur here: {parts} |
| `name` | its Unicode name |

## Credits and licence

{credits}

Changes: the 64x64 pictures were put on a white background, scaled down to 32x32 (Lanczos filter) and saved as PNG;
{count} of {total} were chosen, with flags, objects, places, activities, signs and near-duplicates left out.
`make_emoji_32.py` of diffusers-ddgan makes this folder, this file included.
"""


def to_png(image) -> dict:
    small = image.convert("RGB").resize((SIZE, SIZE), Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, format="PNG", optimize=True)
    return {"bytes": file.getvalue(), "path": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="dataset folder with emoji at 64x64")
    parser.add_argument("output", type=Path, help="folder to make; its name is the dataset's title")
    args = parser.parse_args()
    source = load_dataset(str(args.source), split="train")
    category = source.features["label"].int2str
    rows = [
        {"image": to_png(row["image"]), "label": row["label"], "name": row["name"]}
        for row in source
        if category(row["label"]) in CATEGORIES and not any(part in row["name"] for part in LEFT_OUT)
    ]
    counts = {c: sum(category(row["label"]) == c for row in rows) for c in CATEGORIES}
    (args.output / "data").mkdir(parents=True, exist_ok=True)
    dataset = Dataset.from_list(rows, features=source.features)
    dataset.to_parquet(args.output / "data" / "train-00000-of-00001.parquet")
    parts = ", ".join(f"{c} ({n})" for c, n in counts.items())
    licence, credits = ("cc-by-4.0", TWEMOJI) if "twemoji" in args.source.name else ("apache-2.0", NOTO)
    text = README.format(
        license=licence, title=args.output.name, credits=credits, count=len(rows), total=len(source), parts=parts
    )
    (args.output / "README.md").write_text(text, encoding="utf-8")
    print(f"{len(rows)} images in {args.output}: {parts}")


if __name__ == "__main__":
    main()
