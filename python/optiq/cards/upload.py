"""Upload a converted model with its card to the hub."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path

from ..base.text import cause, one_line
from ..errors import ExportError, UsageError
from ..sources.hub import is_repo_id
from .card import card
from .options import CardOptions

# What does not belong to the model: work in progress, and files of an editor or a system.
IGNORED = ("*.checkpoint*", ".*", "**/.*", "*.tmp")


def check_upload(repo: str) -> None:
    """Raise an OptiqError unless one may upload to `repo`; best asked before hours of work."""
    if not is_repo_id(repo):
        raise UsageError(f"--upload-repo {repo} is not a hub id like organisation/model")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    try:
        HfApi().whoami()
    except Exception as error:  # no token, or no hub
        why = "" if isinstance(error, LocalTokenNotFoundError) else f" ({cause(error)})"
        raise ExportError(
            f"the hub does not know you{why}; run hf auth login, or set HF_TOKEN"
        ) from error


def upload(folder: str | Path, repo: str, *, private: bool = False) -> str:
    """Upload the model in `folder` with its card to `repo` ("organisation/name"); returns its URL.

    The repository is made if it does not exist. A card that optiq wrote is written anew under the
    name of the repository; one of your own stays. Raises an OptiqError.
    """
    path = Path(folder).expanduser()
    check_upload(repo)
    if not (path / "config.json").is_file():
        raise UsageError(f"{folder} is not a model folder; name what optiq convert wrote")
    _write_card(path, repo)
    from huggingface_hub import CommitOperationAdd, HfApi

    try:
        api = HfApi()
        url = api.create_repo(repo, private=private, exist_ok=True)
        names = (f.relative_to(path).as_posix() for f in sorted(path.rglob("*")) if f.is_file())
        files = [
            CommitOperationAdd(name, _published(path / name))
            for name in names
            if not any(fnmatch(name, pattern) for pattern in IGNORED)
        ]
        api.create_commit(repo, files, commit_message="Upload with optiq")
    except Exception as error:
        raise ExportError(
            f"{folder} cannot be uploaded to {repo}: {one_line(error)}; nothing is lost, try "
            f"again with optiq card {folder} --upload-repo {repo}"
        ) from error
    return str(url)


def _published(file: Path) -> str | bytes:
    """The file, or its contents without the path of the source on this machine."""
    if file.parent.name == "optiq" and file.suffix == ".json":
        try:
            data = json.loads(file.read_bytes())
            del data["model"]["path"]
        except (ValueError, TypeError, KeyError):
            return str(file)
        return json.dumps(data, indent=1).encode() + b"\n"
    return str(file)


def _write_card(path: Path, repo: str) -> None:
    """A card with the name of the repository, unless somebody wrote one."""
    options = CardOptions(name=repo)
    try:
        card(path, name=options.name)
    except UsageError:
        if not (path / "README.md").is_file():
            raise
