"""Whether a translation model learns or has collapsed: figures of an evaluation, alarms, and their likely causes.

Three illnesses hide behind a falling loss: an encoder that says the same of every utterance, a CTC head that says
nothing but blanks, and labels that no alignment fits, which `zero_infinity` makes free.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

MAX_COSINE = 0.95
MAX_BLANK_SHARE = 0.98
MAX_INFEASIBLE_SHARE = 0.05
HEADS = {"asr": "the transcript's CTC", "st": "the translation's CTC", "unit": "the units' CTC"}
METRIC_PREFIX = "eval_"


@dataclass
class HealthArguments:
    """What a run does about a collapse."""

    stop_on_collapse: bool = field(
        default=False, metadata={"help": "Stop once evaluations in a row raise an alarm; the model is kept."}
    )
    collapse_patience: int = field(
        default=3, metadata={"help": "Evaluations in a row with an alarm after which stop_on_collapse stops."}
    )

    def __post_init__(self):
        if self.collapse_patience < 1:
            raise ValueError(
                f"`collapse_patience` must be at least 1, got {self.collapse_patience}. Every CTC begins with blanks "
                "alone, so one alarm is no collapse yet."
            )

    @property
    def options(self) -> dict[str, bool | int]:
        """What a [`HealthCallback`] is told."""
        return {"stop_on_collapse": self.stop_on_collapse, "patience": self.collapse_patience}


class HealthMeter:
    """
    Gathers the figures of an evaluation, a batch at a time.

    Example:

    ```python
    >>> import torch
    >>> from training.health import mean_pairwise_cosine

    >>> round(mean_pairwise_cosine(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])), 4)
    0.3333

    ```
    """

    def __init__(self):
        self._pooled: list[torch.Tensor] = []
        self._pooled_features: list[torch.Tensor] = []
        self._frames = dict.fromkeys(HEADS, 0)
        self._blanks = dict.fromkeys(HEADS, 0)
        self._rows = dict.fromkeys(HEADS, 0)
        self._misfits = dict.fromkeys(HEADS, 0)

    @torch.no_grad()
    def update(self, model, output, batch: Mapping[str, torch.Tensor] | None = None) -> None:
        """
        Adds a batch.

        Args:
            model: With `config.blank_token_id` and `config.unit_blank_id`.
            output: Of an EchoStream model: `encoder_out` `(batch, frames, hidden)`, `encoder_lengths` `(batch,)`, and
                the logits, lengths and misfits of the heads that ran.
            batch: Its `input_features` `(batch, frames, mel)` and `attention_mask`, for the cause of a collapse.
        """
        self._pooled.append(pool_frames(output.encoder_out, output.encoder_lengths))
        if batch is not None and batch.get("input_features") is not None:
            features, mask = batch["input_features"], batch.get("attention_mask")
            lengths = mask.sum(-1) if mask is not None else torch.full((len(features),), features.shape[1])
            self._pooled_features.append(pool_frames(features, lengths))
        for head in HEADS:
            logits = getattr(output, f"{head}_logits", None)
            if logits is None:
                continue
            lengths = output.unit_lengths if head == "unit" else output.encoder_lengths
            blank = model.config.unit_blank_id if head == "unit" else model.config.blank_token_id
            is_frame = mark_frames(logits, lengths)
            self._frames[head] += int(is_frame.sum())
            self._blanks[head] += int(((logits.argmax(-1) == blank) & is_frame).sum())
            misfits = getattr(output, f"{head}_misfits", None)
            if misfits is not None:
                self._rows[head] += len(misfits)
                self._misfits[head] += int(misfits.sum())

    def compute(self) -> dict[str, float]:
        """
        Returns `encoder_cosine` and `feature_cosine` (mean over all pairs of utterances), and a head's
        `<head>_blank_share` (of its frames) and `<head>_infeasible_share` (of the rows with labels), as far as seen.
        """
        figures = {}
        for name, pooled in (("encoder_cosine", self._pooled), ("feature_cosine", self._pooled_features)):
            if sum(map(len, pooled)) > 1:
                figures[name] = mean_pairwise_cosine(torch.cat(pooled))
        for head in HEADS:
            if self._frames[head]:
                figures[f"{head}_blank_share"] = self._blanks[head] / self._frames[head]
            if self._rows[head]:
                figures[f"{head}_infeasible_share"] = self._misfits[head] / self._rows[head]
        return figures


def mark_frames(frames: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Returns which of `frames` `(batch, frames, width)` are no padding, `(batch, frames)`."""
    return torch.arange(frames.shape[1], device=frames.device) < lengths.to(frames.device).unsqueeze(1)


def pool_frames(frames: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Returns the mean over each row's frames `(batch, width)` on the CPU; a row without frames has no mean."""
    mask = mark_frames(frames, lengths).unsqueeze(-1)
    total = (frames.double() * mask).sum(1)
    return (total / lengths.to(frames.device).unsqueeze(1))[lengths.to(frames.device) > 0].cpu()


def mean_pairwise_cosine(vectors: torch.Tensor) -> float:
    """Returns the mean cosine of all pairs of different rows of `(rows, width)`, in linear time."""
    units = torch.nn.functional.normalize(vectors.double(), dim=-1)
    num_rows = len(units)
    # |sum of u|^2 is the sum over all pairs, each row with itself among them.
    return float((units.sum(0).square().sum() - units.square().sum()) / (num_rows * (num_rows - 1)))


def find_alarms(figures: Mapping[str, float]) -> list[str]:
    """
    Returns what is wrong, each with its likely cause and what to do; nothing where all is well.

    Args:
        figures: From [`HealthMeter.compute`].
    """
    alarms = []
    cosine, features = figures.get("encoder_cosine", 0.0), figures.get("feature_cosine", 0.0)
    if not cosine <= MAX_COSINE:  # NaN too
        alarms.append(
            f"The encoder says nearly the same of all utterances (mean cosine {cosine:.4f}, alarm above {MAX_COSINE})."
            f" {_explain_encoder(features)}"
        )
    for head, name in HEADS.items():
        infeasible = figures.get(f"{head}_infeasible_share", 0.0)
        if not infeasible <= MAX_INFEASIBLE_SHARE:
            alarms.append(
                f"{_capitalize(name)} cannot align {infeasible:.1%} of the utterances, which teach it nothing, alarm "
                f"above {MAX_INFEASIBLE_SHARE:.0%}. {_explain_misfits(head)}"
            )
        blank = figures.get(f"{head}_blank_share", 0.0)
        if not blank <= MAX_BLANK_SHARE:
            alarms.append(
                f"{_capitalize(name)} says the blank in {blank:.1%} of its frames, alarm above {MAX_BLANK_SHARE:.0%}. "
                + _explain_blanks(is_encoder_ill=not cosine <= MAX_COSINE, infeasible=infeasible)
            )
    return alarms


def format_health(figures: Mapping[str, float]) -> str:
    """Returns the figures in one line."""
    parts = [f"{name.replace('_', ' ')} {figures[name]:.3f}" for name in figures if name.endswith("cosine")]
    parts += [f"{name.replace('_', ' ')} {figures[name]:.1%}" for name in figures if name.endswith("share")]
    return ", ".join(parts)


def pick_figures(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns the health figures among an evaluation's metrics, without the Trainer's prefix."""
    named = {name.removeprefix(METRIC_PREFIX): value for name, value in metrics.items()}
    return {
        name: value for name, value in named.items() if name.endswith(("_cosine", "_blank_share", "_infeasible_share"))
    }


def _explain_encoder(feature_cosine: float) -> str:
    if feature_cosine > MAX_COSINE:
        return (
            f"So do its features (mean cosine {feature_cosine:.4f}): likely the feature extractor has no `mean` and "
            "`std` of the corpus, or this speech is of another kind than what they were measured on, such as of a "
            "telephone. Measure them on the training data, or train on such speech."
        )
    return (
        "Its features differ, so it has collapsed itself: likely its learning rate is too high or its warm-up too "
        "short. Begin again with a lower one, or with an encoder that has learned to transcribe."
    )


def _explain_misfits(head: str) -> str:
    if head == "unit":
        return (
            "Likely `unit_upsampling` is below the units a subword, 8 to 15 in most corpora: raise it to 25, or take "
            "units without repeats."
        )
    return "Likely texts do not belong to their audio, or subwords are too short: check them, or raise the vocabulary."


def _explain_blanks(*, is_encoder_ill: bool, infeasible: float) -> str:
    if is_encoder_ill:
        return "It follows from the encoder, which gives it nothing to tell utterances apart."
    if not infeasible <= MAX_INFEASIBLE_SHARE:
        return "It follows from the utterances that it cannot align."
    return (
        "Every CTC begins so; if it lasts, likely the learning rate is too low or too high for it, or its loss counts "
        "too little beside the others: look at its loss alone, then change the rate or its weight."
    )


def _capitalize(name: str) -> str:
    return name[0].upper() + name[1:]


class HealthCallback(TrainerCallback):
    """
    Prints the health figures of every evaluation, warns of alarms, and stops where it is asked to.

    Args:
        stop_on_collapse: Stop the training after `patience` evaluations in a row with an alarm.
        patience: See above.
    """

    def __init__(self, *, stop_on_collapse: bool = False, patience: int = 3):
        self.stop_on_collapse, self.patience = stop_on_collapse, patience
        self.num_alarms = 0
        self.has_stopped = False

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **_others,
    ) -> None:
        """Reads the figures out of the evaluation's metrics."""
        del args
        figures = pick_figures(metrics or {})
        if not figures:
            return
        alarms = find_alarms(figures)
        self.num_alarms = self.num_alarms + 1 if alarms else 0
        if state.is_world_process_zero:
            print(f"health at step {state.global_step}: {format_health(figures)}")
            for alarm in alarms:
                logger.warning("%s", alarm)
        if self.stop_on_collapse and self.num_alarms >= self.patience:
            self.has_stopped = True
            control.should_training_stop = True
            logger.warning(
                "The training stops at step %d after %d evaluations in a row with an alarm.",
                *(state.global_step, self.num_alarms),
            )
