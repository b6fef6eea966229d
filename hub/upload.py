"""Upload of a pipeline folder to the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError

from ..errors import InputError

# what a run folder holds beside the model; the pictures in samples/ go along, the card shows them
PRIVATE_PARTS = ["config.yaml", "checkpoints/*", "logs/*", "wandb/*", "**/.tmp-*", ".tmp-*", "**/__pycache__/*"]


def who_am_i() -> str:
    """The user name that uploads go to.

    Raises:
        InputError: if nobody is logged in, or the Hub does not take the token or does not answer.
    """
    try:
        return HfApi().whoami()["name"]
    except LocalTokenNotFoundError:
        raise InputError(
            "--push_to_hub needs a login: run `hf auth login`, or set HF_TOKEN to a token with the right to write."
        ) from None
    except Exception as error:  # the client's own, and those of the HTTP library beneath it
        raise InputError(f"--push_to_hub: the Hub did not accept the login, or did not answer: {error}") from error


def open_repository(repo_id: str, private: bool) -> None:
    """Make a repository where it is not there yet.

    Raises:
        InputError: if its name is not one, or the user may not make it.
    """
    try:
        HfApi().create_repo(repo_id, private=private, exist_ok=True)
    except Exception as error:  # as above
        raise InputError(f"--push_to_hub: the repository {repo_id} cannot be used: {error}") from error


def push_folder(folder: Path, repo_id: str) -> str:
    """Upload a run folder's model, card and pictures; returns the address of the commit."""
    return HfApi().upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=PRIVATE_PARTS).commit_url
