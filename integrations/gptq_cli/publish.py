"""A finished checkpoint to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from gptq_backend import GPTQError
from gptq_transformers.errors import first_line

from .report import JSON_NAME

_PRIVATE = [JSON_NAME]  # names folders and files of this machine


def check_access(repo: str) -> str:
    """The full name of ``repo``, ``OWNER/NAME``: known before the work, so that nobody waits for a refusal.

    Raises:
        GPTQError: it is no name of a repository, or nobody is logged in.
    """
    try:
        owner = HfApi().whoami()["name"]
        HfApi().repo_exists(repo)  # checks the name
    except HFValidationError as error:
        raise GPTQError(f"--push-to {repo}: expected OWNER/NAME ({first_line(error)})") from None
    except Exception as error:  # of the hub's client and its HTTP library
        raise GPTQError(
            f"--push-to {repo}: the hub does not know you ({first_line(error)}); run: hf auth login"
        ) from error
    return repo if "/" in repo else f"{owner}/{repo}"


def push(folder: Path, repo: str) -> str:
    """Upload the checkpoint in ``folder``, in one commit; the repository is made if there is none.

    Returns:
        Its address.

    Raises:
        GPTQError: that fails; the checkpoint stays as it is.
    """
    api = HfApi()
    try:
        address = api.create_repo(repo, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="A GPTQ checkpoint", ignore_patterns=_PRIVATE
        )
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        raise GPTQError(
            f"the checkpoint in {folder} is complete, but it could not be uploaded ({first_line(error)}); "
            f"to try again: hf upload {repo} {folder} . --exclude {JSON_NAME}"
        ) from error
    return str(address)
