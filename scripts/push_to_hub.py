"""Publish a pipeline folder on the Hugging Face Hub.

    hf auth login
    python scripts/push_to_hub.py --folder my-model --repo_id user/my-model --private

It uploads the pipeline, its code, its card and the pictures that the card shows, in one commit, and nothing else that
lies in the folder. Then it loads the repository as others will, in a process that has an empty cache and not this
package, and compares a picture: only when that is the picture of the folder it says published. A command that failed
is finished by giving it again; nothing is uploaded twice.
"""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from ddgan.core.cli import option, parse_arguments
from ddgan.core.errors import InputError, RunError, run_command
from ddgan.hub.cards import CARD_NAME
from ddgan.hub.export import SAMPLES, shows_samples
from ddgan.hub.publication import add_card, needs_card, snapshot, space_snapshot
from ddgan.hub.upload import Repository, sample_standalone, upload_space, who_am_i

SPACE_FOLDER = Path(__file__).parents[1] / "examples" / "space"


@dataclass
class PushArguments:
    """What is published, and where."""

    folder: str | None = option(None, "pipeline folder: what a training run or `save_pretrained` wrote")
    repo_id: str | None = option(None, "repository on the Hub, user/name; made where it is not there yet")
    private: bool = option(False, "make it private")
    revision: str | None = option(None, "branch to upload to, made where it is not there yet (default: main)")
    create_pr: bool = option(False, "upload as a pull request")
    space: bool = option(False, "upload the app of examples/space too: a Space of the same name that shows the model")

    def __post_init__(self):
        if not self.folder or not self.repo_id:
            raise InputError("Say what to publish, and where: --folder my-model --repo_id user/my-model.")
        if self.create_pr and self.revision:
            raise InputError("--create_pr makes a pull request to the main branch: leave --revision out.")
        if self.space and (self.create_pr or self.revision not in (None, "main")):
            raise InputError(
                "--space makes a Space that loads the repository's main branch, and --revision and --create_pr leave "
                "that as it is: publish to the main branch, or leave --space out."
            )


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_arguments(PushArguments, argv=argv)
    repository = Repository(args.repo_id, revision=args.revision, create_pr=args.create_pr)
    if args.space:
        space_snapshot(SPACE_FOLDER, args.repo_id).cleanup()  # so that it is known early if there is none
    folder = Path(args.folder)
    with snapshot(folder, args.repo_id) as taken:
        user = who_am_i()
        samples = samples_folder(Path(taken))
        expected = sample_standalone(taken, samples=samples)
        if samples and not Path(samples, SAMPLES).is_file():
            print("none could be drawn: the card has no pictures\n")
        if needs_card(Path(taken)):  # once more, now with pictures
            add_card(Path(taken), args.repo_id)
        show_sizes(folder, Path(taken))
        print(f"uploading to   {repository.url} as {user}")
        repository.open(args.private)
        uploaded = repository.upload(Path(taken), "Upload pipeline")
    print(f"uploaded       {uploaded.url}")
    if sample_standalone(args.repo_id, uploaded.commit) != expected:
        raise RunError(
            f"{uploaded.url} holds all files, but the pipeline that is loaded from there draws another picture for "
            f"seed 0 than the one in {folder}. Do not pass it on before you know why."
        )
    place = uploaded.url if args.create_pr else repository.url
    if args.revision:
        place += f"/tree/{quote(args.revision, safe='')}"
    print(f"published      {place}: loaded from there it draws the same picture as here")
    if args.space:
        print(f"Space          {upload_space(SPACE_FOLDER, args.repo_id, args.private).url}")
        if args.private:
            print(f"               In its settings, add a secret HF_TOKEN that may read {args.repo_id}.")


def samples_folder(taken: Path) -> str | None:
    """Where pictures for the card are to be drawn to, if it shows such as are drawn here."""
    if not needs_card(taken) and not shows_samples((taken / CARD_NAME).read_text(encoding="utf-8")):
        return None
    print("drawing        nine pictures for the card\n")
    return str(taken)


def show_sizes(folder: Path, taken: Path) -> None:
    """Print what is uploaded and what stays."""
    sizes = {path.relative_to(taken).as_posix(): path.stat().st_size for path in taken.rglob("*") if path.is_file()}
    for name, count in sorted(sizes.items()):
        print(f"{size(count):>10}  {name}")
    print(f"{size(sum(sizes.values())):>10}  in {len(sizes)} files")
    there = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    staying = sorted({path.parts[0] for path in there if path.as_posix() not in sizes})
    print(f"stays here: {', '.join(name for name in staying if not name.startswith('.tmp-')) or 'nothing'}\n")


def size(count: float) -> str:
    units = iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while count >= 1000:
        count, unit = count / 1000, next(units)
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


if __name__ == "__main__":
    run_command(main)
