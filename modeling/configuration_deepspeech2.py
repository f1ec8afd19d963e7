"""Configuration of DeepSpeech2."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class DeepSpeech2Config(PreTrainedConfig):
    r"""
    Configuration of [`DeepSpeech2ForCTC`]. The defaults give the recogniser of KoSpeech with 512 hidden units a
    direction.

    Args:
        num_mel_bins (`int`): Feature bins a frame; at least 4, because two convolutions halve them twice.
        conv_channels (`int`): Channels of both convolutions.
        hidden_size (`int`): Units of a recurrent layer **a direction**; a layer's output is twice as wide.
        num_hidden_layers (`int`): Bidirectional recurrent layers.
        hidden_dropout (`float`): Dropout on the input of every recurrent layer but the first.
        vocab_size (`int`): Classes, the CTC blank among them.
        pad_token_id (`int`): Class of the CTC blank, as in the library's other CTC models.
        inputs_to_logits_ratio (`int`): Audio samples a frame of logits: hop (160 at 16 kHz) times stride (2).
            Pipelines derive timestamps from it.
        ctc_loss_reduction (`str`): `"mean"` (an utterance's loss over its label count, averaged over the batch) or
            `"sum"`.

    Example:

    ```python
    >>> from modeling import DeepSpeech2Config, DeepSpeech2ForCTC

    >>> config = DeepSpeech2Config(num_mel_bins=256, hidden_size=512, num_hidden_layers=5, vocab_size=2000)
    >>> DeepSpeech2ForCTC(config).count_parameters()["total"]
    29082848

    ```
    """

    model_type = "deepspeech2"

    num_mel_bins: int = 80
    conv_channels: int = 32
    hidden_size: int = 512
    num_hidden_layers: int = 5
    hidden_dropout: float | int = 0.1
    vocab_size: int = 32
    pad_token_id: int = 0
    inputs_to_logits_ratio: int = 320
    ctc_loss_reduction: str = "mean"

    def validate_architecture(self):
        """Part of the strict validation: refuses sizes of which no model can be built."""
        if self.num_mel_bins < 4:
            raise ValueError(f"`num_mel_bins` must be at least 4, got {self.num_mel_bins}. Two convolutions halve it.")
        for name in ("conv_channels", "hidden_size", "num_hidden_layers", "vocab_size", "inputs_to_logits_ratio"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"`pad_token_id` must be a class below `vocab_size` ({self.vocab_size}), got {self.pad_token_id}. "
                "It is the CTC blank."
            )
        if self.ctc_loss_reduction not in ("mean", "sum"):
            raise ValueError(f'`ctc_loss_reduction` must be "mean" or "sum", got {self.ctc_loss_reduction!r}.')
