"""Upload a finished folder to the Hub in one commit, and say plainly what to do when that fails.

One commit, so that a repository never holds the weights of one student beside the card of another. Nothing is made or
changed on this machine: a failed upload leaves the folder as it was, and the same call completes it. What goes into
the folder is `first_trl.hub.card`.
"""

import json
import shlex
from pathlib import Path

RETRY_LATER = (408, 429, 500, 502, 503, 504)


class PushError(RuntimeError):
    """An upload that did not happen; the message says why, that the folder is whole, and how to try again."""


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    repo_type: str = "model",
) -> str:
    """Upload a folder to a repository, made if need be; returns the address of the commit or pull request.

    Args:
        folder: every file in it that is not hidden is uploaded.
        repo_id: `owner/name`.
        private: make a new repository private; an existing one stays as it is.
        revision: branch to push to, made from the main branch if need be.
        create_pr: open a pull request against the main branch; excludes `revision`.
        repo_type: `model` or `dataset`.

    Raises:
        ValueError: the folder is missing or empty, or `revision` and `create_pr` are both set.
        PushError: the Hub refused or could not be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    folder = Path(folder)
    files = sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else []
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    if not files:
        raise ValueError(f"there is nothing to upload in {folder}; run the push stage again to prepare it")
    if create_pr and revision is not None:
        raise ValueError(
            f"push.revision = {revision!r} and push.create_pr exclude each other: a pull request goes to the main "
            "branch; remove one of them"
        )
    api = HfApi()
    try:
        url = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(url.repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
        commit = api.create_commit(
            url.repo_id,
            [CommitOperationAdd(file.relative_to(folder).as_posix(), file) for file in files],
            commit_message=commit_message
            or "Upload a student distilled with first-trl, its card and its measurements",
            repo_type=repo_type,
            revision=revision,
            create_pr=create_pr,
        )
    except HFValidationError as error:
        raise PushError(f"{repo_id!r} is not the id of a repository ({error}); write owner/name") from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError, RuntimeError, _http_error()) as error:
        again = _command_again(folder, repo_id, private, revision, create_pr, repo_type)
        raise PushError(
            f"The upload to {repo_id} did not happen: {_explain(error, repo_id)}. Nothing is lost: {folder} is whole, "
            f"with its {len(files)} files. To try again, run the same command, or: {again}"
        ) from error
    return commit.pr_url or commit.commit_url


def _http_error() -> type[Exception]:
    """The root of the errors of the HTTP library that huggingface_hub uses, which it has changed before."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__mro__[1]


def _explain(error: Exception, repo_id: str) -> str:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    if any(isinstance(link, OfflineModeIsEnabled) for link in chain):
        return "HF_HUB_OFFLINE is set; unset it"
    refusal = next((link for link in chain if isinstance(link, HfHubHTTPError) and link.response is not None), None)
    if any(isinstance(link, json.JSONDecodeError) for link in chain):
        return "the Hub, or a proxy before it, answered with something that is not from the Hub; wait a few minutes"
    if refusal is None and not any(isinstance(link, (_http_error(), ConnectionError, TimeoutError)) for link in chain):
        return _one_line(error)
    if refusal is None:
        return f"the connection failed ({_one_line(chain[-1])}); check the network, or HF_ENDPOINT if it is set"
    code, said = refusal.response.status_code, refusal.server_message
    said = f", saying {_one_line(said)!r}" if said else ""
    if code == 401:
        return f"the Hub does not know you (401{said}); your token is missing or has expired, run `hf auth login`"
    if code == 403:
        owner = repo_id.partition("/")[0]
        return (
            f"the Hub refuses (403{said}); use a token with write access to {owner!r} (`hf auth login`), or "
            "name a repository of yours (push.hub_model_id), or set push.create_pr"
        )
    if code == 404:
        return f"the Hub has no such repository or branch (404{said}); check push.hub_model_id and push.revision"
    if code == 409:
        return f"the repository changed or is being changed by someone else (409{said}); wait a moment"
    if code in RETRY_LATER:
        return f"the Hub is out of order or busy ({code}{said}); wait a few minutes"
    return f"the Hub answered {code}{said}"


def _one_line(said: object) -> str:
    """A message of a server or an error on one line; the error's name where it says nothing."""
    return " ".join(str(said).split())[:200] or type(said).__name__


def _command_again(
    folder: Path, repo_id: str, private: bool, revision: str | None, create_pr: bool, repo_type: str
) -> str:
    options = ["--repo-type", repo_type] if repo_type != "model" else []
    options += [*(["--private"] if private else []), *(["--create-pr"] if create_pr else [])]
    options += ["--revision", revision] if revision else []
    return shlex.join(["hf", "upload", repo_id, str(folder), ".", *options])
