"""What a Whisper hears in each clip and when: transcripts with times, to align projectors and for cascades.

python -m benchmarks.whisper_words openai/whisper-base --dataset barista --output_file outputs/audio_lm/words.jsonl

transformers' pipeline gives the same form (`return_timestamps="word"`) from clips padded to 30 s; here a clip is heard
at its own length, which costs a fifth, and a sentence that the decoder then says again and again is kept once.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, WhisperForConditionalGeneration, WhisperProcessor
from transformers.modeling_outputs import BaseModelOutput

from data.audio import SAMPLING_RATE, read_audio
from data.corpora import load_corpus
from modeling.audio_encoders import run_encoder
from modeling.files import write_text

FRAME_SECONDS = 0.02
MAX_TOKENS = 60


@torch.inference_mode()
def hear(model: PreTrainedModel, processor: WhisperProcessor, samples: np.ndarray, language: str | None) -> list[dict]:
    """
    Returns the words of a clip `(samples,)` as the pipeline's chunks: `text` and `timestamp`.

    Args:
        model: Whisper with eager attention.
        processor: Of the model.
        samples: At 16 kHz, up to 30 s.
        language: Code, for a Whisper of several.
    """
    extractor = processor.feature_extractor
    frames = -(-len(samples) // extractor.hop_length)
    padded = np.pad(samples, (0, frames * extractor.hop_length - len(samples) + extractor.n_fft))
    features = extractor(padded, sampling_rate=SAMPLING_RATE, return_tensors="pt", padding="longest").input_features
    states, _ = run_encoder(model.model.encoder, features[:, :, :frames])
    prefix = {"language": language, "task": "transcribe"} if language else {}
    # A length and not a number of new tokens: the model's own settings have a length.
    said = model.generate(
        encoder_outputs=BaseModelOutput(last_hidden_state=states.last_hidden_state), max_length=MAX_TOKENS, **prefix
    )
    text = drop_repeats(processor.batch_decode(said, skip_special_tokens=True)[0].strip())
    tokenizer = processor.tokenizer
    tokenizer.set_prefix_tokens(**prefix, predict_timestamps=False)
    start, tokens = tokenizer.prefix_tokens, tokenizer(f" {text}", add_special_tokens=False).input_ids
    output = model.model.decoder(
        input_ids=torch.tensor([[*start, *tokens, tokenizer.eos_token_id]]),
        encoder_hidden_states=states.last_hidden_state,
        output_attentions=True,
        use_cache=False,
    )
    heads = [output.cross_attentions[layer][0, head] for layer, head in model.generation_config.alignment_heads]
    weights = torch.stack(heads)[:, len(start) : -1]  # (heads, tokens, frames)
    weights = (weights - weights.mean(-2, keepdim=True)) / (weights.std(-2, keepdim=True) + 1e-6)
    spans = align_tokens(-weights.mean(0).numpy())
    return join_words([tokenizer.decode([token]) for token in tokens], spans)


def drop_repeats(text: str) -> str:
    """
    Returns a text without what is said again right behind it, as decoders do that hear no silence at a clip's end.

    Example:

    ```python
    >>> from benchmarks.whisper_words import drop_repeats

    >>> drop_repeats("Make me a mocha. Make me a mocha. Make me")
    'Make me a mocha.'

    ```
    """
    if match := re.match(r"^(.{12,}?)\s*\1", text):
        return match[1].strip()
    first, *rest = re.split(r"(?<=[.?!])\s+", text)
    return first if rest and rest[0].startswith(first[:15]) else text


def align_tokens(costs: np.ndarray) -> list[tuple[int, int]]:
    """
    Returns the first frame of each token, and the one behind its last, by dynamic time warping.

    Args:
        costs: Of each token at each frame `(tokens, frames)`.

    Source: word times of openai/whisper (`timing.py`).
    """
    num_tokens, num_frames = costs.shape
    totals = np.full((num_tokens + 1, num_frames + 1), np.inf)
    totals[0, 0] = 0
    moves = np.zeros(costs.shape, dtype=int)
    for token in range(num_tokens):
        for frame in range(num_frames):
            before = (totals[token, frame], totals[token, frame + 1], totals[token + 1, frame])
            moves[token, frame] = int(np.argmin(before))
            totals[token + 1, frame + 1] = costs[token, frame] + min(before)
    spans = [[num_frames, 0] for _ in range(num_tokens)]
    token, frame = num_tokens - 1, num_frames - 1
    while token >= 0 and frame >= 0:
        spans[token] = [min(spans[token][0], frame), max(spans[token][1], frame + 1)]
        move = moves[token, frame]
        token, frame = token - (move < 2), frame - (move != 1)
    return [tuple(span) for span in spans]


def join_words(pieces: list[str], spans: list[tuple[int, int]]) -> list[dict]:
    """Returns tokens as words, which begin with a space, with seconds in place of frames."""
    words: list[dict] = []
    for piece, (first, last) in zip(pieces, spans, strict=True):
        start = words[-1]["timestamp"][0] if words else 0.0
        seconds = [max(start, round(first * FRAME_SECONDS, 2)), round(last * FRAME_SECONDS, 2)]
        if piece.startswith(" ") or not words:
            words.append({"text": piece, "timestamp": seconds})
        else:
            words[-1] = {"text": words[-1]["text"] + piece, "timestamp": [start, seconds[1]]}
    return words


def write_words(whisper: str, dataset: str, file: Path, *, language: str | None, splits: list[str]) -> None:
    """Writes what Whisper hears in the splits of a corpus, a line a clip; a file that is there is left as it is."""
    if file.is_file():
        return
    model = WhisperForConditionalGeneration.from_pretrained(
        whisper, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    processor, lines = WhisperProcessor.from_pretrained(whisper), []
    for split in splits:
        for row in load_corpus(dataset, split=split):
            chunks = hear(model, processor, read_audio(row["audio"]), language)
            lines.append(json.dumps({"audio": row["audio"]["path"], "chunks": chunks, "split": split}))
    write_text(file, "\n".join(lines) + "\n")


def main() -> None:
    """Runs on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("whisper", help="Whisper with its decoder: a folder or a Hub name.")
    parser.add_argument("--dataset", required=True, help="As for the recipes.")
    parser.add_argument("--splits", nargs="+", default=["train", "test"], help="Splits to hear.")
    parser.add_argument(
        "--language", default="en", help="Code, for a Whisper of several languages; empty for another."
    )
    parser.add_argument("--output_file", type=Path, required=True, help="JSON lines.")
    arguments = parser.parse_args()
    options = {"language": arguments.language or None, "splits": arguments.splits}
    write_words(arguments.whisper, arguments.dataset, arguments.output_file, **options)


if __name__ == "__main__":
    main()
