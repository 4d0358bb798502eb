"""Upload a finished folder to the Hub, and say what to do when that fails.

One commit, so that a repository never holds the weights of one student beside the card of another; only what is too
large for one does huggingface_hub send in parts. The same call completes a failed upload.
"""

import shlex
from pathlib import Path

from ..errors import FirstTrlError
from ..files import files_of


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
    from huggingface_hub import HfApi

    folder = Path(folder)
    files = files_of(folder) if folder.is_dir() else []
    if not files:
        raise FirstTrlError(f"there is nothing to upload in {folder}; run the push stage again to prepare it")
    if create_pr and revision is not None:
        raise FirstTrlError(f"push.revision = {revision!r} and push.create_pr exclude each other; remove one of them")
    api, options = HfApi(), {"repo_type": repo_type, "revision": revision, "create_pr": create_pr}
    options["commit_message"] = (
        commit_message or "Upload a student distilled with first-trl, its card and its measurements"
    )
    try:
        repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=[".*", "*/.*"], **options)
    except Exception as error:  # whatever the Hub's client raises
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(f"{error} {cause if cause is not error else ''}".split())[:400] or type(cause).__name__
        flags = ["--repo-type", repo_type] * (repo_type != "model") + ["--private"] * private
        flags += ["--create-pr"] * create_pr + (["--revision", revision] if revision else [])
        raise PushError(
            f"The upload to {repo_id} did not happen: {reason.rstrip('.')}. Nothing is lost: {folder} is whole, with "
            f"its {len(files)} files. Check `hf auth whoami`, the name of the repository and the network, then run "
            "the same command again, or: " + shlex.join(["hf", "upload", repo_id, str(folder), ".", *flags])
        ) from error
    return commit.pr_url or commit.commit_url
