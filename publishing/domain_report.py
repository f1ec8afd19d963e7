"""What a domain adaptation did, as pictures and JSON: what trains, gradients, gates, scale, maps, errors."""

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from modeling.adapter_blocks import TransformerBlock
from modeling.files import write_whole
from publishing.adapter_maps import AdapterMaps, record_maps
from publishing.pictures import as_written, escape_control, save_figure, shorten_name
from publishing.report import RATE_LABELS

logger = logging.getLogger(__name__)

REPORT_NAME = "domain_report.json"
PICTURE_NAME = "report_{}.png"
# Beyond these means the gates let nearly nothing or nearly everything pass, and have stopped choosing.
HEALTHY_GATE = (0.3, 0.7)
ERROR_KEY = re.compile(r"(?P<domain>.+)_(?P<rate>wer|cer)_(?P<state>before|off|on|after)")
STATES = {"before": "base", "off": "adapter off", "on": "adapter on"}
GREY, TEAL, ORANGE, PALE = "#9aa5b1", "#1f7a8c", "#d1762b", "#dfe5ea"
MEL_SECONDS = 0.01  # of a spectrogram's frame, in Whisper and Qwen2-Audio alike


def name_group(parameter_name: str) -> str:
    """
    Returns the module of a parameter, the layers of a stack as one.

    Example:

    ```python
    >>> from publishing.domain_report import name_group

    >>> name_group("model.decoder.layers.11.self_attn.q_proj.lora_A.default.weight")
    'model.decoder.layers.*.self_attn.q_proj.lora_A.default'

    ```
    """
    return re.sub(r"\.\d+(?=\.|$)", ".*", parameter_name.rpartition(".")[0])


def group_trainable(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Returns the trainable parameters of each module, as [`name_group`] names it."""
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(name_group(name), []).append(parameter)
    return groups


def list_trainable_names(model: nn.Module) -> list[dict[str, object]]:
    """
    Returns a row for each module that trains: `module`, `tensors`, `parameters`, and their `share` of the whole model.

    Example:

    ```python
    >>> from torch import nn
    >>> from publishing.domain_report import list_trainable_names

    >>> model = nn.ModuleDict({"tower": nn.Linear(2, 2).requires_grad_(False), "projector": nn.Linear(2, 3)})
    >>> list_trainable_names(model)
    [{'module': 'projector', 'tensors': 2, 'parameters': 9, 'share': 0.6}]

    ```
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    sizes = {
        name: [parameter.numel() for parameter in parameters] for name, parameters in group_trainable(model).items()
    }
    return [
        {"module": name, "tensors": len(counts), "parameters": sum(counts), "share": sum(counts) / total}
        for name, counts in sizes.items()
    ]


def find_transformer_blocks(model: nn.Module) -> dict[str, TransformerBlock]:
    """Returns the transformer adapters in `model` that train, by module name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, TransformerBlock) and module.scale.requires_grad
    }


def measure_gates(maps: Iterable[AdapterMaps]) -> torch.Tensor | None:
    """Returns mean, minimum and maximum `(3,)` of the gates of frames that are no padding; `None` without gates."""
    values = [_cut_padding(call.gates, call.frame_lengths) for call in maps if call.gates is not None]
    if not values:
        return None
    gates = torch.cat(values).float()
    return torch.stack([gates.mean(), gates.min(), gates.max()])


def _cut_padding(gates: torch.Tensor, frame_lengths: torch.Tensor | None) -> torch.Tensor:
    if frame_lengths is None:
        return gates.flatten()
    is_frame = torch.arange(gates.shape[1], device=gates.device) < frame_lengths.to(gates.device).unsqueeze(1)
    return gates[is_frame].flatten()


def _find_adapted(model: nn.Module) -> nn.Module:
    """The model inside of a `DomainObjective`, so that modules have the names that they have in the whole model."""
    return getattr(model, "adapted_model", model)


class DomainReportCallback(TrainerCallback, ExportableState):
    """
    Notes at every logged step what moves: `history`, a list of rows that JSON can hold.

    A row has `step`, `loss`, `gradient_norms` of each module before clipping and, of each transformer adapter,
    `scale` and `gates` (`mean`, `min`, `max` over the frames and channels of the step's last batches). The first mean
    outside .3 to .7 is warned of, once.
    """

    def __init__(self):
        self.history: list[dict] = []
        self.has_warned = False
        self._recordings: dict[str, list[AdapterMaps]] = {}
        self._open = ExitStack()
        self._norms: dict[str, torch.Tensor] = {}
        self._gates: dict[str, torch.Tensor] = {}

    def state(self) -> dict:
        """Returns what a checkpoint keeps, so that a resumed run reports all steps."""
        return {"args": {}, "attributes": {"history": list(self.history), "has_warned": self.has_warned}}

    def on_step_begin(self, _args, _state, _control, *, model, **_kwargs) -> None:
        """Begins to record gates; not before, because an evaluation would leave all of its gates in memory."""
        self._recordings = {
            name: self._open.enter_context(record_maps(block, with_attention=False))
            for name, block in find_transformer_blocks(_find_adapted(model)).items()
        }

    def on_pre_optimizer_step(self, _args, _state, _control, *, model, **_kwargs) -> None:
        """Takes norms and gates of the step; as tensors, since reading them would wait for the device each step."""
        self._open.close()
        gradients = {
            name: [parameter.grad for parameter in parameters if parameter.grad is not None]
            for name, parameters in group_trainable(_find_adapted(model)).items()
        }
        self._norms = {name: get_total_norm(values) for name, values in gradients.items() if values}
        gates = {name: measure_gates(maps) for name, maps in self._recordings.items()}
        self._gates = {name: values for name, values in gates.items() if values is not None}

    def on_log(self, _args, state, _control, *, logs, model, **_kwargs) -> None:
        """Adds a row for a logged training step; evaluations and the summary at the end are logged too."""
        if "loss" not in logs or not self._norms:
            return
        norms = {name: norm.item() for name, norm in self._norms.items()}
        # The norms are of clipped gradients, and clipping divided all of them alike.
        clipped = sum(norm**2 for norm in norms.values()) ** 0.5
        unclip = float(logs.get("grad_norm", clipped)) / clipped if clipped else 1.0
        row = {"step": state.global_step, "loss": float(logs["loss"])}
        row["gradient_norms"] = {name: norm * unclip for name, norm in norms.items()}
        row["scale"] = {
            name: block.scale.item() for name, block in find_transformer_blocks(_find_adapted(model)).items()
        }
        names = ("mean", "min", "max")
        row["gates"] = {name: dict(zip(names, values.tolist(), strict=True)) for name, values in self._gates.items()}
        self.history.append(row)
        self._warn(row)

    def _warn(self, row: dict) -> None:
        low, high = HEALTHY_GATE
        for name, gates in row["gates"].items():
            if not low <= gates["mean"] <= high and not self.has_warned:
                self.has_warned = True
                logger.warning(
                    "The gates of %s have mean %.2f at step %d, where %.1f to %.1f is healthy. Lower the "
                    "learning rate or leave the gates out.",
                    *(name, gates["mean"], row["step"], low, high),
                )


def draw_maps(
    path: str | Path,
    *,
    spectrogram: np.ndarray,
    attention: np.ndarray,
    gates: np.ndarray | None,
    name: str,
    seconds: float | None = None,
) -> None:
    """
    Draws a clip's spectrogram and, below it on the same time, the adapter's gates and attention, into a PNG file.

    Args:
        path: The picture.
        spectrogram: `(mel, mel_frames)`, 10 ms a frame.
        attention: How much each frame (first axis) looks at each other one, `(frames, frames)`.
        gates: From 0 to 1, `(frames, hidden)`; `None` for an adapter without.
        name: Of the clip.
        seconds: Duration of the clip, where padding follows. Default: all is clip.
    """
    path = Path(path)
    padded = spectrogram.shape[1] * MEL_SECONDS
    heights = [1.2, 2.4] if gates is None else [1.2, 1.2, 2.4]
    figure = Figure(figsize=(6.4, 1.6 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, height_ratios=heights, sharex=True)
    figure.suptitle(escape_control(name), **as_written([name]))
    _show(axes[0], spectrogram, extent=(0, padded, 0, len(spectrogram)), label="mel bin", cmap="magma")
    if gates is not None:
        image = _show(axes[1], gates.T, extent=(0, padded, 0, gates.shape[1]), label="channel", vmin=0, vmax=1)
        figure.colorbar(image, ax=axes[1], label="gate")
    image = _show(axes[-1], attention, extent=(0, padded, 0, padded), label="of the frame at (s)", cmap="viridis")
    figure.colorbar(image, ax=axes[-1], label="attention")
    axes[-1].set_xlabel("to the frame at (s)")
    axes[-1].set(xlim=(0, seconds or padded), ylim=(0, seconds or padded))
    _save(figure, path)


def _show(axes: Axes, values: np.ndarray, *, extent: tuple, label: str, **options):
    axes.set_ylabel(label)
    return axes.imshow(
        values, extent=extent, origin="lower", aspect="auto", interpolation="nearest", **{"cmap": "cividis", **options}
    )


def draw_clip_maps(
    folder: str | Path,
    model: nn.Module,
    clips: Mapping[str, torch.Tensor],
    run: Callable[[torch.Tensor], object],
    *,
    seconds: Mapping[str, float] | None = None,
) -> list[dict[str, str]]:
    """
    Draws the maps of some clips: of the last layer of the model's first transformer adapter, mean of its heads.

    Args:
        folder: Where the pictures go.
        model: With adapters.
        clips: Name of each clip to its `input_features` `(mel, frames)`.
        run: Calls the part of the model that has the adapter on `input_features` `(1, mel, frames)`.
        seconds: Duration of each clip, where padding follows.

    Returns:
        Rows of `clip`, `adapter` and `picture`, the file name; none if the model has no such adapter.
    """
    rows = []
    for name, block in list(find_transformer_blocks(_find_adapted(model)).items())[:1]:
        for number, (clip, features) in enumerate(clips.items()):
            with torch.inference_mode(), record_maps(block) as maps:
                run(features.unsqueeze(0))
            picture = PICTURE_NAME.format(f"maps_{number}")
            draw_maps(
                Path(folder) / picture,
                spectrogram=features.float().cpu().numpy(),
                attention=maps[0].attentions[-1][0].mean(0).float().cpu().numpy(),
                gates=None if maps[0].gates is None else maps[0].gates[0].float().cpu().numpy(),
                name=clip,
                seconds=(seconds or {}).get(clip),
            )
            rows.append({"clip": clip, "adapter": name, "picture": picture})
    return rows


def list_errors(results: Mapping[str, object]) -> dict[str, dict[str, float]]:
    """
    Returns the error rates in a recipe's results by domain and state: `before`, adapter `off`, adapter `on`.

    Example:

    ```python
    >>> from publishing.domain_report import list_errors

    >>> list_errors({"ldv_wer_before": 0.5, "ldv_wer_after": 0.2, "microphone_wer_off": 0.1, "seed": 1})
    {'ldv': {'before': 0.5, 'on': 0.2}, 'microphone': {'off': 0.1}}

    ```
    """
    errors: dict[str, dict[str, float]] = {}
    for key, value in results.items():
        if match := ERROR_KEY.fullmatch(key):
            state = "on" if match["state"] == "after" else match["state"]
            errors.setdefault(match["domain"], {})[state] = value
    return errors


def write_domain_report(folder: str | Path, report: Mapping[str, object]) -> list[str]:
    """
    Writes `domain_report.json` and the pictures of what it holds into `folder`, each whole.

    Args:
        folder: Output folder of the recipe.
        report: What JSON can hold, of which are drawn, where they are there and not empty,
            - `history`: of [`DomainReportCallback`],
            - `results`: the recipe's, of which [`list_errors`] takes the error rates,
            - `maps`: rows of [`draw_clip_maps`], already drawn.

    Returns:
        File names of all pictures in the order of a card.
    """
    folder = Path(folder)
    history = report.get("history") or []
    pictures = []
    if errors := list_errors(report.get("results") or {}):
        rates = {match["rate"] for match in map(ERROR_KEY.fullmatch, report["results"]) if match}
        pictures.append(_draw_errors(folder, errors, rate=rates.pop()))
    if history:
        pictures.append(_draw_gradients(folder, history))
    if history and history[-1]["gates"]:
        pictures.append(_draw_gates(folder, history))
    if history and history[-1]["scale"]:
        pictures.append(_draw_scale(folder, history))
    pictures += [row["picture"] for row in report.get("maps") or []]
    with write_whole(folder) as scratch:
        text = json.dumps({**report, "pictures": pictures}, indent=2, ensure_ascii=False)
        (scratch / REPORT_NAME).write_text(text + "\n", encoding="utf-8")
    return pictures


def _draw_errors(folder: Path, errors: Mapping[str, Mapping[str, float]], *, rate: str) -> str:
    figure, axes = _new_axes(RATE_LABELS[rate])
    colors = {"before": GREY, "off": PALE, "on": TEAL}
    for offset, (state, label) in zip((-0.27, 0, 0.27), STATES.items(), strict=True):
        there = [(number, rates[state]) for number, rates in enumerate(errors.values()) if state in rates]
        positions = [number + offset for number, _ in there]
        bars = axes.bar(positions, [100 * rate for _, rate in there], 0.25, label=label, color=colors[state])
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    axes.set_xticks(range(len(errors)), list(map(shorten_name, errors)), **as_written(errors))
    axes.margins(y=0.15)
    axes.legend(frameon=False)
    return _save(figure, folder / PICTURE_NAME.format("errors"))


def _draw_gradients(folder: Path, history: Sequence[Mapping]) -> str:
    figure, axes = _new_axes("gradient norm", height=4.0)
    names = list(history[-1]["gradient_norms"])
    common = len(_common_prefix(names))
    for name in names:
        rows = [(row["step"], row["gradient_norms"][name]) for row in history if name in row["gradient_norms"]]
        axes.plot(*zip(*rows, strict=True), marker=".", linewidth=1, label=name[common:] or name)
    axes.set(xlabel="step", yscale="log")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=7)
    return _save(figure, folder / PICTURE_NAME.format("gradients"))


def _common_prefix(names: Sequence[str]) -> str:
    """The modules that all of several names begin with, the last dot included."""
    parts = [name.split(".") for name in names]
    shared = 0
    while len(names) > 1 and all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return "".join(f"{part}." for part in parts[0][:shared])


def _draw_gates(folder: Path, history: Sequence[Mapping]) -> str:
    figure, axes = _new_axes("gate")
    axes.axhspan(*HEALTHY_GATE, color=PALE, label="healthy mean", zorder=0)
    for name, color in zip(history[-1]["gates"], (TEAL, ORANGE, GREY), strict=False):
        rows = [(row["step"], row["gates"][name]) for row in history if name in row["gates"]]
        steps = [step for step, _ in rows]
        low, mean, high = ([gates[key] for _, gates in rows] for key in ("min", "mean", "max"))
        axes.plot(steps, mean, color=color, marker=".", label="mean")
        axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0, label="minimum to maximum")
    axes.set(xlabel="step", ylim=(0, 1))
    axes.legend(frameon=False)
    return _save(figure, folder / PICTURE_NAME.format("gates"))


def _draw_scale(folder: Path, history: Sequence[Mapping]) -> str:
    figure, axes = _new_axes("scale")
    for name in history[-1]["scale"]:
        rows = [(row["step"], row["scale"][name]) for row in history if name in row["scale"]]
        axes.plot(*zip(*rows, strict=True), marker=".", label=name)
    axes.set_xlabel("step")
    axes.legend(frameon=False, fontsize=8)
    return _save(figure, folder / PICTURE_NAME.format("scale"))


def _new_axes(label: str, *, height: float = 3.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> str:
    save_figure(figure, path)
    return path.name
