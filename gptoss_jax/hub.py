"""From a model's name to a local folder: the model in the box, a folder, or one of the Hub's.

Knows which files of a repository a checkpoint needs and how the Hub fails; knows nothing of what is
in the files.
"""

import os
import re
from pathlib import Path

from gptoss_jax.errors import GptOssError

TINY = "gpt-oss-tiny"
_HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?P<original>/original)?")
# A repository also holds OpenAI's layout and one for Metal, each as large as the rest.
_WANTED = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "kept_tokens.txt",
    "params/*",
    "LICENSE*",
    "USAGE*",
)
_UNWANTED = ("original/*", "metal/*", "*/*.safetensors")


def resolve(
    source: str | os.PathLike[str], *, revision: str | None = None, offline: bool | None = None
) -> Path:
    """Local folder of a checkpoint, downloaded if it is on the Hub and not yet in the Hub's cache.

    A folder that exists wins over a Hub id of the same spelling. Only tensors, JSON, the chat
    template and licences are downloaded, with progress bars on stderr and resumed where a download
    was cut off.

    Args:
      source: "gpt-oss-tiny", a folder, a Hub id such as "openai/gpt-oss-20b", or
        "openai/gpt-oss-20b/original" for OpenAI's own layout in the same repository.
      revision: Branch, tag or commit on the Hub; the main branch when None.
      offline: Use only the cache; when None, the environment variable HF_HUB_OFFLINE decides.

    Returns:
      The folder.

    Raises:
      GptOssError: There is no such folder or repository or revision, access is refused, or the
        network does not answer and the cache does not hold it.
    """
    folder = Path(source).expanduser()
    hub_id = _HUB_ID.fullmatch(str(source))
    if source == TINY:
        folder = Path(__file__).parent / "assets" / TINY
    if folder.is_dir():
        if revision is not None:
            raise GptOssError(
                f"revision {revision!r} of the local folder {source}: only the Hub has revisions"
            )
        return folder
    if not hub_id:
        raise GptOssError(
            f"{source}: no such folder, and not a Hub id of the form owner/name: "
            f"try openai/gpt-oss-20b or {TINY}"
        )
    return _download(hub_id["repo"], bool(hub_id["original"]), revision, offline)


def provenance(source: str | os.PathLike[str], folder: Path) -> tuple[str, str | None]:
    """Where a resolved folder came from, for a manifest: the source, and the Hub's commit.

    Args:
      source: What `resolve` was given.
      folder: What it returned.
    """
    parts = folder.parts
    commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else None
    return str(source), commit


def _download(repo: str, original: bool, revision: str | None, offline: bool | None) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    offline = constants.HF_HUB_OFFLINE if offline is None else offline
    at = f" at revision {revision!r}" if revision else ""
    try:
        snapshot = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=["original/*.json", "original/*.safetensors"]
            if original
            else list(_WANTED),
            ignore_patterns=None if original else list(_UNWANTED),
            local_files_only=offline,
        )
    except errors.GatedRepoError:
        raise GptOssError(
            f"{repo}: access has to be granted first: visit {constants.ENDPOINT}/{repo} and set "
            "HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise GptOssError(f"{repo}: the Hub has no revision {revision!r} of it") from None
    except errors.RepositoryNotFoundError:
        raise GptOssError(
            f"{repo}: no such folder here and no such repository on {constants.ENDPOINT} "
            "(a private one needs HF_TOKEN)"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        if offline:
            raise GptOssError(
                f"{repo}{at}: not in the Hub's cache {constants.HF_HUB_CACHE}, and offline: "
                "download it once with the network"
            ) from error
        raise _unreachable(repo, at) from error
    except errors.HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0]
        raise GptOssError(f"{repo}{at}: the Hub refused: {reason}") from error
    except OSError as error:
        if "No space left" in str(error):
            raise GptOssError(
                f"{repo}: the disk of {constants.HF_HUB_CACHE} is full: free space or set HF_HOME "
                "elsewhere"
            ) from error
        raise _unreachable(repo, at) from error
    except Exception as error:
        # Connection errors of httpx are no OSError; older versions of the library use requests.
        if type(error).__module__.split(".")[0] in ("httpx", "httpcore", "requests", "urllib3"):
            raise _unreachable(repo, at) from error
        raise
    return Path(snapshot, "original") if original else Path(snapshot)


def _unreachable(repo: str, at: str) -> GptOssError:
    from huggingface_hub import constants

    return GptOssError(
        f"{repo}{at}: {constants.ENDPOINT} does not answer and the cache {constants.HF_HUB_CACHE} "
        "does not hold it: check the network, or give a local folder"
    )
