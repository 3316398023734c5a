"""Download files of a repository on the Hugging Face Hub into the Hub's own cache; what can fail there becomes one phrase."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dit.errors import http_status, one_line

LOGIN = "log in with `hf auth login` or set HF_TOKEN"


class DownloadError(Exception):
    """A download failed; its text follows the name of the repository: "is gated: …", and says what to do."""


def download_files(
    repository: str,
    revision: str | None,
    patterns: Sequence[str],
    ignored: Sequence[str] = (),
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """Return the folder of a repository's files in the Hub's cache; those of `patterns` are downloaded if they are not there.

    Args:
        repository: owner/name.
        revision: branch, tag or commit; None for the default.
        patterns, ignored: of the paths of files, with `*`.
        local_files_only: whether to look into the cache alone.
        token: instead of the one that the user is logged in with; False for none.

    Raises:
        DownloadError: they cannot be downloaded.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub import errors as hub

    endpoint = constants.ENDPOINT
    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(ignored),
            local_files_only=local_files_only,
            token=token,
        )
    except hub.GatedRepoError:
        problem = f"is gated: accept its conditions at {endpoint}/{repository}, then {LOGIN}"
    except hub.RevisionNotFoundError:
        problem = f"has no revision {revision!r} on {endpoint}; one of its branches, tags or commits"
    except hub.RepositoryNotFoundError:
        problem = f"is not on {endpoint}; check the id, or {LOGIN} if it is private"
    except hub.HFValidationError:
        problem = "is neither a folder nor an id on the Hub (owner/name)"
    except hub.LocalEntryNotFoundError as error:
        if local_files_only or constants.is_offline_mode():
            switch = "local_files_only" if local_files_only else "HF_HUB_OFFLINE"
            problem = f"is not in the cache {constants.HF_HUB_CACHE}, and {switch} is set; unset it once, to download"
        elif status := http_status(error):
            problem = _refused(endpoint, status)
        else:
            reason = one_line(error.__cause__ or error, with_type=True)
            problem = f"cannot be downloaded from {endpoint} ({reason}); check your network and HF_ENDPOINT"
    except hub.HfHubHTTPError as error:
        problem = _refused(endpoint, error.response.status_code)
    except (hub.HTTPError, OSError, RuntimeError) as error:
        problem = f"is incomplete, {endpoint} broke off ({one_line(error, with_type=True)}); run again to resume the download"
    else:
        return Path(folder)
    raise DownloadError(problem)


def _refused(endpoint: str, status: int) -> str:
    return f"cannot be downloaded, {endpoint} answers {status}; {LOGIN if status in (401, 403) else 'try again later'}"
