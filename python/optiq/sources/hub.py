"""A model of the Hugging Face hub: a snapshot in the library's own cache, shared with mlx-lm."""

from __future__ import annotations

import re
from pathlib import Path

from ..base.text import one_line
from ..errors import SourceError
from .beside import DOWNLOADED, NEEDED

TIMEOUT_SECONDS = 10


def is_repo_id(name: str) -> bool:
    """Whether `name` looks like "organisation/model"."""
    part = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
    return re.fullmatch(f"{part}/{part}", name) is not None


def download(repo_id: str, revision: str | None) -> tuple[Path, str]:
    """The snapshot folder of a model and its commit hash.

    Where the hub cannot be asked, the cached snapshot is used. Raises SourceError when the model or
    revision does not exist, is not accessible, or is neither cached nor reachable.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    refusal: Exception | None = None
    try:
        # Asked first because snapshot_download waits without limit for a server that is silent.
        HfApi().model_info(repo_id, revision=revision, timeout=TIMEOUT_SECONDS)
    except Exception as error:
        refusal = error
    try:
        path = snapshot_download(
            repo_id,
            revision=revision,
            # Offline a snapshot of mlx_lm's is complete even without a licence and a model card.
            allow_patterns=list(DOWNLOADED if refusal is None else NEEDED),
            etag_timeout=TIMEOUT_SECONDS,
            local_files_only=refusal is not None,
        )
    except LocalEntryNotFoundError as error:
        raise _explain(repo_id, revision, refusal) from (refusal or error)
    except Exception as error:
        reason = _refused(repo_id, revision, error) or f"cannot be downloaded: {one_line(error)}"
        raise SourceError(f"{repo_id} {reason}") from error
    return Path(path), Path(path).name


def _explain(repo_id: str, revision: str | None, refusal: Exception | None) -> SourceError:
    """Why a model that is not in the cache could not be fetched."""
    from huggingface_hub import constants

    if refusal and (reason := _refused(repo_id, revision, refusal)):
        return SourceError(f"{repo_id} {reason}")
    why = f"{constants.ENDPOINT} cannot be reached"
    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set"
    at = f"@{revision}" if revision else ""
    return SourceError(
        f"{repo_id}{at} is not a folder here nor in the hub's cache, and {why}; give a folder, or "
        "set HF_ENDPOINT to a mirror"
    )


def _refused(repo_id: str, revision: str | None, error: Exception) -> str | None:
    """What the hub's own answer means, or None if `error` is not one."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    endpoint = constants.ENDPOINT
    if isinstance(error, GatedRepoError):
        return f"is gated; accept its terms at {endpoint}/{repo_id} and run `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"is neither a folder here nor a model at {endpoint}; "
            "check the spelling, or run `hf auth login` if it is private"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"has no revision {revision!r}"
    return None
