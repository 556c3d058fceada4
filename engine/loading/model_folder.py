"""Find a model's folder: shipped with the package, on this disk, or on the hub."""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from engine.errors import CheckpointError, Problem, choices_hint
from engine.loading.other_folders import refuse_file, refuse_other

EMBEDDED = "recipes://"
"""Prefix of the models that come with the package."""

SMALL_FILES = ["*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "SHA256SUMS"]
"""Patterns of what a hub model has beside weights and code."""

_EITHER = "give a folder (model.path=./folder) or a model of the hub (model.path=org/name)"
# Names that the hub surely takes; others are refused by its library, in its own words.
_ORDINARY = re.compile(r"(?=.{1,96}\Z)\w+([.-]\w+)*(/\w+([.-]\w+)*)?(?<!\.git)", re.ASCII)
_ALIKE = 0.7  # of 1, for a folder to be suggested
_ANSWER_WITHIN = 10.0  # seconds that the hub may take


def locate(path: str, revision: str | None, *, download: bool) -> Path | None:
    """Return the folder of a model: shipped (`recipes://NAME`), on this disk, or of the hub.

    A hub model's small files are fetched with `download`; without, the network is not touched and
    None means that they are not here yet. Raises CheckpointError for what cannot be found.
    """
    if path.startswith(EMBEDDED):
        return _embedded(path)
    folder = Path(os.path.expanduser(path))
    if path and folder.is_dir():
        return folder
    if folder.is_file():
        refuse_file(folder)
    if _looks_like_a_path(path):
        there = os.path.abspath(folder)
        looked = "" if there == path else f" (looked for {there})"
        raise _refused(path, f"{path} is not there{looked}", _sibling_hint(path, folder))
    return fetch(path, revision, SMALL_FILES) if download else _cached(path, revision)


def refuse_listed(path: str, revision: str | None, folder: Path) -> None:
    """Raise CheckpointError for a hub model that is something else, by all the files it has."""
    if not is_local(path) and not (folder / "config.json").is_file():
        refuse_other(folder, listed(path, revision))


def is_local(path: str) -> bool:
    """Tell whether `path` means a folder of this machine, whatever the hub has."""
    return path.startswith(EMBEDDED) or Path(os.path.expanduser(path)).is_dir()


def _recipes_root() -> Path:
    spec = find_spec("engine.recipes")
    if spec is None or not spec.submodule_search_locations:
        raise _refused(EMBEDDED, "engine.recipes is not installed", "pip install recipe-engine")
    return Path(next(iter(spec.submodule_search_locations))).resolve()


def _embedded(path: str) -> Path:
    name, root = path.removeprefix(EMBEDDED), _recipes_root()
    if not name or escapes(name) or not (root / name).resolve().is_relative_to(root):
        raise _refused(path, f"{path} is not inside of the package's models", _EITHER)
    if not (root / name).is_dir():
        shipped = [
            config.parent.relative_to(root).as_posix() for config in root.rglob("config.json")
        ]
        hint = choices_hint(name, shipped, prefix=f"model.path={EMBEDDED}")
        raise _refused(path, f"no model named {name} is shipped", hint)
    return root / name


def _looks_like_a_path(path: str) -> bool:
    return path.startswith((".", "/", "~")) or "\\" in path or path.count("/") > 1


def escapes(name: str) -> bool:
    """Tell whether a file's name leads out of its folder."""
    # By its letters: in the hub's cache every file is a link to one outside of its folder.
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name


def _sibling_hint(path: str, folder: Path) -> str:
    if not folder.parent.is_dir():
        return f"{folder.parent} is not there either; {_EITHER}"
    return _neighbor(path, folder) or _EITHER


def _neighbor(path: str, folder: Path) -> str:
    """Ask whether the folder beside it was meant whose name is much like it; '' without one."""
    try:
        siblings = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()]
    except (OSError, ValueError):
        return ""
    # Any folder may lie there, so what is only a little alike is not meant.
    close = get_close_matches(folder.name, siblings, n=1, cutoff=_ALIKE)
    if not close:
        return ""
    start = path[: -len(folder.name)] if path.endswith(folder.name) else f"{folder.parent}/"
    start = f"{folder.parent}/" if start.startswith("~") else start or "./"
    return f"did you mean model.path={start}{close[0]}?"


def _refused(path: str, message: str, hint: str, code: str = "path") -> CheckpointError:
    where = f"model.path={path}"
    return CheckpointError(Problem(code=code, message=message, hint=hint, where=where))


def _cached(repo: str, revision: str | None) -> Path | None:
    from huggingface_hub import constants

    # What reads the cache, and refuses odd names, takes half a second to import.
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    if _ORDINARY.fullmatch(repo) and not folder.is_dir():
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(repo, "config.json", revision=revision)
    except HFValidationError as error:
        raise _unanswered(repo, revision, error) from error
    if isinstance(config, str):
        return Path(config).parent
    return _cached_gguf(folder, revision)


def _cached_gguf(repo: Path, revision: str | None) -> Path | None:
    """Return where the cache has a GGUF file of a repository that has no config.json."""
    ref = repo / "refs" / (revision or "main")
    commit = ref.read_text("utf-8").strip() if ref.is_file() else revision or ""
    there = repo / "snapshots" / commit
    return there if commit and next(there.rglob("*.gguf"), None) else None


def fetch(
    repo: str, revision: str | None, patterns: list[str], *, subfolders: bool = False
) -> Path:
    """Return the folder with a model's files that match `patterns`; with `subfolders` also there.

    Takes what the cache has where the hub does not answer. Raises CheckpointError where that is
    not enough: offline, gated, no such model, no such revision.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    refusal: Exception | None = None
    try:
        # Asked first because this does not retry. A download of a commit does: 23 s, offline.
        HfApi().model_info(repo, revision=revision, timeout=_ANSWER_WITHIN)
    except Exception as error:
        refusal = error
    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=None if subfolders else ["*/*"],
            local_files_only=refusal is not None,
        )
    except LocalEntryNotFoundError as error:
        raise _unanswered(repo, revision, refusal or error) from (refusal or error)
    except Exception as error:
        raise _unanswered(repo, revision, error) from error
    return Path(folder)


def listed(repo: str, revision: str | None) -> list[str] | None:
    """Return the paths of all files of a model of the hub; None where it does not answer."""
    from huggingface_hub import HfApi

    try:
        found = HfApi().model_info(repo, revision=revision, timeout=_ANSWER_WITHIN).siblings
    except Exception:
        return None
    return [each.rfilename for each in found or ()] or None


def _unanswered(repo: str, revision: str | None, error: Exception) -> CheckpointError:
    code, message, hint = _reason(repo, revision, error)
    # Without ./ it was taken for a model of the hub, but a folder may have been meant.
    near = "" if code in ("gated", "revision") else _neighbor(repo, Path(repo))
    return _refused(repo, message, f"{near} else {hint}" if near else hint, code)


def _reason(repo: str, revision: str | None, error: Exception) -> tuple[str, str, str]:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.HFValidationError):
        return "path", f"{_no_folder(repo)}, nor can the hub have it: {error}", _EITHER
    if isinstance(error, errors.GatedRepoError) or _forbidden(error):
        hint = "accept its terms on its page, then `hf auth login`"
        return "gated", f"the hub does not let you read {repo}: gated, or not for your token", hint
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = "check the spelling (org/name); if it is private, `hf auth login`"
        return "not-found", f"{_no_folder(repo)}, nor a model that the hub shows", hint
    if isinstance(error, errors.RevisionNotFoundError):
        hint = "give a branch, tag or commit that its page lists, or leave model.revision out"
        return "revision", f"{repo} has no revision {revision}", hint
    cause = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    unset = " and unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else ""
    hint = f"give a folder (model.path=./folder), or connect{unset}"
    message = f"{_no_folder(repo)}, and fetching it from the hub failed ({cause})"
    return "offline", message, hint


def _no_folder(repo: str) -> str:
    return f"there is no folder '{repo}' in {os.getcwd()}"


def _forbidden(error: Exception) -> bool:
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    # The hub answers 401 for what does not exist, too, and says so in a header.
    return (
        isinstance(error, HfHubHTTPError)
        and not isinstance(error, RepositoryNotFoundError)
        and error.response.status_code in (401, 403)
    )
