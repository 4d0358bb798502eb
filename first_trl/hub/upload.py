"""Upload a finished folder to the Hub, and say plainly what to do when that fails.

One commit, so that a repository never holds the weights of one student beside the card of another; only what is too
large for one goes up in parts. Nothing is changed on this machine, and the same call completes a failed upload.
"""

import json
import shlex
from pathlib import Path

from ..errors import FirstTrlError

LARGE = 10 * 2**30  # bytes of a folder that one commit cannot be trusted with
REMEDIES = {
    401: "the Hub does not know you; your token is missing or has expired, run `hf auth login`",
    403: "the Hub refuses; use a token with write access to {owner!r} (`hf auth login`), name a repository of yours "
    "(push.hub_model_id), or set push.create_pr",
    404: "the Hub has no such repository or branch; check push.hub_model_id and push.revision",
    409: "the repository changed or is being changed by someone else; wait a moment",
    **dict.fromkeys((408, 429, 500, 502, 503, 504), "the Hub is out of order or busy; wait a few minutes"),
}


class PushError(FirstTrlError):
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
        private: make a new repository private.
        revision: branch to push to, made from the main branch if need be; excludes `create_pr`.
        repo_type: `model` or `dataset`.

    Raises:
        FirstTrlError: the folder is missing or empty, or `revision` and `create_pr` are both set.
        PushError: the Hub refused or could not be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HFValidationError

    folder = Path(folder)
    files = sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else []
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    if not files:
        raise FirstTrlError(f"there is nothing to upload in {folder}; run the push stage again to prepare it")
    if create_pr and revision is not None:
        raise FirstTrlError(f"push.revision = {revision!r} and push.create_pr exclude each other; remove one of them")
    api = HfApi()
    where: dict = {"repo_type": repo_type, "revision": revision}
    message = commit_message or "Upload a student distilled with first-trl, its card and its measurements"
    try:
        url = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(url.repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
        if sum(file.stat().st_size for file in files) > LARGE and not create_pr:
            api.upload_large_folder(repo_id=url.repo_id, folder_path=folder, **where)
            return str(url)
        operations = [CommitOperationAdd(file.relative_to(folder).as_posix(), file) for file in files]
        commit = api.create_commit(
            url.repo_id,
            operations,
            commit_message=message,
            repo_type=repo_type,
            revision=revision,
            create_pr=create_pr,
        )
    except HFValidationError as error:
        raise PushError(f"{repo_id!r} is not the id of a repository ({error}); write owner/name") from error
    except Exception as error:  # whatever the Hub's client raises, of which the cause is said
        options = ["--repo-type", repo_type] * (repo_type != "model") + ["--private"] * private
        options += ["--create-pr"] * create_pr + (["--revision", revision] if revision else [])
        raise PushError(
            f"The upload to {repo_id} did not happen: {_explain(error, repo_id)}. Nothing is lost: {folder} is whole, "
            f"with its {len(files)} files. To try again, run the same command, or: "
            + shlex.join(["hf", "upload", repo_id, str(folder), ".", *options])
        ) from error
    return commit.pr_url or commit.commit_url


def _explain(error: Exception, repo_id: str) -> str:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    said = " ".join(str(chain[-1]).split())[:200] or type(chain[-1]).__name__
    if any(isinstance(link, OfflineModeIsEnabled) for link in chain):
        return "HF_HUB_OFFLINE is set; unset it"
    if any(isinstance(link, json.JSONDecodeError) for link in chain):
        return "the Hub, or a proxy before it, answered with something that is not from the Hub; wait a few minutes"
    refusal = next((link for link in chain if isinstance(link, HfHubHTTPError) and link.response is not None), None)
    if refusal is not None:
        code, reason = refusal.response.status_code, " ".join(str(refusal.server_message or "").split())[:200]
        remedy = REMEDIES.get(code, "the Hub did not accept it").format(owner=repo_id.partition("/")[0])
        return f"{remedy} ({code}{f', saying {reason!r}' if reason else ''})"
    http_error = HfHubHTTPError.__mro__[
        1
    ]  # of the HTTP library that huggingface_hub uses, which it has changed before
    if any(isinstance(link, (http_error, ConnectionError, TimeoutError)) for link in chain):
        return f"the connection failed ({said}); check the network, or HF_ENDPOINT if it is set"
    return " ".join(str(error).split())[:200] or type(error).__name__
