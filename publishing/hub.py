"""Puts what a recipe made on the Hub: weights, configuration, processor, code and card; nothing of the training."""

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from transformers import TrainingArguments
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.tokenization_utils_base import (
    ADDED_TOKENS_FILE,
    CHAT_TEMPLATE_FILE,
    FULL_TOKENIZER_FILE,
    SPECIAL_TOKENS_MAP_FILE,
    TOKENIZER_CONFIG_FILE,
)
from transformers.utils import CONFIG_NAME, FEATURE_EXTRACTOR_NAME, GENERATION_CONFIG_NAME, PROCESSOR_NAME

import modeling
from modeling.adapter_loading import ADAPTER_WEIGHTS_NAME
from modeling.adapters import find_adapter_code
from modeling.audio_lm_bundle import MANIFEST_NAME
from modeling.files import find_whole, list_whole
from publishing.card import (
    CARD_NAME,
    RUN_KEY,
    is_hub_name,
    read_results,
    read_subject,
    render_card,
)
from publishing.card_metadata import check_languages
from publishing.domain_report import REPORT_NAME
from publishing.report import RESULTS_NAME

logger = logging.getLogger(__name__)

# What may leave the machine, by name: a folder may hold keys, notes and pickles too.
NAMES = {CARD_NAME, RESULTS_NAME, REPORT_NAME, ADAPTER_CONFIG_NAME, CONFIG_NAME, GENERATION_CONFIG_NAME}
NAMES |= {PROCESSOR_NAME, FEATURE_EXTRACTOR_NAME, TOKENIZER_CONFIG_FILE, FULL_TOKENIZER_FILE, CHAT_TEMPLATE_FILE}
NAMES |= {SPECIAL_TOKENS_MAP_FILE, ADDED_TOKENS_FILE, "vocab.json", "vocab.txt", "merges.txt", "normalizer.json"}
NAMES |= {MANIFEST_NAME, "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"}
WEIGHTS = re.compile(r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
SIDE_ADAPTER = re.compile(r"(encoder|language_model)_adapter/adapter_(config\.json|model\.safetensors)")
DRAWN = re.compile(r"results\.png|report_\w+\.png")
PICTURE = re.compile(r"!\[[^\]]*\]\(([\w.-]+\.png)\)")  # of a card
MAX_SILENT_SECONDS = 120.0  # that a Hub may take to answer, or a connection may carry nothing


@dataclass(frozen=True)
class HubTarget:
    """
    Where a folder goes.

    Args:
        repo_id: Repository, `user/name`.
        is_private: Make it private; None follows the user's default.
        revision: Branch; None for the default one.
        base_model_id: Name on the Hub of an adapter's base.
        base_revision: Commit of the base.
        bundle_bases: Names on the Hub of the bases of an audio language model's bundle, by side (`encoder`,
            `language_model`), where they were folders here.
        token: The user's; None for the one of `hf auth login` or `HF_TOKEN`.
    """

    repo_id: str
    is_private: bool | None = None
    revision: str | None = None
    base_model_id: str | None = None
    base_revision: str | None = None
    bundle_bases: Mapping[str, str] = field(default_factory=dict)
    token: str | None = field(default=None, repr=False)


def take_hub_target(
    training_args: TrainingArguments, *, base: str | None = None, base_model_id: str | None = None
) -> HubTarget | None:
    """
    Returns where the finished folder goes, None if nowhere, after asking the Hub whether it would take it.

    The Trainer is left to think that nothing is pushed: it would upload checkpoints and its pickled arguments, which
    would hold the token.

    Args:
        training_args: Of the recipe; `push_to_hub` is switched off and `hub_token` forgotten.
        base: The adapter's base, as the user gave it; None for a model.
        base_model_id: Its name on the Hub, where `base` is a folder.

    Raises:
        ValueError: As [`check_target`].
    """
    is_wanted, token = training_args.push_to_hub, training_args.hub_token
    training_args.push_to_hub, training_args.hub_token = False, None
    if not is_wanted:
        return None
    target = HubTarget(
        training_args.hub_model_id or "",
        is_private=training_args.hub_private_repo or None,
        revision=training_args.hub_revision,
        base_model_id=base_model_id or (base if base and is_hub_name(base) else None),
        token=token,
    )
    return check_target(target, needs_base=base is not None) if training_args.process_index == 0 else target


def check_target(target: HubTarget, *, needs_base: bool) -> HubTarget:
    """
    Returns `target` with the user's name and the base's commit filled in; nothing is made on the Hub yet.

    Args:
        target: Where a folder shall go.
        needs_base: It holds an adapter.

    Raises:
        ValueError: A name is no Hub name or not the user's, a base is needed and not given or not on the Hub, the
            token is missing, wrong or allows no writing, or the Hub cannot be reached.
    """
    _check_repo_id(target.repo_id, "hub_model_id")
    if needs_base and not target.base_model_id:
        raise ValueError(
            "`hub_base_model_id` must name the base on the Hub, got none and a base that is a folder here. Push the "
            "base first, then give its name."
        )
    api = _open_hub(target.token)
    try:
        user = api.whoami()
    except (OSError, HTTPError) as error:
        raise ValueError(_explain(error, api)) from error
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError("`hub_token` must allow writing, got a token of role 'read'. Make one of role 'write'.")
    repo_id = target.repo_id if "/" in target.repo_id else f"{user['name']}/{target.repo_id}"
    names = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
    if repo_id.split("/")[0] not in names:
        raise ValueError(f"`hub_model_id` must begin with one of {', '.join(names)}, got {repo_id!r}.")
    target = replace(target, repo_id=repo_id)
    return _find_base(target, api) if target.base_model_id else target


def _open_hub(token: str | None) -> HfApi:
    """Returns the Hub's client, which else would wait for an answer without an end (huggingface_hub 2.4)."""
    get_session().timeout = MAX_SILENT_SECONDS
    return HfApi(token=token)


def _find_base(target: HubTarget, api: HfApi) -> HubTarget:
    _check_repo_id(target.base_model_id, "hub_base_model_id")
    try:
        info = api.model_info(target.base_model_id, revision=target.base_revision)
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"`hub_base_model_id` must be a model on the Hub, got {target.base_model_id!r}. Push the base first."
        ) from error
    except (OSError, HTTPError) as error:
        raise ValueError(_explain(error, api)) from error
    return replace(target, base_revision=info.sha)


def _check_repo_id(repo_id: str, flag: str) -> None:
    try:
        validate_repo_id(repo_id)
        is_valid = bool(repo_id)
    except ValueError:
        is_valid = False
    if not is_valid:
        raise ValueError(f"`{flag}` must be a name on the Hub such as me/model, got {repo_id!r}. Paths are none.")


def _explain(error: Exception, api: HfApi) -> str:
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return "`hub_token` must be a valid token of the Hub, got one that it refused. Make one in its settings."
    if isinstance(error, HfHubHTTPError):
        return f"The Hub at {api.endpoint} answered {error.response.status_code}. Try again, or leave out the push."
    if isinstance(error, HTTPError | ConnectionError):
        return f"The Hub at {api.endpoint} must be reachable ({error}). Go online, or leave out the push."
    return "`hub_token` must be given to push. Give it, set HF_TOKEN, or run `hf auth login`."


def collect_files(
    folder: str | Path, target: HubTarget, corrections: Mapping[str, object] | None = None
) -> dict[str, Path | bytes]:
    """
    Returns what of `folder` goes to the Hub, name to file or content: an adapter with its base's name and its code.

    Args:
        folder: Output folder of a recipe.
        target: Where it goes.
        corrections: Fields of the card's [`CardSubject`] that take the place of those noted in the folder.

    Raises:
        ValueError: `folder` holds neither a model nor an adapter, or links, or its card is none that the Hub takes.
    """
    folder = Path(folder)
    files: dict[str, Path | bytes] = {
        name: find_whole(folder, name) for name in list_whole(folder) if name in NAMES or WEIGHTS.fullmatch(name)
    }
    if not files.keys() & {ADAPTER_CONFIG_NAME, CONFIG_NAME}:
        raise ValueError(f"`folder` must hold an adapter or a model, got {folder}. Name the output of a recipe.")
    if subject := read_subject(folder):
        subject = replace(subject, **(corrections or {}))
        subject = replace(subject, language=check_languages(subject.language))
        if target.base_model_id:
            base = {"base": target.base_model_id, "base_revision": target.base_revision, "is_base_on_hub": True}
            subject = replace(subject, **base)
        elif not subject.is_base_on_hub:
            subject = replace(subject, base=None)  # a folder here means nothing there
        files[CARD_NAME] = render_card(folder, subject, repository=target.repo_id).encode()
        results = read_results(folder) | {RUN_KEY: asdict(subject)}
        files[RESULTS_NAME] = (json.dumps(results, indent=2, ensure_ascii=False) + "\n").encode()
    elif corrections:
        raise ValueError(f"`folder` must have a card that a recipe wrote to correct it, got none in {folder}.")
    elif CARD_NAME not in files:
        logger.warning("%s has no %s; the repository gets no card.", folder, CARD_NAME)
    if ADAPTER_CONFIG_NAME in files:
        config = json.loads((folder / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8"))
        config |= {"base_model_name_or_path": target.base_model_id, "revision": target.base_revision}
        files[ADAPTER_CONFIG_NAME] = _write_json(config)
        files |= adapter_code()
    if MANIFEST_NAME in files:
        files |= _collect_bundle(folder, target)
    files |= {path.name: path for path in _find_code(folder, list(files))}
    pictures = PICTURE.findall(_read(files.get(CARD_NAME, b"")).decode())
    files |= {name: find_whole(folder, name) for name in pictures if name in list_whole(folder)}
    if links := sorted(name for name, content in files.items() if isinstance(content, Path) and content.is_symlink()):
        raise ValueError(f"`folder` must hold files to push, got links: {', '.join(links)}. Put the files there.")
    return files


def _collect_bundle(folder: Path, target: HubTarget) -> dict[str, Path | bytes]:
    """The manifest of an audio language model's bundle and its sides' adapters, with their bases' names there."""
    manifest = json.loads(find_whole(folder, MANIFEST_NAME).read_text(encoding="utf-8"))
    files: dict[str, Path | bytes] = {}
    for side, base in manifest["bases"].items():
        if name := target.bundle_bases.get(side):
            _check_repo_id(name, "bundle_bases")
            base |= {"name_or_path": name, "revision": None}
        if not base["is_whole"] and not is_hub_name(base["name_or_path"]):
            raise ValueError(
                f"`folder` must be a bundle on bases of the Hub, got {base['name_or_path']!r} as its {side}. Push "
                "that first and give its name, or save the bundle whole (`save_full`)."
            )
        if side in manifest["adapters"]:
            place = f"{side}_adapter"
            config = json.loads(find_whole(folder / place, ADAPTER_CONFIG_NAME).read_text(encoding="utf-8"))
            config |= {"base_model_name_or_path": base["name_or_path"], "revision": base["revision"]}
            files[f"{place}/{ADAPTER_CONFIG_NAME}"] = _write_json(config)
            files[f"{place}/{ADAPTER_WEIGHTS_NAME}"] = find_whole(folder / place, ADAPTER_WEIGHTS_NAME)
    return files | {MANIFEST_NAME: _write_json(manifest)}


def _write_json(content: dict[str, object]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _find_code(folder: Path, names: Iterable[str]) -> Iterator[Path]:
    """Yields the code that the configurations name, and what it imports."""
    references: list[str] = []

    def note(entries: dict) -> dict:
        for classes in entries.get("auto_map", {}).values():
            references.extend([classes] if isinstance(classes, str) else filter(None, classes))
        return entries

    for name in names:
        if name.endswith("config.json") and name != ADAPTER_CONFIG_NAME:
            json.loads(find_whole(folder, name).read_bytes(), object_hook=note)  # parts of a processor have their own
    for module in sorted({reference.partition(".")[0] for reference in references}):
        entry = find_whole(folder, f"{module}.py")
        if entry.is_file():
            yield from (entry, *map(Path, get_relative_import_files(entry)))


def _read(content: Path | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def adapter_code() -> dict[str, Path]:
    """Returns the file of the adapters and those that it imports: without them a stock model knows no such adapter."""
    return {path.name: path for path in find_adapter_code()}


def _list_replaced(there: Iterable[str], files: Mapping[str, object]) -> list[str]:
    """What an artefact of another kind has left in a repository, and a loader would take for a part of the new one."""
    code = {path.name for path in Path(modeling.__file__).parent.glob("*.py")}
    return sorted(
        name
        for name in set(there) - files.keys() - {CARD_NAME}
        if name in NAMES | code or any(kind.fullmatch(name) for kind in (WEIGHTS, DRAWN, SIDE_ADAPTER))
    )


def push_folder(folder: str | Path, target: HubTarget, corrections: Mapping[str, object] | None = None) -> str:
    """
    Uploads the finished `folder` in one commit and returns its address.

    The same commit removes what a model or an adapter that was pushed there before leaves over.

    Args:
        folder: Output folder of a recipe.
        target: From [`take_hub_target`] or [`check_target`].
        corrections: As for [`collect_files`].

    Raises:
        ValueError: As [`collect_files`]; or the repository is public where a private one is asked for; or the Hub
            refuses or is not there. The folder stays as it is.
    """
    files = collect_files(folder, target, corrections)
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    api = _open_hub(target.token)
    try:
        api.create_repo(target.repo_id, private=target.is_private, exist_ok=True)
        if target.is_private and not api.model_info(target.repo_id).private:
            raise ValueError(
                f"`hub_private_repo` asks for a private repository, but {target.repo_id} is there and public. Choose "
                "another name or change its settings."
            )
        if target.revision:
            api.create_branch(target.repo_id, branch=target.revision, exist_ok=True)
        info = api.model_info(target.repo_id, revision=target.revision)
        replaced = _list_replaced((sibling.rfilename for sibling in info.siblings), files)
        if replaced:
            logger.warning("%s loses what it held before: %s.", target.repo_id, ", ".join(replaced))
        operations += [CommitOperationDelete(name) for name in replaced]
        message = f"Upload {Path(folder).resolve().name}"
        commit = api.create_commit(
            target.repo_id, operations, commit_message=message, revision=target.revision, parent_commit=info.sha
        )
    except (OSError, HTTPError) as error:
        remedy = "The folder is whole; push it with `python recipes/push.py`."
        raise ValueError(f"{_explain(error, api)} {remedy}") from error
    return commit.commit_url
