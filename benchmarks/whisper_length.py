"""What it costs a Whisper encoder to hear a clip to its end and not padded to 30 s: states, and words of its decoder.

python -m benchmarks.whisper_length openai/whisper-base FOLDER_OF_METADATA --split test
"""

import argparse
import csv
import json
from pathlib import Path

import jiwer
import numpy as np
import torch
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor
from transformers.audio_utils import load_audio
from transformers.modeling_outputs import BaseModelOutput

from modeling.audio_encoders import run_encoder
from modeling.processing_audio_lm import AudioLMProcessor

RATE = 16_000
CONTEXT = "min_input_frames"  # silence as 30 s have it, beside the stock encoder's own states of silence
CUT = "30 s, the states of the clip alone"


def read_clips(folder: Path, split: str, column: str, text: str, limit: int) -> list[tuple[np.ndarray, str]]:
    """Returns clips and their transcripts from `metadata.csv` of a folder."""
    with (folder / "metadata.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("split", split) == split][:limit]
    return [(load_audio(str(folder / row[column]), sampling_rate=RATE), row[text]) for row in rows]


@torch.no_grad()
def hear(model: WhisperForConditionalGeneration, features: torch.Tensor, language: str | None) -> torch.Tensor:
    """Returns the tokens that the decoder says of an encoder's states."""
    options = {"language": language, "task": "transcribe"} if model.generation_config.is_multilingual else {}
    return model.generate(encoder_outputs=BaseModelOutput(last_hidden_state=features), max_new_tokens=60, **options)


@torch.no_grad()
def main() -> None:
    """
    Prints, for each length of silence behind the clip, how alike states are (cosine), the word error rate, and the
    share of words misheard or missed, whatever the decoder goes on to say after the clip's end.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_name_or_path", help="Folder or Hub name of a Whisper.")
    parser.add_argument("folder", type=Path, help="Folder with metadata.csv.")
    parser.add_argument("--split", default="test", help="Rows of metadata.csv with this split.")
    parser.add_argument("--audio_column", default="file_name", help="Column of the audio files.")
    parser.add_argument("--text_column", default="text", help="Column of the transcripts.")
    parser.add_argument("--language", default="en", help="Language of the speech.")
    parser.add_argument("--limit", type=int, default=60, help="Clips at most, from the first on.")
    parser.add_argument("--silence", type=float, nargs="+", default=[0.0, 1.0], help="Seconds behind a clip.")
    args = parser.parse_args()
    model = WhisperForConditionalGeneration.from_pretrained(args.model_name_or_path, dtype=torch.float32).eval()
    processor = WhisperProcessor.from_pretrained(args.model_name_or_path)
    normalize = processor.tokenizer.normalize if args.language == "en" else processor.tokenizer.basic_normalize
    extractor: WhisperFeatureExtractor = processor.feature_extractor
    said, references, cosines = {}, [], {}
    for clip, text in read_clips(args.folder, args.split, args.audio_column, args.text_column, args.limit):
        references.append(normalize(text))
        features = extractor(clip, sampling_rate=RATE, return_tensors="pt").input_features
        padded = model.model.encoder(features).last_hidden_state
        said.setdefault("30 s", []).append(hear(model, padded, args.language))
        rows = AudioLMProcessor.extract_window(extractor, clip).unsqueeze(0)
        context = extractor.nb_max_frames
        states = run_encoder(model.model.encoder, rows, min_inputs=context)[0].last_hidden_state
        frames = states.shape[1]
        cosines.setdefault(CONTEXT, []).append(
            float(torch.cosine_similarity(states, padded[:, :frames], dim=-1).mean())
        )
        whole = torch.cat([states, padded[:, frames:]], dim=1)
        said.setdefault(CONTEXT, []).append(hear(model, whole, args.language))
        said.setdefault(CUT, []).append(hear(model, padded[:, :frames], args.language))
        for seconds in args.silence:
            longer = np.pad(clip, (0, int(seconds * RATE)))
            rows = AudioLMProcessor.extract_window(extractor, longer).unsqueeze(0)
            states = run_encoder(model.model.encoder, rows)[0].last_hidden_state
            frames = -(-len(clip) // 320)
            similarity = torch.cosine_similarity(states[:, :frames], padded[:, :frames], dim=-1).mean()
            cosines.setdefault(f"{seconds} s", []).append(float(similarity))
            said.setdefault(f"{seconds} s", []).append(hear(model, states, args.language))
    for name, tokens in said.items():
        texts = [normalize(processor.batch_decode(row, skip_special_tokens=True)[0]) for row in tokens]
        words = jiwer.process_words(references, texts)
        heard = 100 * (words.substitutions + words.deletions) / (words.hits + words.substitutions + words.deletions)
        cosine = float(np.mean(cosines.get(name, [1.0])))
        result = {"behind the clip": name, "wer": round(100 * words.wer, 2), "missed": round(heard, 2)}
        result["cosine"] = round(cosine, 4)
        print(json.dumps(result | {"clips": len(references)}))


if __name__ == "__main__":
    main()
