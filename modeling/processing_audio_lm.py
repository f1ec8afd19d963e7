"""Processor of audio language models: placeholders for any clips, labels by place and never by token.

"<|audio|> What is said?" + a clip  ->  "<|audio|><|audio|>...<|audio|> What is said?", one a row of audio
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoFeatureExtractor,
    BatchFeature,
    ProcessorMixin,
    SequenceFeatureExtractor,
    WhisperFeatureExtractor,
)
from transformers.audio_utils import make_audio_chat_template_content, make_list_of_audio_chat_template

from .audio_encoders import find_frame_formula, find_max_inputs
from .audio_lm_sides import AUDIO_TOKEN, ENCODER, LANGUAGE_MODEL, add_audio_token, load_tokenizer

# Encoders with positions for any length still need memory that grows with the square of it.
MAX_SECONDS = 30.0
DEFAULT_PROMPT = "Transcribe the speech."
IGNORED = -100  # in labels: nothing is learned here
# Before a language model's own template, which wants text: puts placeholders where a message has audio.
FLATTEN_TEMPLATE = """\
{%- set ns = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message.content is string or message.content is not defined -%}
{%- set ns.messages = ns.messages + [message] -%}
{%- else -%}
{%- set part = namespace(text='') -%}
{%- for block in message.content -%}
{%- if block.type == 'audio' -%}{%- set part.text = part.text + '<|audio|>' -%}
{%- elif block.type == 'text' -%}{%- set part.text = part.text + block.text -%}{%- endif -%}
{%- endfor -%}
{%- set ns.messages = ns.messages + [dict(message, content=part.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = ns.messages -%}
"""
# Of language models that have none.
PLAIN_TEMPLATE = """\
{%- for message in messages -%}
{{ message.role | capitalize }}:
{{ message.content }}{{ eos_token if message.role == 'assistant' else '' }}
{% endfor -%}
{%- if add_generation_prompt -%}Assistant:
{% endif -%}
"""


class AudioLMProcessor(ProcessorMixin):
    """
    Joins an encoder's feature extractor and a language model's tokenizer.

    Args:
        feature_extractor: Of the encoder.
        tokenizer: Of the language model, with the placeholder among its tokens, and a pad token.
        chat_template: Jinja template of conversations.
        audio_token: The placeholder.
        frame_offset: The encoder makes `(inputs + frame_offset) // frame_stride` frames.
        frame_stride: Likewise.
        window_frames: Frames that become `window_tokens` tokens, as in the model's configuration.
        window_tokens: Likewise.
        max_seconds: Longer clips become several windows of about the same length.
        transcription_prompt: What [`apply_transcription_request`] asks.

    Raises:
        ValueError: The tokenizer has no pad token, or not the placeholder.
    """

    text_kwargs = {"padding": True, "return_tensors": "pt"}
    audio_kwargs = {"return_tensors": "pt"}

    def __init__(
        self,
        feature_extractor,
        tokenizer,
        chat_template=None,
        audio_token=AUDIO_TOKEN,
        frame_offset=1,
        frame_stride=2,
        window_frames=4,
        window_tokens=1,
        max_seconds=MAX_SECONDS,
        transcription_prompt=DEFAULT_PROMPT,
    ):
        if tokenizer.pad_token is None:
            raise ValueError(
                "`tokenizer` must have a pad token, got none. Set `tokenizer.pad_token = tokenizer.eos_token`: it "
                "is known by its place."
            )
        if audio_token not in tokenizer.get_vocab():
            raise ValueError(f"`tokenizer` must have the token {audio_token!r}, got none. Call `add_audio_token`.")
        self.audio_token = audio_token
        self.audio_token_id = tokenizer.convert_tokens_to_ids(audio_token)
        self.frame_offset, self.frame_stride = frame_offset, frame_stride
        self.window_frames, self.window_tokens = window_frames, window_tokens
        self.max_seconds = max_seconds
        self.transcription_prompt = transcription_prompt
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_model(
        cls, model, *, feature_extractor: str | None = None, tokenizer: str | None = None, **kwargs
    ) -> "AudioLMProcessor":
        """
        Returns the processor of a model that was just made of two: from the bases' own files.

        Args:
            model: An audio language model.
            feature_extractor: Folder or Hub name. Default: that of the encoder.
            tokenizer: Likewise. Default: that of the language model.
            kwargs: As in `from_pretrained`, for both.

        Raises:
            ValueError: As [`load_tokenizer`] and [`find_frame_formula`].
        """
        bases = getattr(model, "base_sides", {})
        names = [
            given or bases[name].name_or_path
            for given, name in ((feature_extractor, ENCODER), (tokenizer, LANGUAGE_MODEL))
        ]
        extractor = AutoFeatureExtractor.from_pretrained(names[0], **({"trust_remote_code": False} | kwargs))
        tokenizer = load_tokenizer(names[1], **kwargs)
        add_audio_token(tokenizer)
        offset, stride = find_frame_formula(model.model.audio_tower)
        max_inputs = find_max_inputs(model.model.audio_tower)
        hop = getattr(extractor, "hop_length", 1)
        return cls(
            extractor,
            tokenizer,
            chat_template=FLATTEN_TEMPLATE + (tokenizer.chat_template or PLAIN_TEMPLATE),
            frame_offset=offset,
            frame_stride=stride,
            window_frames=model.config.window_frames,
            window_tokens=model.config.window_tokens,
            max_seconds=min(MAX_SECONDS, max_inputs * hop / extractor.sampling_rate) if max_inputs else MAX_SECONDS,
        )

    @property
    def model_input_names(self) -> list[str]:
        """Names of what the model takes."""
        return [*self.tokenizer.model_input_names, "input_features", "input_features_mask"]

    def __call__(self, text=None, audio=None, **kwargs) -> BatchFeature:
        """
        Prepares prompts to be answered: padded on the left.

        Args:
            text: One prompt or several, with a placeholder a clip.
            audio: The clips in the order of their placeholders: arrays `(samples,)`, files or addresses.
            kwargs: As in transformers' processors; `sampling_rate` of the arrays in Hz.

        Returns:
            `input_ids` and `attention_mask` `(batch, tokens)`; and, with audio, `input_features` and
            `input_features_mask`, a row a window of a clip.

        Raises:
            ValueError: There are not as many placeholders as clips, a file is not there, a clip is empty, too short or
                not one channel of finite numbers, or labels are asked for, which need to know what the answer is.
        """
        if kwargs.pop("output_labels", False):
            raise ValueError(
                "`output_labels` must be left out, got True: a text does not say where its answer begins. Use "
                "`encode_conversations`, which learns the answers and not the prompts."
            )
        kwargs["text_kwargs"] = {"padding_side": "left"} | kwargs.get("text_kwargs", {})
        if audio is not None:
            audio = list(self._check_files(audio))
        return super().__call__(text=text, audio=audio or None, **kwargs)

    def _check_files(self, audio) -> Iterator[object]:
        for clip in audio if isinstance(audio, (list, tuple)) else [audio]:
            yield check_file(clip) if isinstance(clip, (str, Path)) else clip

    def validate_inputs(self, audio=None, text=None, **kwargs):
        """As in transformers, with messages of this project's kind."""
        texts = [text] if isinstance(text, str) else list(text or [])
        if text is not None and all(isinstance(sample, str) for sample in texts):
            self._check_counts(texts, 0 if audio is None else len(audio))
        super().validate_inputs(audio=audio, text=text, **kwargs)

    def _check_counts(self, texts: Sequence[str], num_clips: int) -> None:
        counts = [sample.count(self.audio_token) for sample in texts]
        if sum(counts) != num_clips:
            raise ValueError(
                f"`text` must have a placeholder {self.audio_token} for each clip, got {sum(counts)} placeholders "
                f"({', '.join(map(str, counts[:20]))} a prompt) and {num_clips} clips. Add the placeholder where the "
                "audio belongs, or the clip."
            )

    def _process_audio(self, audio, **kwargs) -> tuple[dict[str, torch.Tensor], list[str]]:
        windows = [self.split_clip(clip) for clip in audio]
        rows = [self.extract(window, sampling_rate=kwargs.get("sampling_rate")) for clip in windows for window in clip]
        counts = [self.count_tokens(self.num_inputs(row)) for row in rows]
        sizes = [len(clip) for clip in windows]
        ends = np.cumsum(sizes)
        tokens = [sum(counts[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
        return self.pad_features(rows), [self.audio_token * number for number in tokens]

    def replace_audio_token(self, audio_inputs: dict, audio_idx: int, **kwargs) -> str:
        """Returns the placeholders of one row of features."""
        del kwargs
        return self.audio_token * self.count_tokens(int(audio_inputs["input_features_mask"][audio_idx].sum()))

    @property
    def _is_time_last(self) -> bool:
        return isinstance(self.feature_extractor, WhisperFeatureExtractor)

    def num_inputs(self, features: torch.Tensor) -> int:
        """Returns how many inputs of the encoder one window's features have: frames or samples."""
        return features.shape[-1] if self._is_time_last else features.shape[0]

    def count_tokens(self, num_inputs: int) -> int:
        """
        Returns how many placeholders a window takes, from its frames of features or its samples.

        Args:
            num_inputs: As [`num_inputs`] says.
        """
        frames = max(0, (num_inputs + self.frame_offset) // self.frame_stride)
        return -(-frames // self.window_frames) * self.window_tokens

    def split_clip(self, clip) -> list[np.ndarray]:
        """
        Returns a clip as consecutive windows `(samples,)` of about one length, none longer than `max_seconds`.

        Args:
            clip: Samples at the feature extractor's rate, one channel.

        Raises:
            ValueError: It is empty, has several channels, or is not all numbers.
        """
        clip = np.asarray(clip.detach().cpu() if isinstance(clip, torch.Tensor) else clip, dtype=np.float32)
        if clip.ndim != 1 or not len(clip) or not np.isfinite(clip).all():
            raise ValueError(
                f"`audio` must be one channel of finite samples, got an array {clip.shape}"
                f"{'' if np.isfinite(clip).all() else ' with NaN or infinity'}. Mix it down, or leave it out."
            )
        most = int(self.max_seconds * self.feature_extractor.sampling_rate)
        size = -(-len(clip) // -(-len(clip) // most))
        if (hop := getattr(self.feature_extractor, "hop_length", None)) and size < len(clip):
            size = min(most, -(-size // hop) * hop)  # a window begins where a frame does
        return [clip[begin : begin + size] for begin in range(0, len(clip), size)]

    def extract(self, window: np.ndarray, *, sampling_rate: int | None = None) -> torch.Tensor:
        """
        Returns the features of one window, by itself: no other clip has a part in them.

        Args:
            window: Samples `(samples,)`.
            sampling_rate: Its rate in Hz. Default: the feature extractor's.

        Returns:
            `(mel, frames)` for Whisper, `(samples,)` for waves, else as the feature extractor has them.

        Raises:
            ValueError: It is too short for one frame of the encoder, or its rate is another than the feature
                extractor's.
        """
        features = self.extract_window(self.feature_extractor, window, sampling_rate=sampling_rate)
        if not self.count_tokens(self.num_inputs(features)):
            raise ValueError(
                f"`audio` must be long enough for one frame of the encoder, got a clip of {len(window)} samples. "
                "Leave such clips out."
            )
        return features

    @staticmethod
    def extract_window(
        extractor: SequenceFeatureExtractor, window: np.ndarray, *, sampling_rate: int | None = None
    ) -> torch.Tensor:
        """As [`extract`], with any feature extractor, of a window however short."""
        rate = extractor.sampling_rate if sampling_rate is None else sampling_rate
        options = {"sampling_rate": rate, "return_tensors": "pt", "padding": "longest", "truncation": False}
        if isinstance(extractor, WhisperFeatureExtractor):
            # The last frame looks past the clip's end: at silence, whatever comes after it in a batch.
            frames = -(-len(window) // extractor.hop_length)
            silence = frames * extractor.hop_length - len(window) + extractor.n_fft
            return extractor(np.pad(window, (0, silence)), **options)["input_features"][0, :, :frames]
        output = extractor(window, **options)
        return next(output[name][0] for name in ("input_features", "input_values") if name in output)

    def pad_features(self, rows: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        Returns windows of different lengths as one batch, zeros on the right.

        Args:
            rows: From [`extract`].

        Returns:
            `input_features`, and `input_features_mask` `(rows, frames or samples)`, 1 where there is audio.
        """
        lengths = torch.tensor([self.num_inputs(row) for row in rows])
        rows = [row.transpose(0, -1) for row in rows]  # time first
        features = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)  # (rows, time, ...)
        features = features.transpose(1, -1) if self._is_time_last else features
        mask = (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).long()
        return {"input_features": features.contiguous(), "input_features_mask": mask}

    def _multimodal_inputs_from_conversations(self, conversations, *args, **kwargs):
        for conversation in conversations:
            for message in conversation:
                for block in message.get("content") if isinstance(message.get("content"), list) else []:
                    for key in ("audio", "path"):
                        if block.get("type") == "audio" and isinstance(block.get(key), (str, Path)):
                            check_file(block[key])
        return super()._multimodal_inputs_from_conversations(conversations, *args, **kwargs)

    def encode_conversations(
        self,
        conversations: Sequence[Sequence[Mapping[str, object]]],
        *,
        audio: Sequence[np.ndarray] | None = None,
        num_audio_tokens: Sequence[int] | None = None,
        sampling_rate: int | None = None,
    ) -> BatchFeature:
        """
        Prepares conversations to be learned: labels are the assistant's turns and what ends them, nothing else.

        The prompt of each answer is what [`apply_chat_template`] makes of the messages before it: the very tokens that
        a model is asked with.

        Args:
            conversations: Each a list of messages with `role` and `content`, a string or a list of blocks
                `{"type": "text", "text"}` and `{"type": "audio"}`, of which the latter may have `path` or `audio`.
            audio: The clips in the order of their blocks. Default: those that the blocks name.
            num_audio_tokens: In place of clips that are not to be read, how many placeholders each takes: where states
                come from a cache.
            sampling_rate: Of the clips in Hz. Default: the feature extractor's.

        Returns:
            `input_ids`, `attention_mask` and `labels` `(batch, tokens)`, padded on the right, -100 where nothing is
            learned; and, with audio, `input_features` and `input_features_mask`.

        Raises:
            ValueError: There are not as many blocks as clips, a conversation has no answer, or the template does not
                set an answer apart from its prompt.
        """
        texts, spans = zip(*[self._render(conversation) for conversation in conversations], strict=True)
        features = {}
        if num_audio_tokens is None:
            clips = self._load_clips(conversations) if audio is None else list(audio)
            self._check_counts(texts, len(clips))
            replacements = []
            if clips:
                features, replacements = self._process_audio(clips, sampling_rate=sampling_rate)
        else:
            self._check_counts(texts, len(num_audio_tokens))
            replacements = [self.audio_token * int(number) for number in num_audio_tokens]
        source = iter(replacements)
        pairs = [self._expand(text, places, source) for text, places in zip(texts, spans, strict=True)]
        rows = [self._tokenize(text, places) for text, places in pairs]
        pad = torch.nn.utils.rnn.pad_sequence
        batch = {
            "input_ids": pad([ids for ids, _ in rows], batch_first=True, padding_value=self.tokenizer.pad_token_id),
            "attention_mask": pad([torch.ones_like(ids) for ids, _ in rows], batch_first=True),
            "labels": pad([labels for _, labels in rows], batch_first=True, padding_value=IGNORED),
        }
        return BatchFeature(batch | features)

    def _render(self, conversation: Sequence[Mapping[str, object]]) -> tuple[str, list[tuple[int, int]]]:
        """A conversation as text, and where its answers are in it."""
        spans, text = [], ""
        for index, message in enumerate(conversation):
            if message["role"] != "assistant":
                continue
            prompt = self.apply_chat_template(conversation[:index], add_generation_prompt=True, tokenize=False)
            text = self.apply_chat_template(conversation[: index + 1], tokenize=False)
            if not text.startswith(prompt):
                raise ValueError(
                    "`chat_template` must put an answer behind its prompt, got a template that writes the prompt "
                    f"differently once it is answered: {prompt[-40:]!r} and {text[: len(prompt)][-40:]!r}."
                )
            spans.append((len(prompt), len(text.rstrip())))
        whole = self.apply_chat_template(list(conversation), tokenize=False)
        if not spans or not whole.startswith(text.rstrip()):
            raise ValueError(
                "`conversations` must each have an answer of the role assistant, got roles "
                f"{[message['role'] for message in conversation]}. Add what the model is to say."
            )
        return whole[: spans[-1][1]], spans

    def _expand(
        self, text: str, spans: Sequence[tuple[int, int]], replacements: Iterator[str]
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text with each placeholder as often as its clip has rows, and the spans where they then are."""
        parts = text.split(self.audio_token)
        inserted = [next(replacements) for _ in parts[1:]]
        ends = np.cumsum([len(part) + len(self.audio_token) for part in parts[:-1]])
        gains = [len(new) - len(self.audio_token) for new in inserted]
        moved = [
            tuple(place + sum(gain for gain, end in zip(gains, ends, strict=True) if end <= place) for place in span)
            for span in spans
        ]
        return parts[0] + "".join(new + part for new, part in zip(inserted, parts[1:], strict=True)), moved

    def _tokenize(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        bos = self.tokenizer.bos_token
        output = self.tokenizer(
            text, return_offsets_mapping=True, add_special_tokens=not (bos and text.startswith(bos)),
            return_attention_mask=False,
        )  # fmt: skip
        ids = torch.tensor(output["input_ids"])
        labels = torch.full_like(ids, IGNORED)
        for place, (begin, end) in enumerate(output["offset_mapping"]):
            for first, last in spans:
                if begin < first < end:
                    raise ValueError(
                        "`chat_template` must let an answer begin with a token of its own, got "
                        f"{text[begin:end]!r}, of which the prompt has a part. End the prompt with a line break."
                    )
                if first <= begin and end <= last and end > begin:
                    labels[place] = ids[place]
        return ids, labels

    def _load_clips(self, conversations: Sequence[Sequence[Mapping[str, object]]]) -> list[np.ndarray]:
        copies = [[dict(message) for message in conversation] for conversation in conversations]
        loading = self._resolve_audio_loading_params({})
        return self._multimodal_inputs_from_conversations(copies, loading)[2]

    def apply_transcription_request(
        self, audio, prompt: str | Sequence[str | None] | None = None, tokenize: bool = True, **kwargs
    ) -> BatchFeature | list[str]:
        """
        Prepares the request to write down what is said.

        Args:
            audio: One clip or several: files, addresses, or arrays `(samples,)`.
            prompt: What is asked, of all or one a clip. Default: `transcription_prompt`.
            tokenize: Return tensors; else prompts as text, with placeholders as they are.
            kwargs: As in [`apply_chat_template`].

        Raises:
            ValueError: There is no clip, or prompts and clips differ in number.
        """
        clips = list(make_list_of_audio_chat_template(audio))
        clips = [clip.detach().cpu().numpy() if isinstance(clip, torch.Tensor) else clip for clip in clips]
        prompts = [prompt] * len(clips) if prompt is None or isinstance(prompt, str) else list(prompt)
        if not clips or len(prompts) != len(clips):
            raise ValueError(
                f"`prompt` must be one for all clips or one a clip, got {len(prompts)} prompts and {len(clips)} clips."
            )
        conversations = [
            [{"role": "user", "content": [make_audio_chat_template_content(clip), {"type": "text", "text": text}]}]
            for clip, text in zip(clips, [text or self.transcription_prompt for text in prompts], strict=True)
        ]
        return self.apply_chat_template(
            conversations, tokenize=tokenize, add_generation_prompt=True, return_dict=True, **kwargs
        )


def check_file(source: str | Path) -> str:
    """
    Returns the name of an audio file, an address or encoded audio.

    Raises:
        ValueError: It looks like a file and is none.
    """
    name = os.fspath(source)
    is_elsewhere = name.startswith(("http://", "https://", "data:")) or len(name) > 4096  # the latter is base64
    if not is_elsewhere and not os.path.isfile(name):
        raise ValueError(f"`audio` must be a file that is there, got {name!r}. Check the path.")
    return name
