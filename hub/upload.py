"""Upload to the Hugging Face Hub: tries are repeated, answers that were lost are looked up."""

import os
import queue
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, Literal, NamedTuple, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, SpaceCard, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, get_session, validate_repo_id
from huggingface_hub.utils.sha import git_hash

from ..core.errors import InputError, RunError
from .cards import CARD_NAME, nobody_wrote, with_metadata
from .export import SAMPLES, is_unwritten, shows_samples
from .publication import snapshot, space_snapshot

SPACE_VARIABLE = "DDGAN_PIPELINE"  # the environment variable that names the pipeline to the Space's app

_WAITS = (1, 2, 4, 8, 16)  # seconds between tries; more where the Hub asks for more
_LONGEST_WAIT = 600  # seconds; twice the time over which the Hub counts requests
_SILENCE = 120  # seconds without a byte after which a connection counts as cut
_PASSING = (408, 412, 425, 429, 500, 502, 503, 504)  # 412: somebody else's commit came between

_Result = TypeVar("_Result")


class Uploaded(NamedTuple):
    """A commit on the Hub, and the address at which people see it."""

    commit: str
    url: str


def who_am_i() -> str:
    """The name of the user who is logged in.

    Raises:
        InputError: if nobody is, or may only read.
        RunError: if the Hub does not answer.
    """
    try:
        user = _retried(HfApi().whoami, "The Hub")
    except LocalTokenNotFoundError:
        raise InputError(
            "Nobody is logged in to the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN to a token with the "
            "right to write."
        ) from None
    except Exception as error:
        raise _in_words(error, "the Hub") from error
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise InputError(
            f"The token of {user['name']} may only read: make one with the right to write at "
            f"{HfApi().endpoint}/settings/tokens, and log in with it by `hf auth login`."
        )
    return user["name"]


class Repository:
    """
    A repository on the Hub that something is uploaded to.

    Args:
        repo_id: `user/name`.
        repo_type: of a pipeline, or of the app that shows it.
        revision: a branch, made where it is not there yet, or a pull request, as `refs/pr/1`.
        create_pr: commit as a new pull request to the main branch.

    Raises:
        InputError: if `repo_id` is not the name of a repository.
    """

    def __init__(
        self,
        repo_id: str,
        repo_type: Literal["model", "space"] = "model",
        revision: str | None = None,
        create_pr: bool = False,
    ):
        kind, *rest = repo_id.split("/")
        if kind in ("datasets", "spaces") and len(rest) == 2:
            raise InputError(f"{repo_id} is one of the Hub's {kind}, but a pipeline goes to a model: user/name.")
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise InputError(f"{repo_id!r} cannot be the name of a repository on the Hub: {error}") from None
        if not rest:
            raise InputError(f"Say whose repository {repo_id} is: user/{repo_id}, or organization/{repo_id}.")
        self.api = HfApi()
        self.repo_id, self.repo_type, self.revision, self.create_pr = repo_id, repo_type, revision, create_pr
        self.names = {"repo_id": repo_id, "repo_type": repo_type}

    @property
    def url(self) -> str:
        return f"{self.api.endpoint}/{'spaces/' if self.repo_type == 'space' else ''}{self.repo_id}"

    def open(self, private: bool = False, **options: Any) -> None:
        """
        Make the repository, and the branch, where it is not there yet.

        Args:
            options: further arguments of `create_repo`.

        Raises:
            InputError: if it cannot be made, or is public and was to be private.
            RunError: if the Hub does not answer.
        """
        self._tried(lambda: self._open(private, options))
        if self.revision and not self.revision.startswith("refs/"):
            self._tried(self._open_branch)

    def upload(self, folder: Path, message: str) -> Uploaded:
        """
        Upload all files of a folder in one commit, so that who loads it meets the old state or the new one.

        Nothing is committed where the files are there already: that is also how a commit is found again whose answer
        was lost. Files that are only in the repository stay. Where the folder's card was written by nobody, one that
        somebody wrote there stays too, and of another one the metadata that the folder's does not have, as a licence.

        Raises:
            InputError: if the user may not write, or the Hub refuses what is uploaded.
            RunError: if the Hub does not answer, or the connection is cut again and again.
        """
        return self._tried(lambda: self._upload(folder, message))

    def set_variable(self, name: str, value: str) -> None:
        """Give a Space's app an environment variable.

        Raises:
            InputError, RunError: as of `upload`.
        """
        self._tried(lambda: self.api.add_space_variable(self.repo_id, name, value))

    def _tried(self, call: Callable[[], _Result]) -> _Result:
        try:
            return _retried(call, self.repo_id)
        except Exception as error:
            raise _in_words(error, self.repo_id) from error

    def _info(self, **which: Any) -> Any:
        return self.api.repo_info(**{**self.names, **which}, timeout=_SILENCE)

    def _exists(self, repo_type: str) -> bool:
        try:
            self._info(repo_type=repo_type)
        except RepositoryNotFoundError:
            return False
        return True

    def _open(self, private: bool, options: dict[str, Any]) -> None:
        try:
            there = self._info()
        except RepositoryNotFoundError:
            self._create(private, options)
            return
        if private and not there.private:
            raise InputError(
                f"{self.repo_id} is there already, and everybody can see it: make it private at {self.url}/settings, "
                "or leave --private out, or choose another name."
            )

    def _create(self, private: bool, options: dict[str, Any]) -> None:
        try:
            self.api.create_repo(**self.names, private=private, **options)
        except HfHubHTTPError as error:
            # a conflict, though it was not there: an earlier try made it and its answer was lost, or the name is taken
            if error.response.status_code != 409:
                raise
            kinds = [kind for kind in ("model", "dataset", "space") if self._exists(kind)]
            if self.repo_type not in kinds:
                found = f"{self.repo_id} is a {kinds[0]}" if kinds else "the Hub does not give it away"
                raise InputError(f"The name {self.repo_id} is taken: {found}. Choose another one.") from None

    def _open_branch(self) -> None:
        try:
            self._info(revision=self.revision)
        except RevisionNotFoundError:
            self.api.create_branch(**self.names, branch=self.revision, exist_ok=True)

    def _upload(self, folder: Path, message: str) -> Uploaded:
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        head = self._info(revision=self.revision).sha
        mine = files[CARD_NAME].read_text(encoding="utf-8") if CARD_NAME in files else ""
        if is_unwritten(mine) and (theirs := self._card(head)) is not None:
            if nobody_wrote(theirs):
                files[CARD_NAME] = with_metadata(mine, theirs).encode("utf-8")
            else:
                staying = {CARD_NAME} if shows_samples(theirs) else {CARD_NAME, SAMPLES}
                files = {name: file for name, file in files.items() if name not in staying}
        additions = [CommitOperationAdd(name, file) for name, file in files.items()]
        if self._holds(head, additions):
            return Uploaded(head, f"{self.url}/commit/{head}")
        where = {"revision": self.revision, "parent_commit": head}
        if self.create_pr:
            mine = {
                "author": self.api.whoami()["name"],
                "discussion_type": "pull_request",
                "discussion_status": "open",
            }
            for request in self.api.get_repo_discussions(**self.names, **mine):
                revision = f"refs/pr/{request.num}"
                if self._holds(revision, additions):
                    return Uploaded(self._info(revision=revision).sha, request.url)
            where = {"create_pr": True}
        done = self.api.create_commit(**self.names, operations=additions, commit_message=message, **where)
        return Uploaded(done.oid, done.pr_url or done.commit_url)

    def _card(self, revision: str) -> str | None:
        """The card that is there."""
        try:
            file = self.api.hf_hub_download(**self.names, filename=CARD_NAME, revision=revision)
        except RemoteEntryNotFoundError:
            return None
        return Path(file).read_text(encoding="utf-8", errors="replace")  # it may be in any encoding

    def _holds(self, revision: str, additions: list[CommitOperationAdd]) -> bool:
        """Whether all these files are in the repository as they are here."""
        paths = [addition.path_in_repo for addition in additions]
        there = {file.path: file for file in self.api.get_paths_info(**self.names, paths=paths, revision=revision)}

        def same(addition: CommitOperationAdd) -> bool:
            file = there.get(addition.path_in_repo)
            if file is None or file.size != addition.upload_info.size:
                return False
            if file.lfs:
                return file.lfs.sha256 == addition.upload_info.sha256.hex()
            with addition.as_file() as content:
                return file.blob_id == git_hash(content.read())

        return all(map(same, additions))


class BackgroundUpload:
    """
    Uploads a pipeline folder as it is at each `push`, in a thread that no process waits for when it ends.

    Of the states that come while one is uploaded only the newest is uploaded next. What goes wrong is told and does no
    harm to who pushes.

    Args:
        folder: of the pipeline.
        repo_id: a repository that was opened.
    """

    def __init__(self, folder: Path, repo_id: str):
        self.folder, self.repository = folder, Repository(repo_id)
        self.states, self.outcome = queue.SimpleQueue(), None
        disable_progress_bars()  # there is one of the training already
        self.thread = Thread(target=self._work, daemon=True)
        self.thread.start()

    def push(self, message: str, last: bool = False) -> None:
        """Have the folder uploaded as it is now."""
        try:
            state = snapshot(self.folder, self.repository.repo_id)
        except OSError as error:
            state = error
        self.states.put((state, message, last))

    def finish(self, message: str) -> Uploaded:
        """Upload the folder as it is now, and wait until that is done.

        Raises:
            InputError, RunError, OSError: if that failed.
        """
        self.push(message, last=True)
        self.thread.join()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def _work(self) -> None:
        last = False
        while not last:
            waiting = [self.states.get()]
            while not self.states.empty():
                waiting.append(self.states.get())
            state, message, last = waiting[-1]
            try:
                if isinstance(state, OSError):
                    raise state
                self.outcome = self.repository.upload(Path(state.name), message)
            except Exception as error:  # whatever it is, the run goes on
                self.outcome = error
                if not last:
                    print(f"\nThe upload of this save failed, that of the next is tried: {error}", file=sys.stderr)
            for taken, *_ in waiting:
                if isinstance(taken, TemporaryDirectory):
                    taken.cleanup()


def upload_space(folder: Path, repo_id: str, private: bool = False) -> Uploaded:
    """
    Upload the app in a folder as the Space `repo_id`, to show the model of the same name.

    Raises:
        InputError, RunError: as of `Repository`, and if the folder holds no Space.
    """
    with space_snapshot(folder, repo_id) as taken:
        space = Repository(repo_id, "space")
        space.open(private, space_sdk=SpaceCard.load(Path(taken, CARD_NAME)).data.sdk)
        space.set_variable(SPACE_VARIABLE, repo_id)
        return space.upload(Path(taken), "Upload the app")


def sample_standalone(place: str, revision: str | None = None, samples: str | None = None) -> bytes:
    """
    One picture of a pipeline, by a process that has Diffusers, an empty cache and not this package; see
    standalone_check.py.

    Args:
        place: a pipeline folder, or a repository on the Hub.
        revision: of the repository.
        samples: a folder to put the pictures of a card of `card_of_parts` into, too.

    Returns:
        Bytes that are equal for equal pictures.

    Raises:
        RunError: if it cannot be loaded or sampled that way.
    """
    with TemporaryDirectory() as home:
        caches = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_XET_CACHE", "HF_MODULES_CACHE", "HF_ASSETS_CACHE")
        environment = {name: value for name, value in os.environ.items() if name not in caches}
        environment["HF_HOME"] = home
        if revision is None:
            environment["HF_HUB_OFFLINE"] = "1"
        elif token := get_token():
            environment["HF_TOKEN"] = token
        picture = Path(home, "picture.npy")
        # -P: that file's folder is no place to import from
        command = [sys.executable, "-P", Path(__file__).with_name("standalone_check.py"), place, picture]
        command += [revision or "", samples or ""]
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode and not picture.is_file():  # else the samples alone could not be drawn
            reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            what = "What was to be uploaded" if revision is None else f"What is now in {place}"
            raise RunError(f"{what} cannot be loaded and sampled with Diffusers alone: {reason}")
        return picture.read_bytes()


def _retried(call: Callable[[], _Result], name: str) -> _Result:
    """What a call gives that is repeated, after longer and longer waits, while its failure is one that passes."""
    for wait in (*_WAITS, _LONGEST_WAIT):
        get_session().timeout = _SILENCE
        try:
            return call()
        except Exception as error:
            seconds = max(wait, _asked_for(error))
            if not _passes(error) or seconds >= _LONGEST_WAIT:
                raise
            print(f"{name}: {_reason(error)} Next try in {seconds} s.", file=sys.stderr)
        time.sleep(seconds)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _answer(error: BaseException) -> HfHubHTTPError | None:
    """The Hub's own refusal that an error comes from."""
    return next((cause for cause in _causes(error) if isinstance(cause, HfHubHTTPError)), None)


def _passes(error: BaseException) -> bool:
    if answer := _answer(error):
        return answer.response.status_code in _PASSING
    # RuntimeError is what the client makes of the failed upload of a large file
    kinds = (HTTPError, ConnectionError, TimeoutError, RuntimeError)
    return any(isinstance(cause, kinds) and not isinstance(cause, OfflineModeIsEnabled) for cause in _causes(error))


def _asked_for(error: BaseException) -> int:
    """Seconds that the Hub asks to wait."""
    answer = _answer(error)
    if answer is None:
        return 0
    after = answer.response.headers.get("retry-after", "")
    used_up = re.search(r"r=0;\s*t=(\d+)", answer.response.headers.get("ratelimit", ""))
    return int(after) if after.isdigit() else int(used_up[1]) if used_up else 0


def _reason(error: BaseException) -> str:
    """An error in one line."""
    cause = _answer(error) or list(_causes(error))[-1]
    said = " ".join((getattr(cause, "server_message", None) or str(cause) or type(cause).__name__).split())
    return said if said.endswith((".", "!", "?")) else f"{said}."


def _in_words(error: Exception, name: str) -> Exception:
    """The same error as one paragraph for the user."""
    if isinstance(error, (InputError, RunError)):
        return error
    if isinstance(error, OfflineModeIsEnabled):
        return InputError("Nothing can be uploaded while HF_HUB_OFFLINE is set: unset it.")
    status = answer.response.status_code if (answer := _answer(error)) else None
    if status == 401:
        return InputError("The Hub does not take this token: log in anew with `hf auth login`, or set HF_TOKEN anew.")
    if status == 403:
        return InputError(
            f"You have no right to write to {name}: {_reason(error)} Choose another repository, or a token that may."
        )
    if (status and status not in _PASSING) or isinstance(error, ValueError):
        return InputError(f"The Hub refused what {name} was asked for: {_reason(error)}")
    return RunError(f"The upload to {name} failed: {_reason(error)}")
