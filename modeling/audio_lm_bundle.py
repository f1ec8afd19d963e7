"""Bundles of audio language models: what was trained, and a manifest that names the bases it was trained on.

    config.json                the whole architecture, both sides' configurations in it
    audio_lm.json              of each side: its base's name, revision and fingerprint; digests of the adapters
    model.safetensors          the projector, and every weight of a side that was trained whole
    encoder_adapter/           the encoder's LoRA, which also loads into the encoder alone
    language_model_adapter/    the language model's LoRA, which also loads into the language model alone

A bundle whose base is not the one that it was trained on is refused.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype
from safetensors import safe_open
from safetensors.torch import save as serialize_tensors
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from .adapter_files import save_adapter
from .adapter_layer import is_adapter_parameter
from .adapter_loading import ADAPTER_WEIGHTS_NAME, load_speech_adapter, locate_base, name_on_disk
from .audio_encoders import find_max_inputs, make_encoder
from .audio_lm_modes import PROJECTOR, find_side, name_part, share_adapters
from .audio_lm_sides import (
    ENCODER,
    LANGUAGE_MODEL,
    add_audio_token,
    is_quantized,
    load_audio_encoder,
    load_language_model,
    load_tokenizer,
)
from .files import find_whole, reading, write_whole
from .fingerprint import WRAPPER_NAMES, fingerprint_base, list_base_weights, list_differences

MANIFEST_NAME = "audio_lm.json"
VERSION = 1
SIDES = (ENCODER, LANGUAGE_MODEL)
MAX_MESSAGE = 1_000  # characters of differences that a message shows
PROBE_TOKENS = 4


@dataclass
class BaseSide:
    """
    Where a side comes from.

    Args:
        name_or_path: Folder or Hub name.
        revision: Commit on the Hub, if it is there.
        is_in_4bit: Whether it is loaded in NF4.
        fingerprint: Of the base, as [`fingerprint_base`]; None until it is needed.
        is_whole: Whether a bundle has all its weights.
    """

    name_or_path: str
    revision: str | None = None
    is_in_4bit: bool = False
    fingerprint: dict[str, object] | None = None
    is_whole: bool = False


def load_sides(
    encoder: str, language_model: str, modes: Mapping[str, str], *, dtype: str | torch.dtype, **kwargs
) -> tuple[PreTrainedModel, PreTrainedModel, int, dict[str, BaseSide]]:
    """
    Returns encoder, causal language model, the placeholder's token and where both come from.

    Args:
        encoder: Folder or Hub name.
        language_model: Likewise.
        modes: Of each side; in mode qlora a side loads in 4 bits.
        dtype: Of the weights.
        kwargs: As in `from_pretrained`, for both.

    Raises:
        ValueError: As [`load_audio_encoder`] and [`load_language_model`], or the language model has another head than
            one linear layer.
    """
    options = {"dtype": dtype, **kwargs}
    tower = load_audio_encoder(encoder, load_in_4bit=modes[ENCODER] == "qlora", **options)
    causal_lm = load_language_model(language_model, load_in_4bit=modes[LANGUAGE_MODEL] == "qlora", **options)
    check_head(causal_lm)
    audio_token_id = add_audio_token(load_tokenizer(language_model, **_pick_hub_options(kwargs)))
    bases = {
        name: BaseSide(locate_base(str(source)), getattr(side.config, "_commit_hash", None), is_quantized(side))
        for name, source, side in ((ENCODER, encoder, tower), (LANGUAGE_MODEL, language_model, causal_lm))
    }
    return tower, causal_lm, audio_token_id, bases


def _pick_hub_options(kwargs: Mapping[str, object]) -> dict[str, object]:
    names = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
    return {name: kwargs[name] for name in names if kwargs.get(name) is not None}


@torch.no_grad()
def check_head(causal_lm: PreTrainedModel) -> None:
    """
    Makes sure that a language model is a body and one linear head without bias: nothing else would be the same.

    Raises:
        ValueError: It is not.
    """
    head = causal_lm.get_output_embeddings()
    if isinstance(head, nn.Linear) and head.bias is None and causal_lm.base_model is not causal_lm:
        tokens = torch.arange(PROBE_TOKENS, device=causal_lm.device).unsqueeze(0)
        states = causal_lm.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        if torch.equal(head(states), causal_lm(input_ids=tokens, use_cache=False).logits):
            return
    raise ValueError(
        "`language_model` must make its logits with one linear layer without bias, got a "
        f"{type(causal_lm).__name__}, which scales, bends or shifts them. Choose a Llama, Mistral, Qwen or the like."
    )


def assemble(
    model_class: type[PreTrainedModel],
    encoder: PreTrainedModel,
    causal_lm: PreTrainedModel,
    bases: dict[str, BaseSide],
    config: object,
) -> PreTrainedModel:
    """Returns an audio language model around two models, which are not copied; its projector is fresh, in fp32."""
    with torch.device("meta"):
        model = model_class(config)
    model.model.audio_tower = encoder
    model.model.language_model = causal_lm.base_model
    model.lm_head = causal_lm.get_output_embeddings()
    projector = type(model.model.multi_modal_projector)(config)
    for module in projector.modules():
        model._init_weights(module)
    model.model.multi_modal_projector = projector.to(device=causal_lm.device, dtype=torch.float32)
    model.generation_config = copy.deepcopy(causal_lm.generation_config)
    model.base_sides = bases
    model.trained_names = set()
    return model.eval()


def make_config(config_class: type, encoder: PreTrainedModel, causal_lm: PreTrainedModel, **options) -> object:
    """Returns the configuration of an audio language model of two sides; how they are quantised is none of it."""
    configs = [copy.deepcopy(side.config) for side in (encoder, causal_lm)]
    for config in configs:
        vars(config).pop("quantization_config", None)
    return config_class(audio_config=configs[0], text_config=configs[1], **options)


def is_bundle(path_or_repo: str | Path, **kwargs) -> bool:
    """Whether a folder or repository holds a bundle."""
    return _find_file(path_or_repo, MANIFEST_NAME, kwargs) is not None


def _find_file(path_or_repo: str | Path, name: str, kwargs: Mapping[str, object]) -> Path | None:
    if Path(path_or_repo).is_dir():
        path = find_whole(path_or_repo, name)
        return path if path.is_file() else None
    found = cached_file(
        str(path_or_repo), name, **_pick_hub_options(kwargs),
        _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    return None if found is None else Path(found)


def save_bundle(model: PreTrainedModel, save_directory: str | Path) -> None:
    """
    Writes what was trained of `model` and the manifest of its bases.

    Args:
        model: An audio language model of [`assemble`].
        save_directory: The folder; made if it does not exist.

    Raises:
        ValueError: As [`save_adapter`].
    """
    folder = Path(save_directory)
    digests = {name: _save_side_adapter(model, name, folder) for name in SIDES}
    state = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if not is_adapter_parameter(name) and (name_part(name) == PROJECTOR or name in model.trained_names)
    }
    state = {_unwrap(name): value for name, value in state.items()}
    manifest = {"version": VERSION, "bases": {}, "adapters": {key: value for key, value in digests.items() if value}}
    for name, base in model.base_sides.items():
        base.is_whole = _is_whole(model, name)
        if base.fingerprint is None:
            base.fingerprint = fingerprint_base(find_side(model, name))
        manifest["bases"][name] = asdict(base)
    with write_whole(folder) as scratch:
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        if model._auto_class is not None:
            custom_object_save(model, scratch, config=config)
        config.save_pretrained(scratch)
        model.generation_config.save_pretrained(scratch)
        (scratch / SAFE_WEIGHTS_NAME).write_bytes(serialize_tensors(state, metadata={"format": "pt"}))
        text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False)
        (scratch / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def _save_side_adapter(model: PreTrainedModel, name: str, folder: Path) -> str | None:
    """Writes the LoRA of a side, if it has one, and returns the digest of its weights."""
    side = find_side(model, name)
    if name not in getattr(side, "peft_config", {}):
        return None
    base, config = model.base_sides[name], side.peft_config[name]
    config.base_model_name_or_path, config.revision = base.name_or_path, base.revision
    save_adapter(side, folder / f"{name}_adapter", name)
    return _digest_file(find_whole(folder / f"{name}_adapter", ADAPTER_WEIGHTS_NAME))


def _digest_file(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _is_whole(model: PreTrainedModel, name: str) -> bool:
    """Whether all weights of a side's base have been trained, but those that its class holds still."""
    names = [key for key, value in model.named_parameters() if not is_adapter_parameter(key)]
    names = [key for key in names if name_part(key) == name and not key.endswith("audio_tower.embed_positions.weight")]
    return all(key in model.trained_names for key in names)


def _unwrap(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPER_NAMES)


def load_bundle(
    model_class: type[PreTrainedModel],
    path_or_repo: str | Path,
    *,
    encoder: str | None = None,
    language_model: str | None = None,
    dtype: str | torch.dtype = "float32",
    device_map: object = None,
    allow_base_mismatch: bool = False,
    load_in_4bit: bool | None = None,
    **kwargs,
) -> PreTrainedModel:
    """
    Returns an audio language model as it was saved, frozen, in evaluation mode: set its modes to train on.

    Args:
        model_class: Of the model.
        path_or_repo: Folder or Hub name of the bundle.
        encoder: Where the encoder's base is now. Default: where the manifest says.
        language_model: Likewise of the language model.
        dtype: Of the bases; what was trained stays in the precision that it has.
        device_map: As in `from_pretrained`, for both.
        allow_base_mismatch: Load it on other bases than its own.
        load_in_4bit: Whether the bases are in NF4. Default: as they were in training.
        kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder` of the bundle.

    Raises:
        ValueError: A file is missing or damaged, or a base is missing or another than the bundle's.
    """
    hub = _pick_hub_options(kwargs)
    manifest = _read_manifest(path_or_repo, kwargs)
    config = AutoConfig.from_pretrained(path_or_repo, **hub) if kwargs.get("config") is None else kwargs["config"]
    if not isinstance(config, model_class.config_class):
        config = model_class.config_class.from_pretrained(path_or_repo, **hub)
    bases = {name: BaseSide(**manifest["bases"][name]) for name in SIDES}
    for name, place in ((ENCODER, encoder), (LANGUAGE_MODEL, language_model)):
        if place is not None:
            bases[name].name_or_path, bases[name].revision = locate_base(str(place)), None
        if load_in_4bit is not None and not bases[name].is_whole:
            bases[name].is_in_4bit = load_in_4bit
    sides = [_load_base(name, bases[name], config, dtype, device_map, hub) for name in SIDES]
    model = assemble(model_class, *sides, bases, config)
    for name in SIDES:
        if not bases[name].is_whole and name not in manifest["adapters"] and not allow_base_mismatch:
            _check_base(model, name, bases[name], path_or_repo)
    _load_trained(model, path_or_repo, kwargs)
    for name, digest in manifest["adapters"].items():
        _load_side_adapter(model, name, path_or_repo, digest, hub, allow_base_mismatch=allow_base_mismatch)
    generation = _find_file(path_or_repo, "generation_config.json", kwargs)
    if generation is not None:
        model.generation_config = GenerationConfig.from_pretrained(generation.parent)
    return model.requires_grad_(False).eval()


def _read_manifest(path_or_repo: str | Path, kwargs: Mapping[str, object]) -> dict[str, object]:
    path = _find_file(path_or_repo, MANIFEST_NAME, kwargs)
    try:
        with reading(path.parent):
            manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["version"] > VERSION or set(manifest["bases"]) != set(SIDES):
            raise ValueError(f"version {manifest['version']}, bases {sorted(manifest['bases'])}")
        if not set(manifest["adapters"]) <= set(SIDES):
            raise ValueError(f"adapters {sorted(manifest['adapters'])}")
        return manifest
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"`bundle` must have a whole {MANIFEST_NAME} of version {VERSION}, got {path_or_repo} ({error}). Fetch it "
            "again, or update this code."
        ) from error


def _load_base(
    name: str, base: BaseSide, config: object, dtype: str | torch.dtype, device_map: object, hub: Mapping[str, object]
) -> PreTrainedModel:
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    if base.is_whole:  # its weights are in the bundle
        side = make_encoder(config.audio_config) if name == ENCODER else _make_language_model(config)
        device = device_map if isinstance(device_map, (str, torch.device)) and device_map != "auto" else None
        return side.to(device=device, dtype=None if dtype == "auto" else dtype)
    load = load_audio_encoder if name == ENCODER else load_language_model
    options = {key: value for key, value in hub.items() if key in ("token", "cache_dir", "local_files_only")}
    options |= {"revision": base.revision} if base.revision else {}
    options |= {"device_map": device_map} if device_map is not None else {}
    try:
        return load(base.name_or_path, dtype=dtype, load_in_4bit=base.is_in_4bit, **options)
    except OSError as error:
        raise ValueError(
            f"`{name}` must be where the bundle says, got {base.name_or_path!r}, which cannot be read ({error}). Say "
            f"where it is: from_pretrained(bundle, {name}=...)."
        ) from error


def _make_language_model(config: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config.text_config)


def _check_base(model: PreTrainedModel, name: str, base: BaseSide, source: str | Path) -> None:
    if differences := list_differences(base.fingerprint or {}, fingerprint_base(find_side(model, name))):
        raise ValueError(
            f"`{name}` must be the base that the bundle was trained on, got {base.name_or_path}, another than "
            f"that of {source} (its base / this one): {'; '.join(differences)[:MAX_MESSAGE]}. Load its own base, or "
            "insist with `allow_base_mismatch=True`."
        )


@torch.no_grad()
def _load_trained(model: PreTrainedModel, path_or_repo: str | Path, kwargs: Mapping[str, object]) -> None:
    """Fills in the projector and what was trained whole."""
    path = _find_file(path_or_repo, SAFE_WEIGHTS_NAME, kwargs)
    if path is None:
        raise ValueError(f"`bundle` must have {SAFE_WEIGHTS_NAME}, got none in {path_or_repo}. Fetch it again.")
    parameters = dict(model.named_parameters())
    with reading(path.parent), safe_open(path, "pt") as file:
        names = set(file.keys())
        if wrong := sorted((names - parameters.keys()) | _list_needed(model, parameters) - names):
            raise ValueError(
                f"`bundle` must hold exactly the weights of its configuration, got {path_or_repo} where {wrong[0]!r} "
                "is missing or too much. Fetch it again."
            )
        for name in names:
            value = file.get_tensor(name)
            if value.shape != parameters[name].shape or not value.isfinite().all():
                raise ValueError(
                    f"`bundle` must hold finite weights of the right shapes, got {name!r} {tuple(value.shape)} in "
                    f"{path_or_repo} where {tuple(parameters[name].shape)} belongs. Fetch it again."
                )
            parameters[name].copy_(value)
    model.trained_names = {name for name in names if name_part(name) != PROJECTOR}


def _list_needed(model: PreTrainedModel, parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """The weights without which a bundle is none: the projector's, and all of sides that are whole."""
    parts = {PROJECTOR, *(name for name, base in model.base_sides.items() if base.is_whole)}
    held = "model.audio_tower.embed_positions.weight"
    return {name for name in parameters if name_part(name) in parts and name != held}


def _load_side_adapter(
    model: PreTrainedModel,
    name: str,
    path_or_repo: str | Path,
    digest: str,
    hub: Mapping[str, object],
    *,
    allow_base_mismatch: bool,
) -> None:
    side, subfolder = find_side(model, name), f"{name}_adapter"
    probe = None
    if isinstance(side, WhisperEncoder):  # takes 30 s and nothing else
        shape = (1, side.config.num_mel_bins, find_max_inputs(side))
        probe = {"input_features": torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(side.device)}
        probe["input_features"] = probe["input_features"].to(side.dtype)
    load_speech_adapter(
        side, str(path_or_repo), name, subfolder=subfolder, probe_inputs=probe,
        allow_base_mismatch=allow_base_mismatch, **{key: hub[key] for key in hub if key != "subfolder"},
    )  # fmt: skip
    share_adapters(model, name, side)
    weights = _find_file(path_or_repo, f"{subfolder}/{ADAPTER_WEIGHTS_NAME}", hub)
    if weights is None or _digest_file(weights) != digest:
        raise ValueError(
            f"`bundle` must be of one save, got {path_or_repo} whose {subfolder} is of another than {MANIFEST_NAME}. "
            "Save or fetch it again."
        )
    _restore_precision(side, name, weights)


@torch.no_grad()
def _restore_precision(side: PreTrainedModel, name: str, weights: Path) -> None:
    """Gives a LoRA the very numbers of its file: transformers 5.23 rounds them to the precision of the base."""
    cast_adapter_dtype(side, name)
    with safe_open(weights, "pt") as file:
        for key, parameter in side.named_parameters():
            if is_adapter_parameter(key) and f".{name}." in key:
                parameter.copy_(file.get_tensor(name_on_disk(key.replace(f".{name}.", ".", 1))))


@torch.no_grad()
def merge_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Returns every weight of a model by its name, active adapters merged, 4 bits dequantised; changes nothing."""
    state = {}
    for weight in list_base_weights(model):
        if weight.read is None:
            raise ValueError(f"`model` must have all its weights to be saved whole, got none for {weight.name!r}.")
        state[weight.name] = weight.read().detach().cpu()
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and not layer.disable_adapters:
            key = f"{_unwrap(name)}.weight"
            for adapter in layer.active_adapters:
                if adapter in layer._get_available_adapters():
                    delta = layer.get_delta_weight(adapter).cpu()
                    state[key] = (state[key].to(delta.dtype) + delta).to(state[key].dtype)
    return {name: value.contiguous() for name, value in state.items()}


def save_whole(
    model: PreTrainedModel, save_directory: str | Path, save_pretrained: Callable[..., None], **kwargs
) -> None:
    """
    Writes every weight, adapters merged, 4 bits dequantised: a checkpoint that needs no bases and no PEFT.

    Args:
        model: An audio language model.
        save_directory: The folder; made if it does not exist.
        save_pretrained: That of transformers.
        kwargs: As there.
    """
    state = merge_weights(model)
    with torch.device("meta"):
        shell = type(model)(copy.deepcopy(model.config))
    shell.generation_config = model.generation_config
    kwargs.pop("state_dict", None)
    with write_whole(save_directory) as scratch:
        save_pretrained(shell, scratch, state_dict=state, **kwargs)
