"""Models of the Hugging Face Hub as folders of its cache: `org/name`, or `org/name@revision`.

The network is used through huggingface_hub alone, which reads HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT and
HF_HUB_OFFLINE. A revision is resolved to one commit, and only files of that commit are used. Only those that the model
needs are fetched, and never one that could run: JSON, text, safetensors, and the models of tokenizers.
"""

from __future__ import annotations

import glob
import re
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sfumato.checkpoint.header import shown
from sfumato.checkpoint.layout import INDEX, STEMS, find_parts, is_network, pick_files, stem_of, weight_files
from sfumato.errors import CheckpointError, InputError
from sfumato.storage import PICKLED

PLAIN = {".json", ".txt", ".model"}  # fetched beside .safetensors; .model is the vocabulary of sentencepiece
_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@(?P<revision>[\w./-]{1,200}))?", re.A
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class _Wish:
    """What is asked of the Hub."""

    repo: str
    revision: str | None
    variant: str | None
    skip: Collection[str]

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def is_hub_id(name: str) -> bool:
    """Whether a text has the form `org/name` or `org/name@revision`. A path may have it too: look for that first."""
    match = _ID.fullmatch(name)
    return match is not None and ".." not in name and "--" not in match["repo"]


def fetch(name: str, variant: str | None = None, skip: Collection[str] = (), progress: bool = False) -> Path:
    """The folder of the cache that holds a model's files, fetched if need be; or its one .safetensors file.

    name: `org/name` or `org/name@revision`; without a revision it is the newest commit, and without a connection the
    newest that was fetched. variant: of weights, see `layout.weight_files`. skip: parts to leave out, such as
    "safety_checker". progress: bars on standard error. Nothing is sent under HF_HUB_OFFLINE=1.

    `InputError` for a name of another form. `CheckpointError` when the model or revision does not exist or may not be
    read, when it has no weights that can be used, and when it can neither be fetched nor found in the cache: then the
    message holds the command that fetches it.
    """
    match = _ID.fullmatch(name)
    if match is None or not is_hub_id(name):
        raise InputError(
            f"{name!r} is no model of the Hub: write org/name or org/name@revision", argument="model"
        )
    try:
        from huggingface_hub import constants, errors
    except ImportError:
        raise InputError(
            f"{name} lies on the Hub, which needs: pip install huggingface-hub", argument="model"
        ) from None

    wish = _Wish(match["repo"], match["revision"], variant, skip)
    if constants.is_offline_mode():
        return _from_cache(wish, "HF_HUB_OFFLINE is set")
    try:
        return _download(wish, progress)
    except errors.GatedRepoError:
        page = f"{constants.ENDPOINT}/{wish.repo}"
        reason = f"{wish} is gated: accept its licence at {page}, and set HF_TOKEN to your token"
        raise CheckpointError(reason) from None
    except errors.RepositoryNotFoundError:
        reason = f"the Hub has no model {wish.repo}, or it is private: then set HF_TOKEN to your token"
        raise CheckpointError(reason) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{wish.repo} has no revision {wish.revision or 'main'}") from None
    except errors.HfHubHTTPError as error:
        if error.response.status_code < 500:
            raise CheckpointError(f"the Hub refuses {wish}: {_line(error)}") from None
        reason = _line(error)
    except (errors.RevisionResolutionError, errors.LocalEntryNotFoundError) as error:
        reason = _line(error.__cause__ or error)
    except (errors.HTTPError, ConnectionError) as error:  # of the client beneath: no connection, time-outs
        reason = _line(error)
    return _from_cache(wish, f"the Hub cannot be reached ({reason})")


def choose(
    names: Collection[str], parts: Collection[str] | None, variant: str | None, place: str
) -> list[str]:
    """Which of a repository's files a model needs, by their names alone.

    names: paths with slashes. parts: the folders that its index names, None when it has no index: then it is one part
    (`config.json` and weights at the top), or a single .safetensors file. variant: see `layout.weight_files`.
    `CheckpointError`, which names `place`, when a part has no weights that can be used, or nothing says which to use.
    """
    if parts is not None:
        return [INDEX] + [
            f"{part}/{name}" for part in parts for name in _of_folder(names, part, variant, place)
        ]
    top = _of_folder(names, "", variant, place)
    if "config.json" in top and stem_of(top):
        return top
    singles = [name for name in names if "/" not in name and name.endswith(".safetensors")]
    if len(singles) == 1:
        return singles
    if not singles:  # this says what is there instead
        pick_files([name for name in names if "/" not in name], STEMS[0], variant, place)
    raise CheckpointError(
        f"{place} holds several models: {', '.join(map(shown, sorted(singles)[:10]))}; "
        f"fetch one with `hf download {place.partition('@')[0]} NAME` and give the path that it prints"
    )


def _of_folder(names: Collection[str], folder: str, variant: str | None, place: str) -> list[str]:
    """The needed files directly in a folder, without its name: descriptions, and one variant of the weights."""
    paths = [PurePosixPath(name) for name in names]
    here = sorted(path.name for path in paths if path.parent == PurePosixPath(folder))
    plain = [
        n for n in here if PurePosixPath(n).suffix in PLAIN and ".safetensors." not in n and ".bin." not in n
    ]
    stem = stem_of(here)
    if stem is None:
        if folder and is_network(here) and any(PurePosixPath(name).suffix in PICKLED for name in here):
            pick_files(here, STEMS[0], variant, f"{place}, {folder},")  # says that they are refused
        return plain
    pick = pick_files(here, stem, variant, f"{place}, {folder}," if folder else place)
    return plain + ([pick.single] if pick.single else [str(pick.index), *pick.shards])


def _download(wish: _Wish, progress: bool) -> Path:
    """Fetch what is needed and not yet there. The index comes first: it says which folders are parts."""
    from huggingface_hub import list_repo_files, model_info, resolve_revision, snapshot_download
    from huggingface_hub.utils import tqdm

    def whole(commit: str) -> Path | None:
        known = _listed(wish, commit)
        try:
            return None if known is None else _cached(wish, commit, known)
        except _Lacking:
            return None

    if wish.revision and _COMMIT.fullmatch(wish.revision) and (place := whole(wish.revision)):
        return place
    info = model_info(wish.repo, revision=wish.revision)  # fails at once when the Hub is out of reach
    # the library notes what it resolves, for times without a Hub
    commit = resolve_revision(wish.repo, revision=wish.revision).resolved
    if place := whole(commit):
        return place
    files = info.siblings if info.sha == commit else None
    names = [file.rfilename for file in files] if files else list_repo_files(wish.repo, revision=commit)
    bar = tqdm if progress else _silent(tqdm)

    def get(files: list[str]) -> Path:
        patterns = [glob.escape(file) for file in files]
        return Path(snapshot_download(wish.repo, revision=commit, allow_patterns=patterns, tqdm_class=bar))

    parts = _parts(get([INDEX]), wish) if INDEX in names else None
    return _place(get(wanted := choose(names, parts, wish.variant, str(wish))), wanted)


def _from_cache(wish: _Wish, reason: str) -> Path:
    """The same files from the cache alone. `reason` says why the Hub is not asked."""
    from huggingface_hub import constants, errors, resolve_revision

    try:
        commit = resolve_revision(wish.repo, revision=wish.revision, local_files_only=True).resolved
        return _cached(wish, commit, _listed(wish, commit))
    except (errors.RevisionResolutionError, _Lacking) as error:
        lacking = str(error) if isinstance(error, _Lacking) else "is not in the cache"
    weights = f"*model.{wish.variant}*.safetensors" if wish.variant else "*model*.safetensors"
    command = ["hf", "download", wish.repo]
    command += ["--revision", wish.revision] if wish.revision is not None else []
    for pattern in ("*.json", "*.txt", "*.model", weights):
        command += ["--include", pattern]
    environment = "HF_HUB_OFFLINE=0 " if constants.is_offline_mode() else ""
    raise CheckpointError(
        f"{wish} {lacking} ({constants.HF_HUB_CACHE}), and {reason}; "
        f"fetch it with: {environment}{shlex.join(command)}"
    )


class _Lacking(Exception):
    """The cache does not hold all that the model needs. It says what it lacks, as what follows the model's name."""


def _listed(wish: _Wish, commit: str) -> list[str] | None:
    """What a commit holds, where that was noted when something of it was fetched."""
    from huggingface_hub import errors, get_cached_repo_tree

    try:
        return [file.path for file in get_cached_repo_tree(wish.repo, revision=commit)]
    except errors.CachedRepoTreeNotFoundError:
        return None


def _cached(wish: _Wish, commit: str, names: list[str] | None) -> Path:
    """The model in the cache, if it is whole. names: what the commit holds; None takes what is there for it."""
    from huggingface_hub import constants

    # where a commit lies is part of the cache's documented layout
    folder = Path(constants.HF_HUB_CACHE) / f"models--{wish.repo.replace('/', '--')}" / "snapshots" / commit
    if not _COMMIT.fullmatch(commit) or not folder.is_dir():
        raise _Lacking("is not in the cache")
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    indexed = INDEX in (here if names is None else names)
    if indexed and INDEX not in here:
        raise _Lacking(f"lacks {INDEX} in the cache")
    parts = _parts(folder, wish) if indexed else None
    try:
        wanted = choose(here if names is None else names, parts, wish.variant, str(wish))
        for part in parts or () if names is None else ():
            there = [path.name for path in (folder / part).iterdir()] if (folder / part).is_dir() else []
            if not there:
                raise _Lacking(f"lacks {part} in the cache")
            if (stem := stem_of(there)) or is_network(there):
                weight_files(folder / part, stem or STEMS[0], wish.variant)
    except CheckpointError as error:
        if names is not None:  # so it is on the Hub
            raise
        raise _Lacking(f"is not whole in the cache: {error}") from None
    for name in wanted:
        if name not in here:
            raise _Lacking(f"lacks {shown(name)} in the cache")
    return _place(folder, wanted)


def _parts(folder: Path, wish: _Wish) -> list[str]:
    layout = find_parts(folder)
    return [name for name in (*layout.parts, *layout.absent) if name not in wish.skip]


def _place(folder: Path, wanted: list[str]) -> Path:
    return folder if "config.json" in wanted or INDEX in wanted else folder / wanted[0]


def _line(error: BaseException) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _silent(bar: Any) -> Any:
    """The library's progress bar without its picture."""

    class Silent(bar):
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **{**options, "disable": True})

    return Silent
