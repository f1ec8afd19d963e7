"""What an audio language model minimises: the next token of answers, or, for the projector alone, words in place.

answer   cross-entropy of the answers' tokens; prompts and audio are read and not learned
align    which token each row of audio says, by its likeness to the language model's own embeddings: rows come to lie
         where the words that are said lie, and the language model need not run for it

Either hears features, or states of a frozen encoder that ran before.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from data.collators import IGNORED_LABEL
from data.timed_transcripts import SILENCE
from training.objectives import Objective

ALIGN_SCALE = 25.0  # of the cosine between a row and an embedding: a likeness of .5 more is e^12 times as probable


def project_windows(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """
    Returns rows `(rows, hidden)` of all clips of a batch, one behind the other; None where there are no clips.

    Args:
        model: An audio language model.
        batch: With `states` `(windows, frames, width)` and `num_frames` `(windows,)`, or with `input_features` and
            `input_features_mask`.
    """
    body = model.model
    if "states" in batch:
        states = batch["states"].to(model.device)
        if body.config.encoder_layer == "mix":  # cached side by side
            states = states.unflatten(-1, (body.config.num_encoder_states, -1)).transpose(1, 2)
        return body.project_audio(states, batch["num_frames"])
    if "input_features" not in batch:
        return None
    output = body.get_audio_features(batch["input_features"], batch.get("input_features_mask"), return_dict=True)
    return output.pooler_output


class AnswerObjective(Objective):
    """
    An audio language model that learns answers.

    Args:
        model: An audio language model whose modes are set.
    """

    ITEMS: ClassVar[Mapping[str, str]] = {"answer_loss": "tokens"}

    def count_items(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the number of tokens to learn."""
        return {"tokens": (batch["labels"] != IGNORED_LABEL).sum().float()}

    def measure(self, batch: dict) -> dict[str, torch.Tensor]:
        """Returns the mean cross-entropy of the answers' tokens; logits are computed where there is one to learn."""
        names = ("input_ids", "position_ids", "attention_mask")
        inputs = {name: batch[name] for name in names if name in batch}
        rows = project_windows(self.model, batch)
        hidden = self.model.model(**inputs, audio_embeds=rows, use_cache=False).last_hidden_state
        labels = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED_LABEL)  # of the token that follows
        is_learned = labels != IGNORED_LABEL
        logits = self.model.lm_head(hidden[is_learned]).float()  # (tokens to learn, vocabulary)
        return {"answer_loss": nn.functional.cross_entropy(logits, labels[is_learned])}


class AlignObjective(Objective):
    """
    An audio language model whose projector learns to say, row by row, the tokens that are said meanwhile.

    A row is scored by its cosine to the embeddings of all tokens that occur, so that it takes their direction; their
    length it is given at the end, by [`match_length`].

    Args:
        model: An audio language model whose projector trains.
        vocabulary: The tokens of all transcripts `(classes,)`, sorted.

    Raises:
        ValueError: There are no tokens.
    """

    ITEMS: ClassVar[Mapping[str, str]] = {"align_loss": "rows"}

    def __init__(self, model: PreTrainedModel, vocabulary: torch.Tensor):
        super().__init__(model)
        if not len(vocabulary):
            raise ValueError("`vocabulary` must hold the tokens of the transcripts, got none. Give transcripts.")
        self.register_buffer("vocabulary", vocabulary.to(model.device), persistent=False)
        size = self._embed().shape[1]
        # What stands for silence: a direction of its own, which the language model never reads from its table.
        silence = torch.randn(size, generator=torch.Generator().manual_seed(0))
        self.silence = nn.Parameter(silence.to(model.device))

    def _embed(self) -> torch.Tensor:
        return self.model.get_input_embeddings()(self.vocabulary).detach().float()

    def count_items(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the number of rows."""
        return {"rows": torch.tensor(float(len(batch["targets"])))}

    def measure(self, batch: dict) -> dict[str, torch.Tensor]:
        """Returns the mean cross-entropy of the rows' tokens."""
        targets = batch["targets"]
        classes = torch.searchsorted(self.vocabulary, targets) + 1
        classes = classes.masked_fill(targets == SILENCE, 0)
        scores = self.score_tokens(project_windows(self.model, batch))
        return {"align_loss": nn.functional.cross_entropy(scores, classes)}

    def score_tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns scores `(rows, 1 + classes)` of silence and of each token."""
        classes = torch.cat([self.silence.unsqueeze(0), self._embed()])
        return ALIGN_SCALE * nn.functional.normalize(rows.float(), dim=-1) @ nn.functional.normalize(classes, dim=-1).T

    def read_tokens(self, rows: torch.Tensor, num_rows: list[int]) -> list[list[int]]:
        """Returns the tokens that rows of clips say, each once while it lasts: what is learned, to be read."""
        texts = []
        for clip in self.score_tokens(rows).argmax(-1).split(num_rows):
            classes = torch.unique_consecutive(clip)
            texts.append(self.vocabulary[classes[classes > 0] - 1].tolist())
        return texts

    @torch.no_grad()
    def match_length(self, rows: torch.Tensor) -> None:
        """Scales the projector so that rows like `rows` are as long as embeddings: the loss says nothing of it."""
        projector = self.model.model.multi_modal_projector
        last = next(
            getattr(projector, name) for name in ("norm_2", "linear_2", "linear_1") if hasattr(projector, name)
        )
        factor = self._embed().norm(dim=-1).mean() / rows.float().norm(dim=-1).mean()
        for value in last.parameters():
            value.mul_(factor.to(value.dtype))


__all__ = ["AlignObjective", "AnswerObjective", "project_windows"]
