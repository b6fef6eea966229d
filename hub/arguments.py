"""Names of repositories in arguments; nothing here imports PyTorch."""

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..core.errors import InputError

CARD_NAME = "README.md"


def check_repo_id(repo_id: str) -> None:
    """Check that a name can be that of a model repository or a Space: `user/name`.

    Raises:
        InputError: if it cannot.
    """
    owner, *rest = repo_id.split("/")
    if owner in ("datasets", "spaces") and len(rest) == 2:
        raise InputError(
            f"{repo_id} names one of the Hub's {owner}, but a pipeline is uploaded to a model repository: user/name."
        )
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} cannot be the name of a repository on the Hub: {error}") from None
    if not rest:
        raise InputError(f"{repo_id} has no owner: name it user/{repo_id} or organization/{repo_id}.")
