"""DeepSpeech2 with CTC: two convolutions, bidirectional recurrent layers, one linear classifier.

Source: Amodei et al., "Deep Speech 2" (arXiv 1512.02595), in the layout of KoSpeech, whose checkpoints convert.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .adapters import SpeechAdapterMixin, adapters_off, find_active_adapters
from .configuration_deepspeech2 import DeepSpeech2Config
from .ctc_labels import check_labels_fit

# Logit of every class but the blank on frames that are padding: argmax gives blank there, and exp underflows to 0.
PADDED_LOGIT = -1e4


@dataclass
class DeepSpeech2CTCOutput(ModelOutput):
    """
    Output of [`DeepSpeech2ForCTC`].

    Args:
        loss (`torch.Tensor` of shape `()`): CTC loss in fp32, when `labels` are given.
        logits (`torch.Tensor` of shape `(batch, frames, vocab_size)`): Scores before the softmax, adapter included.
            Beyond an utterance's end the blank is certain.
        logits_lengths (`torch.Tensor` of shape `(batch,)`): Frames of `logits` that are not padding, 20 ms each.
        base_logits (`torch.Tensor` of shape `(batch, frames, vocab_size)`): Scores of the base alone, when
            asked for.
        hidden_states (`tuple[torch.Tensor]`): Output of the convolutions and of each recurrent layer, adapters
            included, each `(batch, frames, hidden)`.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    logits_lengths: torch.LongTensor | None = None
    base_logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None


def mask_frames(hidden_states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Zeroes `hidden_states` `(batch, ..., frames)` beyond `lengths` `(batch,)` frames."""
    is_frame = torch.arange(hidden_states.shape[-1], device=hidden_states.device) < lengths.to(
        hidden_states.device
    ).unsqueeze(1)  # (batch, frames)
    return hidden_states * is_frame.view(len(lengths), *[1] * (hidden_states.dim() - 2), -1)


def get_output_lengths(input_lengths: torch.Tensor) -> torch.Tensor:
    """Frames of logits for `input_lengths` frames of features; only the first convolution has a stride in time."""
    return (input_lengths + 2 * 5 - 11) // 2 + 1


# In the backward pass of the first convolution oneDNN (torch 2.13, AVX-512) writes outside its memory for 19 to 22
# bins, whatever the channels, and ends the process or spoils it. Seen sound: 4 to 18, 23, 26 to 47 in threes, 40, 80.
UNSAFE_NUM_BINS = range(17, 25)


class DeepSpeech2Convolutions(nn.Module):
    """Halves the frames and quarters the bins; after every step, frames beyond the utterance are zeroed."""

    def __init__(self, config: DeepSpeech2Config):
        super().__init__()
        channels = config.conv_channels
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(1, channels, kernel_size=(41, 11), stride=(2, 2), padding=(20, 5), bias=False),
                nn.BatchNorm2d(channels),
                nn.Hardtanh(0, 20),
                nn.Conv2d(channels, channels, kernel_size=(21, 11), stride=(2, 1), padding=(10, 5), bias=False),
                nn.BatchNorm2d(channels),
                nn.Hardtanh(0, 20),
            ]
        )
        # Bins after strides of 2 and 2, with "same" padding, each rounded up: 161 -> 81 -> 41.
        self.out_features = channels * ((config.num_mel_bins + 3) // 4)

    def forward(self, input_features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        hidden_states = input_features.transpose(1, 2).unsqueeze(1)  # (batch, 1, mel, frames)
        num_bins = hidden_states.shape[2]
        if num_bins in UNSAFE_NUM_BINS:
            hidden_states = nn.functional.pad(hidden_states, (0, 0, 0, UNSAFE_NUM_BINS.stop - num_bins))
        # Bins of zeros are what a convolution pads with anyway: the first ones that come out are the same.
        hidden_states = mask_frames(self.layers[0](hidden_states)[:, :, : (num_bins + 1) // 2], lengths)
        for layer in self.layers[1:]:
            hidden_states = mask_frames(layer(hidden_states), lengths)  # (batch, channels, bins, frames)
        return hidden_states.flatten(1, 2).transpose(1, 2)  # (batch, frames, channels * bins)


class DeepSpeech2RNNLayer(nn.Module):
    """BatchNorm and ReLU over real frames only, then one bidirectional GRU; padding comes out as zeros."""

    def __init__(self, in_features: int, hidden_size: int):
        super().__init__()
        self.in_features, self.out_features = in_features, 2 * hidden_size
        self.batch_norm = nn.BatchNorm1d(in_features)
        self.rnn = nn.GRU(in_features, hidden_size, batch_first=True, bidirectional=True)

    def forward(self, hidden_states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = pack_padded_sequence(hidden_states, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.run_packed(packed), batch_first=True, total_length=hidden_states.shape[1])[0]

    def run_packed(self, packed: PackedSequence) -> PackedSequence:
        """Runs the layer on frames without padding: `(frames, in_features)` to `(frames, out_features)`."""
        frames = torch.relu(self.batch_norm(packed.data))
        return self.rnn(PackedSequence(frames, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices))[0]


class DeepSpeech2Classifier(nn.Sequential):
    """LayerNorm and a linear map without bias; adapters at the classifier wrap it."""

    def __init__(self, in_features: int, vocab_size: int):
        super().__init__(nn.LayerNorm(in_features), nn.Linear(in_features, vocab_size, bias=False))
        self.in_features, self.out_features = in_features, vocab_size


class DeepSpeech2PreTrainedModel(SpeechAdapterMixin, PreTrainedModel):
    config_class = DeepSpeech2Config
    base_model_prefix = "model"
    main_input_name = "input_features"
    # The loss is a mean over utterances: Trainer must not believe that it was divided by `num_items_in_batch`.
    accepts_loss_kwargs = False

    def _get_feat_extract_output_lengths(self, input_lengths: torch.Tensor) -> torch.Tensor:
        return get_output_lengths(input_lengths)  # under the name that transformers' audio models have for it

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.GRU):
            for name, parameter in module.named_parameters():
                if "bias" in name:
                    init.zeros_(parameter)
                elif "weight_hh" in name:
                    # Through `init` on the whole parameter: it leaves weights alone that a checkpoint has filled.
                    init.orthogonal_(parameter)
                else:
                    init.xavier_uniform_(parameter)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class DeepSpeech2Encoder(nn.Module):
    """Convolutions and recurrent layers: `(batch, frames, mel)` to `(batch, frames / 2, 2 * hidden_size)`."""

    def __init__(self, config: DeepSpeech2Config):
        super().__init__()
        self.conv = DeepSpeech2Convolutions(config)
        widths = [self.conv.out_features] + [2 * config.hidden_size] * (config.num_hidden_layers - 1)
        self.rnn_layers = nn.ModuleList(DeepSpeech2RNNLayer(width, config.hidden_size) for width in widths)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, input_features: torch.Tensor, lengths: torch.Tensor) -> Iterator[torch.Tensor]:
        hidden_states = self.conv(input_features, lengths)
        yield hidden_states
        for index, layer in enumerate(self.rnn_layers):
            hidden_states = layer(self.dropout(hidden_states) if index else hidden_states, lengths)
            yield hidden_states


class DeepSpeech2ForCTC(DeepSpeech2PreTrainedModel):
    """
    DeepSpeech2 with a CTC classifier; its adapters come from [`SpeechAdapterConfig`] or any PEFT method.

    Example:

    ```python
    >>> import torch
    >>> from modeling import DeepSpeech2Config, DeepSpeech2ForCTC

    >>> model = DeepSpeech2ForCTC(DeepSpeech2Config(hidden_size=16, num_hidden_layers=1)).eval()
    >>> output = model(torch.zeros(2, 101, 80), attention_mask=torch.ones(2, 101, dtype=torch.long))
    >>> output.logits.shape, output.logits_lengths.tolist()
    (torch.Size([2, 51, 32]), [51, 51])

    ```
    """

    def __init__(self, config: DeepSpeech2Config):
        super().__init__(config)
        self.encoder = DeepSpeech2Encoder(config)
        self.classifier = DeepSpeech2Classifier(2 * config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        output_hidden_states: bool | None = None,
        output_base_logits: bool = False,
        return_dict: bool | None = None,
    ) -> DeepSpeech2CTCOutput:
        """
        Args:
            input_features: Log-mel features `(batch, frames, mel)`.
            attention_mask: 1 for a frame, 0 for padding on the right, `(batch, frames)`.
            labels: Classes `(batch, tokens)`, -100 beyond a transcript's end.
            output_hidden_states: Also return every layer's output.
            output_base_logits: Also return what the base alone would say. A second pass starts at the first adapted
                layer, so it is cheap for an adapter at the classifier and about doubles the time for one between the
                layers.

        Raises:
            ValueError: `input_features` has another number of bins than the model, an utterance has no frame, or a
                transcript needs more frames than there are (CTC would be infinite).
        """
        lengths = self._get_input_lengths(input_features, attention_mask)
        input_features = input_features.to(self.dtype)  # features are fp32, whatever the checkpoint was saved in
        input_features = mask_frames(input_features.mT, lengths).mT  # the first convolution looks 5 frames ahead
        lengths = get_output_lengths(lengths).cpu()  # packing wants lengths on the CPU
        hidden_states = tuple(self.encoder(input_features, lengths))
        logits = self._mask_logits(self.classifier(hidden_states[-1]), lengths)
        loss = None if labels is None else self._ctc_loss(logits, lengths, labels)
        output = DeepSpeech2CTCOutput(
            loss=loss,
            logits=logits,
            logits_lengths=lengths.to(logits.device),
            base_logits=self._base_logits(input_features, lengths, hidden_states) if output_base_logits else None,
            hidden_states=hidden_states if output_hidden_states else None,
        )
        return output.to_tuple() if return_dict is False else output

    def stages(self) -> dict[str, nn.Module]:
        """Returns the modules that run one after the other, by name; all parameters are in them."""
        layers = {f"encoder.rnn_layers.{index}": layer for index, layer in enumerate(self.encoder.rnn_layers)}
        return {"encoder.conv": self.encoder.conv, **layers, "classifier": self.classifier}

    def get_logits_lengths(
        self, input_features: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns how many frames of logits `forward` gives for each row of such features `(batch,)`."""
        return get_output_lengths(self._get_input_lengths(input_features, attention_mask))

    def _get_input_lengths(self, input_features: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        if input_features.dim() != 3 or input_features.shape[-1] != self.config.num_mel_bins:
            raise ValueError(
                f"`input_features` must be (batch, frames, {self.config.num_mel_bins}), got "
                f"{tuple(input_features.shape)}. Make them with this checkpoint's own feature extractor."
            )
        if attention_mask is None:
            lengths = torch.full((len(input_features),), input_features.shape[1], device=input_features.device)
        else:
            lengths = attention_mask.sum(-1)
        if lengths.min() < 1:
            raise ValueError(f"`attention_mask` must leave every row at least one frame, got {lengths.tolist()}.")
        return lengths

    def _base_logits(
        self, input_features: torch.Tensor, lengths: torch.Tensor, hidden_states: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        with adapters_off(self):  # not `no_grad`: recurrent layers round differently there
            if find_active_adapters(self.encoder, even_if_off=True):
                *_, last = self.encoder(input_features, lengths)
            else:
                last = hidden_states[-1]
            return self._mask_logits(self.classifier(last), lengths).detach()

    def _mask_logits(self, logits: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        is_padding = torch.arange(logits.shape[1]) >= lengths.unsqueeze(1)  # (batch, frames)
        if not is_padding.any():
            return logits
        blank = logits.new_full((logits.shape[-1],), PADDED_LOGIT)
        blank[self.config.pad_token_id] = 0.0
        return torch.where(is_padding.to(logits.device).unsqueeze(-1), blank, logits)

    def _ctc_loss(self, logits: torch.Tensor, lengths: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        label_lengths = check_labels_fit(labels, lengths)
        log_probs = logits.float().log_softmax(-1).transpose(0, 1)  # (frames, batch, vocab_size), fp32 for CTC
        with torch.backends.cudnn.flags(enabled=False):
            return nn.functional.ctc_loss(
                log_probs,
                labels.clamp(min=0),
                lengths,
                label_lengths,
                blank=self.config.pad_token_id,
                reduction=self.config.ctc_loss_reduction,
            )
