"""Audio language models: any encoder, a projector, any causal language model, in the house style of transformers.

    input_features -> audio_tower -> multi_modal_projector -> rows that take the placeholders' places
    input_ids      -> embeddings of the language model     -> language_model -> lm_head -> logits

The parts are those of transformers, untouched: with every adapter off, text alone gives the base language model's
logits bit for bit.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, Blip2QFormerConfig, Blip2QFormerModel, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import LogitsProcessorList
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple

from .audio_encoders import count_frames, make_encoder, run_encoder
from .audio_lm_bundle import assemble, is_bundle, load_bundle, load_sides, make_config, save_bundle, save_whole
from .audio_lm_modes import set_modes
from .audio_lm_sides import ENCODER, LANGUAGE_MODEL
from .configuration_audio_lm import LAST, MIX, AudioLMConfig

STACKED_NORM_SCALE = 0.4  # of stacked_swiglu: Ultravox lets stacked frames begin small


class AudioLMMultiModalProjector(nn.Module):
    """
    Turns windows of an encoder's frames into rows as wide as the language model's embeddings.

    Source: Voxtral (mlp), Ultravox (stacked_swiglu), Granite Speech (qformer) in transformers; SLAM-LLM (linear).
    """

    def __init__(self, config: AudioLMConfig):
        super().__init__()
        self.config = config
        frame, width, text = config.audio_config.hidden_size, config.projector_width, config.text_config.hidden_size
        stacked, bias = frame * config.window_frames, config.projector_bias
        if config.encoder_layer == MIX:
            self.layer_weights = nn.Parameter(torch.zeros(config.num_encoder_states))
        if config.projector_type == "linear":
            self.linear_1 = nn.Linear(stacked, text, bias=bias)
        elif config.projector_type == "mlp":
            self.linear_1 = nn.Linear(stacked, width, bias=bias)
            self.act = ACT2FN[config.projector_hidden_act]
            self.linear_2 = nn.Linear(width, text, bias=bias)
        elif config.projector_type == "stacked_swiglu":
            self.norm_1 = nn.RMSNorm(stacked, eps=1e-6)
            self.linear_1 = nn.Linear(stacked, 2 * width, bias=bias)
            self.act = ACT2FN["silu"]
            self.linear_2 = nn.Linear(width, text, bias=bias)
            self.norm_2 = nn.RMSNorm(text, eps=1e-6)
        else:
            self.query = nn.Parameter(torch.zeros(1, config.window_tokens, width))
            self.qformer = Blip2QFormerModel(_make_qformer_config(config))
            self.linear_2 = nn.Linear(width, text, bias=bias)

    def forward(self, hidden_states: torch.Tensor, num_frames: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states: Of the encoder, `(batch, frames, hidden)`, or all layers' `(batch, layers, frames, hidden)`
                where the projector mixes them.
            num_frames: Frames that are no padding `(batch,)`.

        Returns:
            Rows `(batch, tokens, hidden of the language model)`; those of padding mean nothing.
        """
        states = hidden_states.to(next(self.parameters()).dtype)
        if self.config.encoder_layer == MIX:
            states = torch.einsum("l,blfh->bfh", self.layer_weights.softmax(0), states)
        is_frame = torch.arange(states.shape[1], device=states.device) < num_frames.to(states.device).unsqueeze(1)
        states = states * is_frame.unsqueeze(-1)
        window = self.config.window_frames
        padding = -states.shape[1] % window
        states = nn.functional.pad(states, (0, 0, 0, padding)).unflatten(1, (-1, window))  # (batch, windows, ...)
        if self.config.projector_type == "qformer":
            return self._read_windows(states, nn.functional.pad(is_frame, (0, padding)).unflatten(1, (-1, window)))
        states = states.flatten(2)  # (batch, tokens, window * hidden)
        if self.config.projector_type == "linear":
            return self.linear_1(states)
        if self.config.projector_type == "mlp":
            return self.linear_2(self.act(self.linear_1(states)))
        states, gate = self.linear_1(self.norm_1(states)).chunk(2, dim=-1)
        return self.norm_2(self.linear_2(states * self.act(gate)))

    def _read_windows(self, states: torch.Tensor, is_frame: torch.Tensor) -> torch.Tensor:
        batch, windows = states.shape[:2]
        is_frame = is_frame.flatten(0, 1)
        is_frame = is_frame | ~is_frame.any(-1, keepdim=True)  # a window of padding alone reads its zeros
        output = self.qformer(
            query_embeds=self.query.expand(batch * windows, -1, -1),
            encoder_hidden_states=states.flatten(0, 1),
            encoder_attention_mask=is_frame.long(),
        ).last_hidden_state
        return self.linear_2(output).unflatten(0, (batch, windows)).flatten(1, 2)


def _make_qformer_config(config: AudioLMConfig) -> Blip2QFormerConfig:
    return Blip2QFormerConfig(
        hidden_size=config.projector_width,
        num_hidden_layers=config.projector_layers,
        num_attention_heads=config.projector_heads,
        intermediate_size=4 * config.projector_width,
        hidden_act=config.projector_hidden_act,
        encoder_hidden_size=config.audio_config.hidden_size,
        cross_attention_frequency=1,
    )


@dataclass
class AudioLMModelOutputWithPast(BaseModelOutputWithPast):
    """
    Output of [`AudioLMModel`].

    Args:
        audio_hidden_states (`torch.Tensor` of shape `(rows, hidden)`): What the placeholders were replaced by.
    """

    audio_hidden_states: torch.FloatTensor | None = None


@dataclass
class AudioLMCausalLMOutputWithPast(ModelOutput):
    """
    Output of [`AudioLMForConditionalGeneration`].

    Args:
        loss (`torch.Tensor` of shape `()`): Cross-entropy of the next token, when `labels` are given.
        logits (`torch.Tensor` of shape `(batch, tokens, vocab_size)`): Scores before the softmax.
        past_key_values (`Cache`): Keys and values to go on from.
        hidden_states (`tuple[torch.Tensor]`): Of the language model, each `(batch, tokens, hidden)`.
        attentions (`tuple[torch.Tensor]`): Of the language model, each `(batch, heads, tokens, tokens)`.
        audio_hidden_states (`torch.Tensor` of shape `(rows, hidden)`): What the placeholders were replaced by.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    audio_hidden_states: torch.FloatTensor | None = None


class AudioLMPreTrainedModel(PreTrainedModel):
    """What [`AudioLMModel`] and [`AudioLMForConditionalGeneration`] have in common."""

    config_class = AudioLMConfig
    base_model_prefix = "model"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, AudioLMMultiModalProjector):
            if hasattr(module, "layer_weights"):
                init.zeros_(module.layer_weights)
            if hasattr(module, "query"):
                init.normal_(module.query, std=1.0)
            if hasattr(module, "norm_1"):
                init.constant_(module.norm_1.weight, STACKED_NORM_SCALE)
                init.ones_(module.norm_2.weight)
        elif not isinstance(module, nn.RMSNorm):  # those of a projector have had their say
            super()._init_weights(module)


class AudioLMModel(AudioLMPreTrainedModel):
    """Encoder, projector and language model, without the language model's head."""

    def __init__(self, config: AudioLMConfig):
        super().__init__(config)
        self.audio_tower = make_encoder(config.audio_config)
        self.multi_modal_projector = AudioLMMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Returns the language model's embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        """Sets the language model's embeddings."""
        self.language_model.set_input_embeddings(value)

    def train(self, mode: bool = True) -> "AudioLMModel":
        """As ever, but dropout, LayerDrop and SpecAugment of a side that is frozen stay off."""
        super().train(mode)
        for side in (self.audio_tower, self.language_model):
            if mode and not any(parameter.requires_grad for parameter in side.parameters()):
                side.eval()
                for module in side.modules():  # gradients pass through a frozen language model: checkpoints stay on
                    if isinstance(module, GradientCheckpointingLayer):
                        module.training = module.gradient_checkpointing
        return self

    def encode_audio(
        self,
        input_features: torch.Tensor,
        input_features_mask: torch.Tensor | None = None,
        *,
        output_hidden_states: bool = False,
    ) -> tuple[BaseModelOutputWithPooling, torch.Tensor]:
        """
        Runs the encoder and picks what the projector reads: what a cache of a frozen encoder keeps.

        Args:
            input_features: Of clips, as [`run_encoder`] takes them.
            input_features_mask: 1 for an input, 0 for padding on the right.
            output_hidden_states: Also return all layers' states.

        Returns:
            The encoder's output, whose `pooler_output` is what [`project_audio`] takes: `(batch, frames, hidden)`, or
            `(batch, layers, frames, hidden)` where layers are mixed; and frames that are no padding `(batch,)`.

        Raises:
            ValueError: As [`run_encoder`].
        """
        layer = self.config.encoder_layer
        needs_all = output_hidden_states or layer != LAST
        output, num_frames = run_encoder(
            self.audio_tower,
            input_features,
            input_features_mask,
            min_inputs=self.config.min_input_frames,
            output_hidden_states=needs_all,
        )
        if layer == MIX:
            states = torch.stack(output.hidden_states, dim=1)
        else:
            states = output.last_hidden_state if layer == LAST else output.hidden_states[layer]
        output = BaseModelOutputWithPooling(
            last_hidden_state=output.last_hidden_state,
            pooler_output=states,
            hidden_states=output.hidden_states if output_hidden_states else None,
        )
        return output, num_frames

    def project_audio(self, states: torch.Tensor, num_frames: torch.Tensor) -> torch.Tensor:
        """
        Returns the rows `(rows, hidden)` that take the places of the placeholders, clip after clip, no padding.

        A frozen encoder need not run again: `project_audio(states, num_frames)` of states that [`encode_audio`] once
        gave (`pooler_output`), padded on the right, is what `forward` takes as `audio_embeds`.

        Args:
            states: `(batch, frames, hidden)`, or `(batch, layers, frames, hidden)` where layers are mixed.
            num_frames: Frames that are no padding `(batch,)`.
        """
        rows = self.multi_modal_projector(states, num_frames)
        num_tokens = self.config.count_tokens(num_frames.to(rows.device))
        return rows[torch.arange(rows.shape[1], device=rows.device) < num_tokens.unsqueeze(1)]

    @can_return_tuple
    def get_audio_features(
        self,
        input_features: torch.Tensor,
        input_features_mask: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        Runs encoder and projector.

        Args:
            input_features: Of clips, as [`run_encoder`] takes them.
            input_features_mask: 1 for an input, 0 for padding on the right.
            output_hidden_states: Also return all layers' states of the encoder.
            kwargs: Ignored, as elsewhere in transformers.

        Returns:
            The encoder's output, whose `pooler_output` are the rows `(rows, hidden)` that take the placeholders'
            places, those of real frames only, clip after clip.
        """
        del kwargs
        output, num_frames = self.encode_audio(
            input_features, input_features_mask, output_hidden_states=bool(output_hidden_states)
        )
        output.pooler_output = self.project_audio(output.pooler_output, num_frames)
        return output

    def count_audio_tokens(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns how many placeholders each clip `(batch,)` takes."""
        if input_features_mask is None:
            time = 2 if self.config.audio_config.model_type == "whisper" else 1
            lengths = torch.full((len(input_features),), input_features.shape[time], device=input_features.device)
        else:
            lengths = input_features_mask.sum(-1).long()
        return self.config.count_tokens(count_frames(self.audio_tower, lengths))

    def get_placeholder_mask(
        self, input_ids: torch.Tensor, inputs_embeds: torch.Tensor, audio_features: torch.Tensor
    ) -> torch.Tensor:
        """
        Returns where the placeholders are, as a mask of the shape of `inputs_embeds`.

        Args:
            input_ids: Tokens `(batch, tokens)`.
            inputs_embeds: Their embeddings `(batch, tokens, hidden)`.
            audio_features: Rows for the placeholders `(rows, hidden)`.

        Raises:
            ValueError: There are more or fewer placeholders than rows.
        """
        is_audio = input_ids == self.config.audio_token_id
        num_placeholders = int(is_audio.sum())
        if num_placeholders != len(audio_features):
            raise ValueError(
                f"`input_ids` must have a placeholder for each row of audio, got {num_placeholders} placeholders and "
                f"{len(audio_features)} rows. Let the processor expand the placeholders, and truncate nothing."
            )
        return is_audio.unsqueeze(-1).expand_as(inputs_embeds).to(inputs_embeds.device)

    def embed_tokens(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Returns embeddings `(batch, tokens, hidden)`; the placeholder, which may have none, gets that of token 0."""
        return self.get_input_embeddings()(input_ids.masked_fill(input_ids == self.config.audio_token_id, 0))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        audio_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> AudioLMModelOutputWithPast:
        """As [`AudioLMForConditionalGeneration.forward`], without `labels`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("`input_ids` or `inputs_embeds` must be given, got both or neither.")
        if inputs_embeds is None:
            if input_features is not None and audio_embeds is None:
                find_clips(input_ids, self.count_audio_tokens(input_features, input_features_mask), self.config)
                features = self.get_audio_features(input_features, input_features_mask, return_dict=True)
                audio_embeds = features.pooler_output
            inputs_embeds = self.embed_tokens(input_ids)
            is_prefill = past_key_values is None or past_key_values.get_seq_length() == 0
            if audio_embeds is not None or is_prefill:
                rows = inputs_embeds.new_zeros(0, inputs_embeds.shape[-1]) if audio_embeds is None else audio_embeds
                mask = self.get_placeholder_mask(input_ids, inputs_embeds, rows)
                if len(rows):
                    rows = rows.to(inputs_embeds.device, inputs_embeds.dtype)
                    inputs_embeds = inputs_embeds.masked_scatter(mask, rows)
        elif input_features is not None or audio_embeds is not None:
            raise ValueError(
                "`input_ids` must be given beside audio, got `inputs_embeds`, which have no placeholders."
            )
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return AudioLMModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            audio_hidden_states=audio_embeds,
        )


def find_clips(input_ids: torch.Tensor, num_tokens: torch.Tensor, config: AudioLMConfig) -> list[int]:
    """
    Returns how many clips each prompt has, from the placeholders `(batch, tokens)` and the clips' tokens `(clips,)`.

    Raises:
        ValueError: No clip ends where a prompt's placeholders end: a clip would be split between two prompts.
    """
    ends = [0, *num_tokens.cumsum(0).tolist()]
    placeholders = (input_ids == config.audio_token_id).sum(-1).cumsum(0).tolist()
    clips = []
    for row, place in enumerate(placeholders):
        if place not in ends:
            raise ValueError(
                f"`input_ids` must have a placeholder for each row of audio, got {placeholders[-1]} placeholders and "
                f"{ends[-1]} rows; prompt {row} ends within a clip. Let the processor expand the placeholders, and "
                "truncate nothing."
            )
        clips.append(ends.index(place))
    return [end - begin for begin, end in zip([0, *clips[:-1]], clips, strict=True)]


class PlaceholderLogitsProcessorList(LogitsProcessorList):
    """Processors that may look prompts up in the scores: the placeholder has a score, and is never said."""

    def __init__(self, processors: LogitsProcessorList, audio_token_id: int):
        super().__init__(processors)
        self.audio_token_id = audio_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        """As that of the processors, on scores that reach as far as the placeholder."""
        vocab_size = scores.shape[-1]
        missing = max(0, self.audio_token_id + 1 - vocab_size)
        scores = nn.functional.pad(scores, (0, missing), value=-torch.inf)
        scores[:, self.audio_token_id] = -torch.inf
        return super().__call__(input_ids, scores, **kwargs)[:, :vocab_size]


class AudioLMForConditionalGeneration(AudioLMPreTrainedModel, GenerationMixin):
    """
    An audio language model: it reads text with clips anywhere in it, and answers in text.

    Make one of two pretrained models with `from_encoder_and_lm`; save and load bundles with `save_pretrained` and
    `from_pretrained`.

    Example:

    ```python
    model = AutoModelForMultimodalLM.from_pretrained("me/bundle", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained("me/bundle", trust_remote_code=True)
    inputs = processor.apply_transcription_request("clip.wav")
    tokens = model.generate(**inputs, max_new_tokens=100)
    processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ```
    """

    def __init__(self, config: AudioLMConfig):
        super().__init__(config)
        self.model = AudioLMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        embeddings = self.model.language_model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Returns the language model's embeddings."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        """Sets the language model's embeddings."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Returns the language model's head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module):
        """Sets the language model's head."""
        self.lm_head = value

    def get_audio_features(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """As [`AudioLMModel.get_audio_features`]."""
        return self.model.get_audio_features(input_features, input_features_mask, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        audio_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> AudioLMCausalLMOutputWithPast:
        """
        Args:
            input_ids: Tokens `(batch, tokens)` with a placeholder for each row of audio.
            input_features: Clips in the order of their placeholders, several a prompt or none: `(clips, mel, frames)`
                for Whisper, `(clips, samples)` for waves.
            input_features_mask: 1 for an input, 0 for padding on the right, `(clips, frames or samples)`.
            attention_mask: 1 for a token, 0 for padding, `(batch, tokens)`.
            position_ids: Positions `(batch, tokens)`.
            past_key_values: From an earlier call.
            inputs_embeds: In place of `input_ids` and audio, embeddings `(batch, tokens, hidden)`.
            audio_embeds: In place of `input_features`, rows `(rows, hidden)` that [`AudioLMModel.project_audio`] has
                made of states that were computed before.
            labels: Tokens to learn `(batch, tokens)`, -100 elsewhere.
            use_cache: Return keys and values.
            logits_to_keep: How many of the last logits to compute, 0 for all; or their places.
            kwargs: For the language model and its loss.

        Raises:
            ValueError: Placeholders and rows of audio differ in number, a clip is too long for the encoder or too
                short for a frame, or neither tokens nor embeddings are given.
        """
        outputs = self.model(
            input_ids=input_ids,
            input_features=input_features,
            input_features_mask=input_features_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            audio_embeds=audio_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return AudioLMCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            audio_hidden_states=outputs.audio_hidden_states,
        )

    def prepare_inputs_for_generation(self, *args, is_first_iteration: bool = False, **kwargs) -> dict[str, object]:
        """As ever; audio goes in with the prompt, and with every step where nothing is cached."""
        inputs = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs.pop("audio_embeds", None)
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.LongTensor, dict[str, object]]:
        """For beams and samples: a prompt's clips are repeated with it, in order, and heard once."""
        features, mask = kwargs.pop("input_features", None), kwargs.pop("input_features_mask", None)
        rows = kwargs.pop("audio_embeds", None)
        if features is not None and rows is None:
            find_clips(input_ids, self.model.count_audio_tokens(features, mask), self.config)
            rows = self.get_audio_features(features, mask, return_dict=True).pooler_output
        if rows is not None:
            num_rows = (input_ids == self.config.audio_token_id).sum(-1).tolist()
            if sum(num_rows) == len(rows):  # else `forward` says what is wrong
                rows = torch.cat([part for part in rows.split(num_rows) for _ in range(expand_size)])
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return input_ids, kwargs if rows is None else kwargs | {"audio_embeds": rows}

    def _get_logits_processor(self, *args, **kwargs) -> LogitsProcessorList:
        processors = super()._get_logits_processor(*args, **kwargs)
        return PlaceholderLogitsProcessorList(processors, self.config.audio_token_id)

    @classmethod
    def from_encoder_and_lm(
        cls,
        encoder: str,
        language_model: str,
        *,
        encoder_mode: str = "frozen",
        llm_mode: str = "frozen",
        projector_mode: str = "trainable",
        dtype: str | torch.dtype = "float32",
        projector: dict[str, object] | None = None,
        **kwargs,
    ) -> "AudioLMForConditionalGeneration":
        """
        Joins a pretrained encoder and a pretrained causal language model with a fresh projector.

        Args:
            encoder: Folder or Hub name of a Whisper, HuBERT, Wav2Vec2, WavLM, or other encoder that says its length.
            language_model: Folder or Hub name of any causal language model with a linear head.
            encoder_mode: frozen, full, lora or qlora (which loads it in 4 bits).
            llm_mode: Likewise of the language model.
            projector_mode: trainable or frozen.
            dtype: Of both sides; the projector and LoRA are in fp32.
            projector: Fields of [`AudioLMConfig`] beside its sides, such as `{"projector_type": "qformer"}`.
            kwargs: As in `from_pretrained`, for both sides: `device_map`, `token`, `cache_dir` and the like.

        Raises:
            ValueError: As [`load_sides`], [`AudioLMConfig`] and [`set_modes`].

        Example:

        ```python
        model = AudioLMForConditionalGeneration.from_encoder_and_lm(
            "openai/whisper-base", "HuggingFaceTB/SmolLM2-135M-Instruct", llm_mode="lora"
        )
        processor = AudioLMProcessor.from_model(model)
        ```
        """
        modes = {ENCODER: encoder_mode, LANGUAGE_MODEL: llm_mode}
        tower, causal_lm, token, bases = load_sides(encoder, language_model, modes, dtype=dtype, **kwargs)
        config = make_config(cls.config_class, tower, causal_lm, audio_token_id=token, **(projector or {}))
        model = assemble(cls, tower, causal_lm, bases, config)
        set_modes(model, encoder_mode=encoder_mode, llm_mode=llm_mode, projector_mode=projector_mode)
        return model

    def save_pretrained(
        self, save_directory: str | Path, *, save_full: bool = False, push_to_hub: bool = False, **kwargs
    ) -> None:
        """
        Writes a bundle: the projector, what was trained of the sides, and a manifest that names their bases.

        Args:
            save_directory: The folder; made if it does not exist.
            save_full: Write every weight instead, adapters merged: a checkpoint like any other, that needs no bases.
            push_to_hub: Refused: a recipe pushes, with a card.
            kwargs: With `save_full`, as in `PreTrainedModel.save_pretrained`.

        Raises:
            ValueError: As [`save_bundle`], or `push_to_hub` is set.
        """
        if push_to_hub:
            raise ValueError("`push_to_hub` must be left out, got True. Save the bundle, then push its folder.")
        if save_full or not getattr(self, "base_sides", None):
            save_whole(self, save_directory, PreTrainedModel.save_pretrained, **kwargs)
        else:
            save_bundle(self, save_directory)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *args, **kwargs
    ) -> "AudioLMForConditionalGeneration":
        """
        Loads a bundle, with its bases from where it says they are, or a whole checkpoint.

        Args:
            pretrained_model_name_or_path: Folder or Hub name.
            args: As in `PreTrainedModel.from_pretrained`.
            kwargs: Likewise; for a bundle also those of [`load_bundle`].

        Raises:
            ValueError: As [`load_bundle`].
        """
        if is_bundle(pretrained_model_name_or_path, **kwargs):
            return load_bundle(cls, pretrained_model_name_or_path, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
