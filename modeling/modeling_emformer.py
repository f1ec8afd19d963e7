"""Emformer: a streaming transformer encoder of segments, left and right context and a memory bank, alone and with CTC.

Source: Shi et al., "Emformer" (arXiv 2010.10759), in the layout of torchaudio, whose checkpoints convert by name.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput

from .adapters import SpeechAdapterMixin
from .configuration_emformer import EmformerConfig, check_segment_length
from .ctc_labels import check_labels_fit
from .emformer_blocks import EmformerBlocks
from .emformer_cache import EmformerCache, EmformerPaddingCache, EmformerStep, collect_frames, is_before

MAX_CLAMPED_MEMORY = 10.0
# Logit of every class but the blank on frames that are padding: argmax gives blank there, and exp underflows to 0.
PADDED_LOGIT = -1e4


@dataclass
class EmformerModelOutput(ModelOutput):
    """
    Output of [`EmformerModel`].

    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch, frames, hidden)`): Encoded frames.
        attention_mask (`torch.Tensor` of shape `(batch, frames)`): 1 for a frame, 0 for padding on the right.
        hidden_states (`tuple[torch.Tensor]`): Input of the first layer and output of each, `(batch, frames, hidden)`,
            when asked for.
        past_key_values (`EmformerCache`): Of streams, for the next call.
        padding_cache (`EmformerPaddingCache`): Of streams, for the next call.
    """

    last_hidden_state: torch.FloatTensor | None = None
    attention_mask: torch.LongTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    past_key_values: EmformerCache | None = None
    padding_cache: EmformerPaddingCache | None = None


@dataclass
class EmformerCTCOutput(ModelOutput):
    """
    Output of [`EmformerForCTC`].

    Args:
        loss (`torch.Tensor` of shape `()`): CTC loss in fp32, when `labels` are given.
        logits (`torch.Tensor` of shape `(batch, frames, vocab_size)`): Scores before the softmax. Beyond an
            utterance's end the blank is certain.
        logits_lengths (`torch.Tensor` of shape `(batch,)`): Frames of `logits` that are not padding, 40 ms each.
        hidden_states (`tuple[torch.Tensor]`): Input of the first layer and output of each, `(batch, frames, hidden)`,
            when asked for.
        past_key_values (`EmformerCache`): Of streams, for the next call.
        padding_cache (`EmformerPaddingCache`): Of streams, for the next call.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    logits_lengths: torch.LongTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    past_key_values: EmformerCache | None = None
    padding_cache: EmformerPaddingCache | None = None


class EmformerConvSubsampler(nn.Module):
    """
    Halves the frames once a convolution, looking back only: `(batch, frames, mel)` to `(batch, frames / 4, hidden)`.

    With kernel 5 and stride 2, the left is padded by 3, so that output `i` ends with its own two inputs:

        input    . . . 0 1 2 3 4 5        output 0 sees . . . 0 1
        output         ---0---1---2       output 1 sees . 0 1 2 3
    """

    def __init__(self, config: EmformerConfig):
        super().__init__()
        num_convolutions = config.subsampling_factor.bit_length() - 1
        widths = [config.num_mel_bins] + [config.subsampling_channels // 2] * (num_convolutions - 1)
        channels = [config.subsampling_channels] * (num_convolutions - 1) + [2 * config.hidden_size]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width, out, config.subsampling_kernel_size, stride=2)
            for width, out in zip(widths, channels, strict=True)
        )
        self.left_padding = config.subsampling_kernel_size - 2
        self.scale = config.hidden_size**0.5
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        input_features: torch.Tensor,
        counts: Sequence[int] | None = None,
        padding_cache: EmformerPaddingCache | None = None,
    ) -> torch.Tensor:
        hidden_states = input_features.mT  # (batch, mel, frames)
        for index, convolution in enumerate(self.convolutions):
            if padding_cache is None:
                hidden_states = nn.functional.pad(hidden_states, (self.left_padding, 0))
            else:
                row_counts = [count >> index for count in counts]
                hidden_states = padding_cache.update(hidden_states, row_counts, index, self.left_padding)
            hidden_states = nn.functional.glu(convolution(hidden_states), dim=1)
        return self.projection(self.scale * hidden_states.mT)


class EmformerStackSubsampler(nn.Module):
    """Narrows the frames and puts neighbours side by side: `(batch, frames, mel)` to `(batch, frames / 4, hidden)`."""

    def __init__(self, config: EmformerConfig):
        super().__init__()
        self.factor = config.subsampling_factor
        self.projection = nn.Linear(config.num_mel_bins, config.hidden_size // self.factor, bias=False)

    def forward(
        self,
        input_features: torch.Tensor,
        _counts: Sequence[int] | None = None,
        _padding_cache: EmformerPaddingCache | None = None,
    ) -> torch.Tensor:
        num_frames = input_features.shape[1] // self.factor
        return self.projection(input_features[:, : num_frames * self.factor]).reshape(
            len(input_features), num_frames, -1
        )


SUBSAMPLERS = {"conv": EmformerConvSubsampler, "stack": EmformerStackSubsampler}


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attends step by step, softmax in fp32, to `(batch, queries, heads, width)`."""
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    dtype = torch.promote_types(torch.float32, query.dtype)
    weights = nn.functional.softmax(scores, dim=-1, dtype=dtype).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class EmformerAttention(nn.Module):
    """
    Attention of a block of segments: queries from [right context; frames; summary], keys from [memory; right context;
    left context; frames], where a summary sees no memory and its output is the memory of the next layer.
    """

    is_causal = False

    def __init__(self, config: EmformerConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.dropout
        self.emb_to_key_value = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.emb_to_query = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        memory: torch.Tensor | None,
        blocks: EmformerBlocks | EmformerStep,
        attention_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states: Normalised right contexts and frames `(blocks, rows, hidden)`.
            memory: Memories from the layer below `(blocks, segments, hidden)`, if there are summaries.
            blocks: What knows the keys and values of the past.
            attention_mask: Added to the scores `(blocks, 1, queries, keys)`.

        Returns:
            The attended rows and the memories for the layer above, in the same shapes.
        """
        query, key_value = self.emb_to_query(hidden_states), self.emb_to_key_value(hidden_states)
        memory_key_value = None
        if num_memories := blocks.num_memory_rows:
            # The query of a mean is the mean of the queries.
            summaries = query[:, -num_memories * blocks.segment_length :].unflatten(1, (num_memories, -1)).mean(2)
            query, memory_key_value = torch.cat([query, summaries], 1), self.emb_to_key_value(memory)
        # Keys and values side by side to (2, blocks, heads, keys, head_dim).
        key_value = blocks.update(key_value, memory_key_value, self.layer_idx)
        key, value = key_value.view(*key_value.shape[:2], 2, -1, self.head_dim).permute(2, 0, 3, 1, 4).unbind()
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended, _ = attend(
            self,
            query.view(*query.shape[:2], -1, self.head_dim).transpose(1, 2),  # (blocks, heads, queries, head_dim)
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.dropout if self.training else 0.0,
        )
        attended = self.out_proj(attended.flatten(2))
        if num_memories:
            attended, memory = attended.split([hidden_states.shape[1], num_memories], 1)
            memory = self._bound(memory)
        return attended, memory

    def _bound(self, memory: torch.Tensor) -> torch.Tensor:
        if self.config.memory_activation == "tanh":
            return memory.tanh()
        return memory.clamp(-MAX_CLAMPED_MEMORY, MAX_CLAMPED_MEMORY)


class EmformerLayer(GradientCheckpointingLayer):
    """Attention and feed-forward network of one layer; adapters between layers wrap it and see each row alone."""

    def __init__(self, config: EmformerConfig, layer_idx: int):
        super().__init__()
        self.in_features = self.out_features = config.hidden_size
        self.attention = EmformerAttention(config, layer_idx)
        self.pos_ff = nn.Sequential(
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps),
            nn.Linear(config.hidden_size, config.intermediate_size),
            ACT2FN[config.hidden_act],
            nn.Dropout(config.dropout),
            nn.Linear(config.intermediate_size, config.hidden_size),
        )
        self.layer_norm_input = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layer_norm_output = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = config.dropout

    def forward(
        self, hidden_states: torch.Tensor, blocks: EmformerBlocks | EmformerStep, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: Memories, right contexts and frames of each block, block after block
                `(batch, rows, hidden)`.
            blocks: What knows how the rows are laid out, and the keys and values of the past.
            attention_mask: Added to the attention scores `(blocks, 1, queries, keys)`.

        Returns:
            The same rows one layer up `(batch, rows, hidden)`.
        """
        rows, memory = blocks.split(hidden_states), None
        if num_memories := blocks.num_memory_rows:
            memory, rows = rows.split([num_memories, rows.shape[1] - num_memories], 1)
        attended, memory = self.attention(self.layer_norm_input(rows), memory, blocks, attention_mask)
        rows = self._drop(attended) + rows
        rows = self.layer_norm_output(self._drop(self.pos_ff(rows)) + rows)
        if memory is not None:
            rows = torch.cat([memory, rows], 1)
        return rows.view_as(hidden_states)

    def _drop(self, states: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(states, self.dropout) if self.training else states


class EmformerPreTrainedModel(SpeechAdapterMixin, PreTrainedModel):
    config_class = EmformerConfig
    base_model_prefix = "encoder"
    main_input_name = "input_features"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["EmformerLayer"]
    _supports_sdpa = True
    # The loss is a mean over utterances: Trainer must not believe that it was divided by `num_items_in_batch`.
    accepts_loss_kwargs = False

    def _get_feat_extract_output_lengths(self, input_lengths: torch.Tensor) -> torch.Tensor:
        return input_lengths // self.config.subsampling_factor

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, EmformerAttention):
            # Deeper layers start smaller, as in torchaudio.
            for linear in (module.emb_to_key_value, module.emb_to_query):
                init.xavier_uniform_(linear.weight, gain=(module.layer_idx + 1) ** -0.5)
        elif isinstance(module, (nn.Conv1d, nn.Linear)):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class EmformerModel(EmformerPreTrainedModel):
    """
    Emformer's encoder of whole utterances and of streams.

    Example:

    ```python
    >>> import torch
    >>> from modeling import EmformerConfig, EmformerModel

    >>> model = EmformerModel(EmformerConfig(num_hidden_layers=2)).eval()
    >>> output = model(torch.zeros(2, 102, 80), attention_mask=torch.arange(102) < torch.tensor([[102], [50]]))
    >>> output.last_hidden_state.shape, output.attention_mask.sum(-1).tolist()
    (torch.Size([2, 25, 256]), [25, 12])

    ```
    """

    def __init__(self, config: EmformerConfig):
        super().__init__(config)
        self.subsampler = SUBSAMPLERS[config.subsampling](config) if config.subsampling in SUBSAMPLERS else None
        self.layers = nn.ModuleList(EmformerLayer(config, index) for index in range(config.num_hidden_layers))
        self.projection = None
        if config.output_size is not None:
            self.projection = nn.Sequential(
                nn.Linear(config.hidden_size, config.output_size),
                nn.LayerNorm(config.output_size, eps=config.layer_norm_eps),
            )
        self.post_init()

    def forward(
        self,
        input_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        *,
        past_key_values: EmformerCache | None = None,
        padding_cache: EmformerPaddingCache | None = None,
        use_cache: bool | None = None,
        is_last: bool | torch.Tensor = False,
        segment_length: int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> EmformerModelOutput:
        """
        Encodes whole utterances or, with `use_cache`, what has arrived of streams.

        A stream may be cut anywhere: each call takes the frames that are new and returns those that are encoded, which
        may be none. A frame is encoded as soon as its segment and right context have arrived, or at the stream's end.

        Args:
            input_features: Features `(batch, frames, mel)`, every 10 ms.
            attention_mask: 1 for a frame, 0 for padding on the right, `(batch, frames)`.
            inputs_embeds: In place of features, frames behind the subsampling `(batch, frames, hidden)`, with an
                `attention_mask` as long.
            past_key_values: What the attention of streams remembers, from the call before.
            padding_cache: What their subsampling remembers, from the call before.
            use_cache: Whether the rows are streams; by default if there is a cache.
            is_last: Of streams: whether they end with these frames, for all or a row `(batch,)`.
            segment_length: Of whole utterances: frames a segment in place of the configuration's, as for training
                with several. Streams have that of their cache.
            output_hidden_states: Also return every layer's output.

        Raises:
            ValueError: Neither or both of `input_features` and `inputs_embeds` are given, they have another width than
                the model, an utterance gives no frame, the attention mask does not fit or pads on the left,
                `segment_length` is under 1 or shorter than the right context; or streams are run in training mode,
                without one of their caches, in another batch than before, or beyond their end.
        """
        is_stream = past_key_values is not None or padding_cache is not None if use_cache is None else use_cache
        inputs, lengths = self._check_inputs(input_features, attention_mask, inputs_embeds, is_stream)
        if is_stream:
            if segment_length is not None:
                raise ValueError("`segment_length` must be the cache's for streams. Give it to `EmformerCache`.")
            with torch.no_grad():
                output = self._encode_streams(
                    inputs,
                    lengths,
                    inputs_embeds is None,
                    past_key_values,
                    padding_cache,
                    is_last,
                    output_hidden_states,
                )
        else:
            if past_key_values is not None or padding_cache is not None or is_last is not False:
                raise ValueError("`use_cache` must be True for streams, got False with a cache or `is_last`.")
            output = self._encode_utterances(
                inputs, lengths, inputs_embeds is None, segment_length, output_hidden_states
            )
        return output.to_tuple() if return_dict is False else output

    def _check_inputs(
        self,
        input_features: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        is_stream: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the inputs in the model's dtype with zeros as padding, and their real frames if there is a mask."""
        if (input_features is None) == (inputs_embeds is None):
            raise ValueError("`input_features` must be given, or `inputs_embeds` in their place, and not both.")
        name, inputs = (
            ("inputs_embeds", inputs_embeds) if input_features is None else ("input_features", input_features)
        )
        width = self.config.hidden_size if input_features is None else self.config.num_mel_bins
        if inputs.dim() != 3 or inputs.shape[-1] != width:
            raise ValueError(f"`{name}` must be (batch, frames, {width}), got {tuple(inputs.shape)}.")
        lengths = None if attention_mask is None else _count_frames(attention_mask, inputs)
        if not is_stream:
            needed = 1 if input_features is None else self.config.subsampling_factor
            shortest = inputs.shape[1] if lengths is None else int(lengths.min())
            if shortest < needed:
                raise ValueError(f"`{name}` must have at least {needed} frames an utterance, got {shortest}.")
        # Features are fp32, whatever the checkpoint was saved in.
        return _zero_padding(inputs.to(self.dtype), lengths), lengths

    def _encode_utterances(
        self,
        inputs: torch.Tensor,
        lengths: torch.Tensor | None,
        is_features: bool,
        segment_length: int | None,
        output_hidden_states: bool | None,
    ) -> EmformerModelOutput:
        segment_length = self.config.segment_length if segment_length is None else segment_length
        check_segment_length(segment_length, self.config.right_context_length)
        if is_features and self.subsampler is not None:
            lengths = None if lengths is None else self._get_feat_extract_output_lengths(lengths)
            inputs = _zero_padding(self.subsampler(inputs), lengths)
        blocks = EmformerBlocks(
            self.config,
            lengths,
            inputs.shape[1],
            segment_length=segment_length,
            dtype=inputs.dtype,
            device=inputs.device,
        )
        mask = blocks.expand_mask(len(inputs))
        rows = blocks.lay_out(inputs)
        hidden_states = (inputs,)
        for layer in self.layers:
            rows = layer(rows, blocks, mask)
            if output_hidden_states:
                hidden_states += (blocks.take_frames(rows),)
        last_hidden_state = self._project(blocks.take_frames(rows))
        return EmformerModelOutput(
            last_hidden_state=last_hidden_state,
            attention_mask=_make_mask(last_hidden_state, lengths),
            hidden_states=hidden_states if output_hidden_states else None,
        )

    def _encode_streams(
        self,
        inputs: torch.Tensor,
        lengths: torch.Tensor | None,
        is_features: bool,
        cache: EmformerCache | None,
        padding_cache: EmformerPaddingCache | None,
        is_last: bool | torch.Tensor,
        output_hidden_states: bool | None,
    ) -> EmformerModelOutput:
        if self.training:
            raise ValueError("`use_cache` must be False in training mode, got True. Call `eval()` before streaming.")
        is_subsampled = is_features and self.subsampler is not None
        if is_subsampled and (cache is None or not cache.batch_size) != (
            padding_cache is None or not padding_cache.batch_size
        ):
            raise ValueError("`past_key_values` and `padding_cache` must come from the same call, got one of them.")
        counts = [inputs.shape[1]] * len(inputs) if lengths is None else lengths.tolist()
        cache = EmformerCache(self.config) if cache is None else cache
        is_last = is_last.tolist() if isinstance(is_last, torch.Tensor) else [is_last] * len(inputs)
        cache.check(counts)
        if is_subsampled:
            padding_cache = EmformerPaddingCache(self.config) if padding_cache is None else padding_cache
            inputs, counts = padding_cache.take_whole_strides(inputs, counts)
            if max(counts):
                inputs = self.subsampler(inputs, counts, padding_cache)
                counts = [count // self.config.subsampling_factor for count in counts]
            else:
                inputs = inputs.new_zeros(len(inputs), 0, self.config.hidden_size)
        cache.append(inputs, counts, is_last)
        parts = []
        while cache.find_ready_rows():
            parts.append(self._encode_step(EmformerStep(cache), output_hidden_states))
        num_states = self.config.num_hidden_layers + 1 if output_hidden_states else 1
        states, totals = collect_frames(parts, len(inputs), [inputs[:, :0]] * num_states)
        last_hidden_state = self._project(states[-1])
        return EmformerModelOutput(
            last_hidden_state=last_hidden_state,
            attention_mask=is_before(totals, last_hidden_state.shape[1]).long().to(inputs.device),
            hidden_states=tuple(states) if output_hidden_states else None,
            past_key_values=cache,
            padding_cache=padding_cache,
        )

    def _encode_step(
        self, step: EmformerStep, output_hidden_states: bool | None
    ) -> tuple[list[int], tuple[torch.Tensor, ...]]:
        """Encodes a segment of each stream that has one; returns how many frames of each are real, and states."""
        mask, rows, states = step.make_mask(), step.lay_out(), ()
        for layer in self.layers:
            if output_hidden_states:
                states += (step.take_frames(rows),)
            rows = layer(rows, step, mask)
        step.commit()
        return step.num_frames, (*states, step.take_frames(rows))

    def _project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states if self.projection is None else self.projection(hidden_states)


def _make_mask(hidden_states: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    if lengths is None:
        return torch.ones(hidden_states.shape[:2], dtype=torch.long, device=hidden_states.device)
    return (torch.arange(hidden_states.shape[1], device=hidden_states.device) < lengths[:, None]).long()


def _count_frames(attention_mask: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Real frames of each row `(batch,)` of `inputs` `(batch, frames, width)`."""
    if attention_mask.shape != inputs.shape[:2]:
        raise ValueError(
            f"`attention_mask` must be (batch, frames) {tuple(inputs.shape[:2])}, got {tuple(attention_mask.shape)}."
        )
    lengths = attention_mask.long().sum(-1)
    is_frame = torch.arange(inputs.shape[1], device=inputs.device) < lengths[:, None]
    if not torch.equal(is_frame, attention_mask.bool()):
        raise ValueError("`attention_mask` must have its zeros on the right, got padding before a frame.")
    return lengths


def _zero_padding(hidden_states: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """Zeroes `hidden_states` `(batch, frames, width)` beyond `lengths` `(batch,)`: noise there may be no number."""
    if lengths is None:
        return hidden_states
    is_padding = torch.arange(hidden_states.shape[1], device=hidden_states.device) >= lengths[:, None]
    return hidden_states.masked_fill(is_padding[:, :, None], 0.0)


class EmformerForCTC(EmformerPreTrainedModel):
    """
    Emformer with a CTC classifier: a recogniser of whole utterances and of streams.

    Example:

    ```python
    >>> import torch
    >>> from modeling import EmformerConfig, EmformerForCTC

    >>> model = EmformerForCTC(EmformerConfig(num_hidden_layers=2, right_context_length=2)).eval()
    >>> features = torch.randn(1, 64, 80)  # .64 s
    >>> first = model(features[:, :30], use_cache=True)
    >>> caches = {"past_key_values": first.past_key_values, "padding_cache": first.padding_cache}
    >>> second = model(features[:, 30:], **caches, is_last=True)
    >>> first.logits_lengths.tolist(), second.logits_lengths.tolist()  # 40 ms each; two frames wait for right context
    ([4], [12])
    >>> streamed = torch.cat([first.logits, second.logits], 1)
    >>> torch.allclose(streamed, model(features).logits, atol=1e-5)
    True

    ```
    """

    def __init__(self, config: EmformerConfig):
        super().__init__(config)
        self.encoder = EmformerModel(config)
        self.classifier = nn.Linear(config.output_size or config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        past_key_values: EmformerCache | None = None,
        padding_cache: EmformerPaddingCache | None = None,
        use_cache: bool | None = None,
        is_last: bool | torch.Tensor = False,
        segment_length: int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> EmformerCTCOutput:
        """
        Args:
            input_features: Features `(batch, frames, mel)`, every 10 ms.
            attention_mask: 1 for a frame, 0 for padding on the right, `(batch, frames)`.
            labels: Classes `(batch, tokens)`, -100 beyond a transcript's end.
            past_key_values: As in [`EmformerModel`], like all that follow.

        Raises:
            ValueError: As in [`EmformerModel`]; or a transcript needs more frames than there are (CTC would be
                infinite), or streams have labels.
        """
        encoded = self.encoder(
            input_features,
            attention_mask,
            past_key_values=past_key_values,
            padding_cache=padding_cache,
            use_cache=use_cache,
            is_last=is_last,
            segment_length=segment_length,
            output_hidden_states=output_hidden_states,
        )
        if labels is not None and encoded.past_key_values is not None:
            raise ValueError("`labels` must be left out of streams: CTC aligns whole utterances.")
        lengths = encoded.attention_mask.sum(-1)
        logits = self._mask_logits(self.classifier(encoded.last_hidden_state), encoded.attention_mask.bool())
        output = EmformerCTCOutput(
            loss=None if labels is None else self._ctc_loss(logits, lengths, labels),
            logits=logits,
            logits_lengths=lengths,
            hidden_states=encoded.hidden_states,
            past_key_values=encoded.past_key_values,
            padding_cache=encoded.padding_cache,
        )
        return output.to_tuple() if return_dict is False else output

    def _mask_logits(self, logits: torch.Tensor, is_frame: torch.Tensor) -> torch.Tensor:
        if is_frame.all():
            return logits
        blank = logits.new_full((logits.shape[-1],), PADDED_LOGIT)
        blank[self.config.pad_token_id] = 0.0
        return torch.where(is_frame[:, :, None], logits, blank)

    def _ctc_loss(self, logits: torch.Tensor, lengths: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        label_lengths = check_labels_fit(labels, lengths)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        log_probs = logits.to(dtype).log_softmax(-1).transpose(0, 1)  # (frames, batch, vocab_size)
        with torch.backends.cudnn.flags(enabled=False):
            return nn.functional.ctc_loss(
                log_probs,
                labels.clamp(min=0),
                lengths,
                label_lengths.to(lengths.device),
                blank=self.config.pad_token_id,
                reduction=self.config.ctc_loss_reduction,
            )
