"""Uploads to the Hugging Face hub: token, connection, one commit. No torch.

No request of ours is repeated: a missing token and a hub that does not answer are errors within seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import requests
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from alignflow import hub, secrets
from alignflow.errors import AlignflowError
from alignflow.files.disk import LITTER
from alignflow.text import first_line

TIMEOUT = 5.0
"""Seconds that the hub has for its answer about the token."""
TOKENS = "https://huggingface.co/settings/tokens"


class PublishError(AlignflowError, RuntimeError):
    """An upload that cannot be made; the message gives the reason and the remedy."""


@dataclass(frozen=True)
class Target:
    """Target of an upload.

    Args:
        repo: ``owner/name`` of a model repository; it is created if there is none.
        public: whether a new repository is public.
        revision: branch; it is created if there is none.
        message: of the commit; None names the folder.
    """

    repo: str
    public: bool = False
    revision: str = "main"
    message: str | None = None

    @property
    def url(self) -> str:
        """Address of the repository's page."""
        page = f"{constants.ENDPOINT}/{self.repo}"
        return page if self.revision == "main" else f"{page}/tree/{self.revision}"

    def check(self) -> None:
        """Raise PublishError unless the repository's name is one that the hub accepts."""
        try:
            validate_repo_id(self.repo)
        except HFValidationError as error:
            raise PublishError(f"--push {self.repo}: {first_line(error)}") from None
        if self.repo.count("/") != 1:
            raise PublishError(f"--push {self.repo}: should read OWNER/NAME, such as alice/sd35-nft")


def connected() -> HfApi:
    """The hub with the token of this machine; it answered, and the token is valid.

    Raises:
        PublishError: no token, no answer within :data:`TIMEOUT` seconds, or another answer than the token's owner.
    """
    if constants.HF_HUB_OFFLINE:
        raise PublishError("HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it")
    token = get_token()
    if not token:
        raise PublishError(
            f"no token of the hub was found. Create one with write access at {TOKENS}, then run `hf auth login` or set "
            "HF_TOKEN"
        )
    secrets.remember(token)
    host, headers = constants.ENDPOINT, {"authorization": f"Bearer {token}"}
    if reason := hub.silent():
        raise PublishError(f"the hub cannot be reached ({reason}). {_NETWORK}")
    try:
        answer = requests.get(f"{host}/api/whoami-v2", headers=headers, timeout=TIMEOUT)
    except requests.RequestException as error:
        raise PublishError(f"{host} did not answer: {first_line(error)}. {_NETWORK}") from None
    if answer.status_code == 401:
        raise PublishError(f"{host} does not accept the token. Create one with write access at {TOKENS}")
    if not answer.ok:
        raise PublishError(f"{host} answered {answer.status_code} {answer.reason}. Try again later")
    return HfApi(endpoint=host, token=token)


_NETWORK = "Check the network and its proxy (HTTPS_PROXY), then run the command again"


def listing(folder: Path) -> list[tuple[str, int]]:
    """Name and size in bytes of every file that is uploaded, sorted by name."""
    files = [path for path in folder.rglob("*") if path.is_file() and not LITTER.fullmatch(path.name)]
    return sorted((path.relative_to(folder).as_posix(), path.stat().st_size) for path in files)


def push(folder: Path, target: Target, api: HfApi) -> str:
    """Upload a folder in one commit; the address of the repository.

    A repository that exists keeps its visibility: a public one takes an upload only if the target is public.

    Raises:
        PublishError: the hub refuses, or the connection fails; the folder stays as it is.
    """
    again = f"the export stays in {folder}; upload it later with `alignflow export {folder} --push {target.repo}`"
    names = [name for name, _ in listing(folder)]
    try:
        api.create_repo(target.repo, private=not target.public, exist_ok=True)
        private = bool(api.repo_info(target.repo).private)
        if not private and not target.public:
            raise PublishError(
                f"{target.repo} is a public repository. Add --public to upload to it, or choose another name; {again}"
            )
        if target.revision != "main":
            api.create_branch(target.repo, branch=target.revision, exist_ok=True)
        api.upload_folder(
            repo_id=target.repo,
            folder_path=folder,
            revision=target.revision,
            commit_message=target.message or f"Upload {folder.name} with alignflow",
            allow_patterns=names,
        )
    except PublishError:
        raise
    except Exception as error:  # HTTP, file transfer, disk: the hub's libraries raise many kinds
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise PublishError(
                f"the token may not write to {target.repo}. Create one with write access to it at {TOKENS}; {again}"
            ) from error
        raise PublishError(f"the upload to {target.repo} failed: {first_line(error)}; {again}") from error
    return target.url
