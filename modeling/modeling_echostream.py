"""EchoStream: speech in, text of both languages and units of the target speech out, by one Emformer and five heads.

    input_features -> subsampler, Emformer -> encoder_out -+-> asr_ctc_decoder            subwords of what is said
                                                           +-> st_ctc_decoder             subwords of what it means
                                                           +-> mt_decoder                 the same, one by one
                                                                 +-> t2u_encoder -> unit_decoder    speech units

Every part is causal from subword to subword, so what a prefix of the translation says is not changed by what follows.

Source: StreamSpeech (arXiv 2406.03049) for the heads, with the Emformer (arXiv 2010.10759) in its Conformer's place.
The layers of the decoders are M2M100's, which are fairseq's pre-norm Transformer, names included.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import GenerationMixin, M2M100Config, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.models.m2m_100.modeling_m2m_100 import (
    M2M100Decoder,
    M2M100DecoderLayer,
    M2M100EncoderLayer,
    M2M100SinusoidalPositionalEmbedding,
)
from transformers.utils import ModelOutput

from .adapters import SpeechAdapterMixin
from .configuration_echostream import EchoStreamConfig
from .ctc import beam_search_ctc, check_classes, collapse_ctc, ctc_loss_of_fitting
from .modeling_emformer import EmformerModel

# Most subwords of a translation, where a caller names no other number.
MAX_NEW_TOKENS = 100
IGNORED_LABEL = -100


@dataclass
class EchoStreamOutput(ModelOutput):
    """
    Output of [`EchoStreamForSpeechToSpeechTranslation`]. Heads without labels have no loss.

    Args:
        loss (`torch.Tensor` of shape `()`): Weighted sum of the losses below.
        asr_loss, st_loss, unit_loss (`torch.Tensor` of shape `()`): CTC losses in fp32, a label, over the rows whose
            labels fit their frames.
        mt_loss (`torch.Tensor` of shape `()`): Cross-entropy with label smoothing, a subword.
        asr_misfits, st_misfits, unit_misfits (`torch.Tensor` of shape `(batch,)`): Rows that have more labels and
            repeats than frames, which no alignment fits; they have no part in the loss.
        encoder_out (`torch.Tensor` of shape `(batch, frames, hidden)`): The encoder's output, 40 ms a frame.
        encoder_lengths (`torch.Tensor` of shape `(batch,)`): Its frames that are not padding.
        asr_logits (`torch.Tensor` of shape `(batch, frames, source_vocab_size)`): Of the transcript.
        st_logits (`torch.Tensor` of shape `(batch, frames, vocab_size)`): Of the translation.
        logits (`torch.Tensor` of shape `(batch, tokens, vocab_size)`): Of the translation's next subword; also
            `mt_logits`.
        unit_logits (`torch.Tensor` of shape `(batch, tokens * unit_upsampling, unit_vocab_size)`): Of the units.
        unit_lengths (`torch.Tensor` of shape `(batch,)`): Frames of `unit_logits` that are not padding.
        past_key_values (`EncoderDecoderCache`): Of the translation's decoder.
    """

    loss: torch.FloatTensor | None = None
    asr_loss: torch.FloatTensor | None = None
    st_loss: torch.FloatTensor | None = None
    mt_loss: torch.FloatTensor | None = None
    unit_loss: torch.FloatTensor | None = None
    asr_misfits: torch.BoolTensor | None = None
    st_misfits: torch.BoolTensor | None = None
    unit_misfits: torch.BoolTensor | None = None
    encoder_out: torch.FloatTensor | None = None
    encoder_lengths: torch.LongTensor | None = None
    asr_logits: torch.FloatTensor | None = None
    st_logits: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    unit_logits: torch.FloatTensor | None = None
    unit_lengths: torch.LongTensor | None = None
    past_key_values: object | None = None

    @property
    def mt_logits(self) -> torch.FloatTensor | None:
        """The decoder's logits, which the library's generation wants under the name `logits`."""
        return self.logits


@dataclass
class EchoStreamGeneration(ModelOutput):
    """
    What [`EchoStreamForSpeechToSpeechTranslation.generate`] returns with units.

    Args:
        sequences (`torch.Tensor` of shape `(batch, tokens)`): Subwords of the translations, the start token first.
        units (`list[list[int]]`): Speech units of each translation, numbers from 0 without repeats.
    """

    sequences: torch.LongTensor | None = None
    units: list[list[int]] | None = None


class EchoStreamT2UEncoder(nn.Module):
    """From states of the translation to states of its speech: causal self-attention, `(batch, tokens, hidden)`."""

    def __init__(self, config: EchoStreamConfig, layer_config: M2M100Config):
        super().__init__()
        self.layer_config = layer_config
        self.layers = nn.ModuleList(M2M100EncoderLayer(layer_config) for _ in range(config.num_t2u_layers))
        for layer in self.layers:
            layer.self_attn.is_causal = True  # what sdpa asks where there is no mask
        self.layer_norm = nn.LayerNorm(layer_config.d_model)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        mask = make_causal_mask(self.layer_config, hidden_states)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask)
        return self.layer_norm(hidden_states)


class EchoStreamUnitDecoder(nn.Module):
    """
    Says all units at once: each subword's state stands for `unit_upsampling` frames, to which CTC gives units.

        states       s0          s1
        frames       0 .... 24   25 ... 49     frame t sees frames 0 to t and states 0 to t // 25
    """

    def __init__(self, config: EchoStreamConfig, layer_config: M2M100Config):
        super().__init__()
        self.layer_config, self.unit_upsampling = layer_config, config.unit_upsampling
        self.embed_positions = M2M100SinusoidalPositionalEmbedding(
            config.max_position_embeddings, layer_config.d_model, layer_config.pad_token_id
        )
        self.layers = nn.ModuleList(M2M100DecoderLayer(layer_config, index) for index in range(config.num_unit_layers))
        self.layer_norm = nn.LayerNorm(layer_config.d_model)
        self.output_projection = nn.Linear(layer_config.d_model, config.unit_vocab_size, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Returns logits `(batch, tokens * unit_upsampling, unit_vocab_size)` for states `(batch, tokens, hidden)`."""
        hidden_states = states.repeat_interleave(self.unit_upsampling, dim=1)
        hidden_states = hidden_states + self.embed_positions(inputs_embeds=hidden_states).to(hidden_states)
        mask = make_causal_mask(self.layer_config, hidden_states)
        cross_mask = create_bidirectional_mask(
            config=self.layer_config,
            inputs_embeds=hidden_states,
            attention_mask=None,
            encoder_hidden_states=states,
            and_mask_function=lambda _batch, _head, frame, state: state <= frame // self.unit_upsampling,
        )
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, states, encoder_attention_mask=cross_mask, use_cache=False)
        return self.output_projection(self.layer_norm(hidden_states))


def make_causal_mask(config: M2M100Config, hidden_states: torch.Tensor) -> torch.Tensor | None:
    """Returns what an attention implementation wants for causal attention; padding stands behind, where none looks."""
    return create_causal_mask(config=config, inputs_embeds=hidden_states, attention_mask=None, past_key_values=None)


class EchoStreamPreTrainedModel(SpeechAdapterMixin, PreTrainedModel):
    config_class = EchoStreamConfig
    base_model_prefix = "model"
    main_input_name = "input_features"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["M2M100DecoderLayer", "M2M100EncoderLayer"]
    # Each loss is a mean over its labels: Trainer must not believe that it was divided by `num_items_in_batch`.
    accepts_loss_kwargs = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, M2M100SinusoidalPositionalEmbedding):
            size = (module.num_positions + module.offset, module.embedding_dim, module.padding_idx)
            init.copy_(module.weights, module.get_embedding(*size))
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class EchoStreamForSpeechToSpeechTranslation(EchoStreamPreTrainedModel, GenerationMixin):
    """
    EchoStream: encoder, CTC of both languages, decoder of the translation, units of its speech.

    Adapters come from [`SpeechAdapterConfig`] or any PEFT method.

    Example:

    ```python
    >>> import torch
    >>> from modeling import EchoStreamConfig, EchoStreamForSpeechToSpeechTranslation

    >>> config = EchoStreamConfig.from_size("mini", source_vocab_size=32, vocab_size=40, unit_vocab_size=25)
    >>> model = EchoStreamForSpeechToSpeechTranslation(config).eval()
    >>> output = model(torch.zeros(1, 160, 80), target_labels=torch.tensor([[4, 5]]))
    >>> output.encoder_out.shape, output.logits.shape, output.unit_logits.shape
    (torch.Size([1, 40, 128]), torch.Size([1, 3, 40]), torch.Size([1, 75, 25]))

    ```
    """

    def __init__(self, config: EchoStreamConfig):
        super().__init__(config)
        layer_config = config.make_layer_config()
        hidden_size = config.encoder_config.hidden_size
        self.encoder = EmformerModel(config.encoder_config)
        self.asr_ctc_decoder = nn.Linear(hidden_size, config.source_vocab_size)
        self.st_ctc_decoder = nn.Linear(hidden_size, config.vocab_size)
        self.mt_decoder = M2M100Decoder(layer_config)
        if hidden_size != layer_config.d_model:
            for layer in self.mt_decoder.layers:
                layer.encoder_attn.k_proj = nn.Linear(hidden_size, layer_config.d_model)
                layer.encoder_attn.v_proj = nn.Linear(hidden_size, layer_config.d_model)
        self.t2u_encoder = EchoStreamT2UEncoder(config, layer_config)
        self.unit_decoder = EchoStreamUnitDecoder(config, layer_config)
        for layer in (*self.mt_decoder.layers, *self.unit_decoder.layers):
            layer.in_features = layer.out_features = layer_config.d_model  # for adapters between layers
        self._stream = None
        self.post_init()

    def get_encoder(self, *_args, **_kwargs) -> nn.Module:
        """Returns the encoder, for the library's generation."""
        return self.encoder

    def get_input_embeddings(self) -> nn.Module:
        """Returns the embeddings of the translation's subwords, which are its output projection too."""
        return self.mt_decoder.embed_tokens

    def get_output_embeddings(self) -> None:
        """Returns nothing: the embeddings are used in their place, and none is to be tied."""
        return None

    def _get_feat_extract_output_lengths(self, input_lengths: torch.Tensor) -> torch.Tensor:
        return self.encoder._get_feat_extract_output_lengths(input_lengths)

    def get_encoder_lengths(
        self, input_features: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns how many frames of `encoder_out` each row of such features has `(batch,)`."""
        if attention_mask is None:
            frames = torch.full((len(input_features),), input_features.shape[1], device=input_features.device)
        else:
            frames = attention_mask.sum(-1)
        return self._get_feat_extract_output_lengths(frames)

    def forward(
        self,
        input_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        asr_labels: torch.Tensor | None = None,
        target_labels: torch.Tensor | None = None,
        unit_labels: torch.Tensor | None = None,
        *,
        encoder_outputs: ModelOutput | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        past_key_values: object | None = None,
        use_cache: bool | None = None,
        segment_length: int | None = None,
        return_dict: bool | None = None,
    ) -> EchoStreamOutput:
        """
        Runs every head that has an input: without `target_labels` and `decoder_input_ids`, the two CTC heads alone.

        Args:
            input_features: Filter bank features `(batch, frames, mel)`.
            attention_mask: 1 for a frame, 0 for padding on the right, `(batch, frames)`.
            asr_labels: Subwords of the transcript `(batch, tokens)`, -100 beyond its end; no start, no end.
            target_labels: Subwords of the translation, likewise.
            unit_labels: Classes of the speech units, likewise: a unit's number plus `unit_offset`.
            encoder_outputs: In place of features, what the encoder has made of them.
            decoder_input_ids: The translation so far `(batch, tokens)`, start token first; only the decoder runs.
            decoder_attention_mask: Not used: padding stands behind, where no token looks.
            past_key_values: Of the decoder, for the tokens before `decoder_input_ids`.
            use_cache: Whether the decoder returns `past_key_values`.
            segment_length: Frames of the encoder's segment, 40 ms each, in place of the configuration's; 0 takes the
                longest utterance as one segment. Training draws it.

        Raises:
            ValueError: Features of another number of bins or without a frame, labels that are no classes or the blank.
        """
        del decoder_attention_mask
        if encoder_outputs is None:
            encoder_outputs = self.encode(input_features, attention_mask, segment_length=segment_length)
        states = encoder_outputs[0]  # (batch, frames, hidden)
        lengths = self._find_lengths(states, input_features, attention_mask)
        if decoder_input_ids is not None:
            options = {"past_key_values": past_key_values, "use_cache": use_cache}
            hidden_states, cache = self._decode(decoder_input_ids, states, lengths, **options)
            output = EchoStreamOutput(
                encoder_out=states,
                encoder_lengths=lengths,
                logits=self._project(hidden_states),
                past_key_values=cache,
            )
        else:
            output = self._run_heads(states, lengths, asr_labels, target_labels, unit_labels)
        return output.to_tuple() if return_dict is False else output

    def encode(
        self,
        input_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        segment_length: int | None = None,
    ) -> ModelOutput:
        """Returns the encoder's output for whole utterances; see `forward`."""
        if segment_length == 0:
            frames = torch.tensor(input_features.shape[1])
            segment_length = max(
                1, int(self._get_feat_extract_output_lengths(frames)), self.config.right_context_length
            )
        return self.encoder(input_features, attention_mask, segment_length=segment_length)

    def _find_lengths(
        self, states: torch.Tensor, input_features: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        if attention_mask is None and input_features is None:
            return torch.full((len(states),), states.shape[1], device=states.device)
        return self.get_encoder_lengths(input_features, attention_mask).to(states.device)

    def _decode(
        self,
        decoder_input_ids: torch.Tensor,
        states: torch.Tensor,
        lengths: torch.Tensor,
        past_key_values: object | None = None,
        use_cache: bool | None = False,
    ) -> tuple[torch.Tensor, object | None]:
        """States of the translation `(batch, tokens, hidden)` and the decoder's cache."""
        is_frame = torch.arange(states.shape[1], device=states.device) < lengths.unsqueeze(1)
        output = self.mt_decoder(
            input_ids=decoder_input_ids,
            encoder_hidden_states=states,
            encoder_attention_mask=is_frame.long(),
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        return output.last_hidden_state, output.past_key_values

    def _project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden_states, self.mt_decoder.embed_tokens.weight)

    def _run_heads(
        self,
        states: torch.Tensor,
        lengths: torch.Tensor,
        asr_labels: torch.Tensor | None,
        target_labels: torch.Tensor | None,
        unit_labels: torch.Tensor | None,
    ) -> EchoStreamOutput:
        output = EchoStreamOutput(encoder_out=states, encoder_lengths=lengths)
        output["asr_logits"], output["st_logits"] = self.asr_ctc_decoder(states), self.st_ctc_decoder(states)
        blank = self.config.blank_token_id
        if asr_labels is not None:
            output["asr_loss"], output["asr_misfits"] = ctc_loss_of_fitting(
                output.asr_logits, lengths, asr_labels, blank=blank, name="asr_labels"
            )
        if target_labels is not None:
            output["st_loss"], output["st_misfits"] = ctc_loss_of_fitting(
                output.st_logits, lengths, target_labels, blank=blank, name="target_labels"
            )
            self._run_translation(output, target_labels, unit_labels)
        losses = {name: output[f"{name}_loss"] for name in self.config.loss_weights if f"{name}_loss" in output}
        if losses:
            output["loss"] = sum(self.config.loss_weights[name] * loss for name, loss in losses.items())
        return output

    def _run_translation(
        self, output: EchoStreamOutput, target_labels: torch.Tensor, unit_labels: torch.Tensor | None
    ) -> None:
        """Adds the decoder's and the units' logits and losses."""
        decoder_input_ids, next_labels = self.make_decoder_labels(target_labels)
        hidden_states, _ = self._decode(decoder_input_ids, output.encoder_out, output.encoder_lengths)
        output["logits"] = self._project(hidden_states)
        output["mt_loss"] = self._cross_entropy(output.logits, next_labels)
        if unit_labels is None and (self.training or not self.config.unit_weight):
            return  # nobody asks for units, whose frames are most of the decoders' work
        num_states = (next_labels != IGNORED_LABEL).sum(-1)
        output["unit_logits"] = self.unit_decoder(self.t2u_encoder(hidden_states))
        output["unit_lengths"] = num_states * self.config.unit_upsampling
        if unit_labels is not None:
            blank = self.config.unit_blank_id
            output["unit_loss"], output["unit_misfits"] = ctc_loss_of_fitting(
                output.unit_logits, output.unit_lengths, unit_labels, blank=blank, name="unit_labels"
            )

    def make_decoder_labels(self, target_labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Returns what the decoder reads and what it must say next, both `(batch, tokens + 1)`.

            target_labels    5      6      -100         decoder_input_ids   start  5    6     pad
                                                        next labels         5      6    end   -100

        A row without labels says nothing at all, so that it does not teach the end.
        """
        num_tokens = (target_labels >= 0).sum(-1, keepdim=True)  # (batch, 1)
        next_labels = nn.functional.pad(target_labels, (0, 1), value=IGNORED_LABEL)
        next_labels = next_labels.scatter(1, num_tokens, self.config.eos_token_id)
        next_labels = next_labels.masked_fill(num_tokens == 0, IGNORED_LABEL)
        start = target_labels.new_full((len(target_labels), 1), self.config.decoder_start_token_id)
        tokens = target_labels.masked_fill(target_labels < 0, self.config.pad_token_id)
        return torch.cat([start, tokens], dim=1), next_labels

    def _cross_entropy(self, logits: torch.Tensor, next_labels: torch.Tensor) -> torch.Tensor:
        check_classes(next_labels, logits.shape[-1], blank=None, name="target_labels")
        num_labels = (next_labels != IGNORED_LABEL).sum()
        loss = nn.functional.cross_entropy(
            logits.float().flatten(0, 1),
            next_labels.flatten(),
            ignore_index=IGNORED_LABEL,
            label_smoothing=self.config.label_smoothing if self.training else 0.0,
            reduction="sum",
        )
        return loss / num_labels.clamp(min=1)

    @torch.no_grad()
    def generate(
        self,
        input_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        encoder_outputs: ModelOutput | None = None,
        return_units: bool = False,
        num_unit_beams: int = 1,
        **kwargs,
    ) -> torch.LongTensor | EchoStreamGeneration:
        """
        Translates whole utterances: greedily, or with `num_beams` as every model of the library.

        Args:
            input_features: Filter bank features `(batch, frames, mel)`.
            attention_mask: 1 for a frame, 0 for padding on the right.
            encoder_outputs: In place of features, what [`encode`] has made of them.
            return_units: Also say the translation: its speech units.
            num_unit_beams: Beams of the CTC search over units; 1 takes the best class of each frame.
            kwargs: As for `GenerationMixin.generate`; at most 100 new subwords unless they say otherwise.

        Returns:
            Subwords `(batch, tokens)`, start token first; or with units an [`EchoStreamGeneration`].

        Raises:
            ValueError: There are `encoder_outputs` without the `attention_mask` of their features.
        """
        if input_features is None and attention_mask is None:
            raise ValueError(
                "`attention_mask` must be given with `encoder_outputs`, got none: which of their frames are padding, "
                "only the features' mask says."
            )
        if encoder_outputs is None:
            encoder_outputs = self.encode(input_features, attention_mask)
        if attention_mask is None:
            attention_mask = input_features.new_ones(input_features.shape[:2], dtype=torch.long)
        if not kwargs.keys() & {"max_length", "max_new_tokens", "generation_config", "stopping_criteria"}:
            kwargs["max_new_tokens"] = MAX_NEW_TOKENS
        suppressed = {self.config.blank_token_id, self.config.pad_token_id, self.config.unk_token_id}
        kwargs.setdefault("suppress_tokens", sorted(suppressed - {self.config.eos_token_id}))
        states = encoder_outputs[0]
        repeated = ModelOutput(**encoder_outputs)  # the library repeats its tensors in place, once a beam
        output = super().generate(encoder_outputs=repeated, attention_mask=attention_mask, **kwargs)
        if not return_units:
            return output
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        lengths = self._get_feat_extract_output_lengths(attention_mask.sum(-1)).to(states.device)
        times = len(sequences) // len(states)  # several translations of a row
        states, lengths = states.repeat_interleave(times, dim=0), lengths.repeat_interleave(times)
        units = self.generate_units(sequences, states, lengths, num_beams=num_unit_beams)
        return EchoStreamGeneration(sequences=sequences, units=units)

    @torch.no_grad()
    def generate_units(
        self, sequences: torch.Tensor, encoder_out: torch.Tensor, encoder_lengths: torch.Tensor, *, num_beams: int = 1
    ) -> list[list[int]]:
        """
        Returns the speech units of translations, numbers from 0, repeats once.

        What a prefix of a translation says is a prefix of what the whole says: streams may speak it at once.

        Args:
            sequences: Subwords `(batch, tokens)`, start token first, as from `generate`.
            encoder_out: States `(batch, frames, hidden)`.
            encoder_lengths: Frames that are not padding `(batch,)`.
            num_beams: Beams of the CTC search; 1 takes the best class of each frame.
        """
        tokens = sequences.masked_fill(sequences == self.config.eos_token_id, self.config.pad_token_id)
        tokens = torch.cat([sequences[:, :1], tokens[:, 1:]], dim=1)  # the start token is the end token, too
        num_tokens = (tokens != self.config.pad_token_id).sum(-1)
        tokens = tokens[:, : int(num_tokens.max())]
        hidden_states, _ = self._decode(tokens, encoder_out, encoder_lengths)
        logits = self.unit_decoder(self.t2u_encoder(hidden_states))
        lengths = num_tokens * self.config.unit_upsampling
        blank, offset = self.config.unit_blank_id, self.config.unit_offset
        if num_beams == 1:
            rows = collapse_ctc(logits.argmax(-1), lengths, blank=blank, dropped=range(offset))
        else:
            logits = logits.float()
            logits[..., [index for index in range(offset) if index != blank]] = -torch.inf
            log_probs = logits.log_softmax(-1)
            rows = [
                beam_search_ctc(row[:num_frames], blank=blank, num_beams=num_beams)
                for row, num_frames in zip(log_probs, lengths.tolist(), strict=True)
            ]
        return [[label - offset for label in row] for row in rows]

    def collapse(self, logits: torch.Tensor, lengths: torch.Tensor) -> list[list[int]]:
        """Returns the subwords that a CTC head says, from `asr_logits` or `st_logits` and `encoder_lengths`."""
        dropped = (self.config.pad_token_id, self.config.eos_token_id)
        return collapse_ctc(logits.argmax(-1), lengths, blank=self.config.blank_token_id, dropped=dropped)

    @torch.no_grad()
    def encode_segment(self, input_features: torch.Tensor, *, is_last: bool = False) -> torch.Tensor:
        """
        Returns the frames of `encoder_out` that are new in streams `(batch, frames, hidden)`, which may be none.

        The state stays in the model, as in the original, and [`reset_cache`] begins anew. Who serves several streams
        holds their caches and calls the encoder.

        Args:
            input_features: Features that have arrived since the last call `(batch, frames, mel)`.
            is_last: Whether the streams end here.
        """
        past_key_values, padding_cache = self._stream or (None, None)
        output = self.encoder(
            input_features,
            past_key_values=past_key_values,
            padding_cache=padding_cache,
            use_cache=True,
            is_last=is_last,
        )
        self._stream = output.past_key_values, output.padding_cache
        return output.last_hidden_state

    def reset_cache(self) -> None:
        """Forgets the streams that [`encode_segment`] has heard."""
        self._stream = None

    def count_parts(self) -> dict[str, int]:
        """Returns the number of parameters of each part by name, such as `mt_decoder`."""
        return {name: sum(value.numel() for value in part.parameters()) for name, part in self.named_children()}
