"""Coffee orders understood: an audio language model by mode, its baselines, and cascades through a transcript.

    python -m benchmarks.audio_lm --encoder openai/whisper-base --language_model HuggingFaceTB/SmolLM2-135M-Instruct \\
        --dataset barista --output_dir outputs/audio_lm

`barista` is a folder of audio and metadata.csv with `slots` in JSON (the Speech-to-Intent benchmark of Picovoice). One
run of `recipes/train_audio_lm.py` a row; a row that an earlier run has finished is read from its file. All rows of the
audio language model but QLoRA's begin with one projector, aligned with what the same Whisper hears in the training
clips. Cascades read the same Whisper's transcripts of the test clips.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.personalization import read_json
from benchmarks.results_file import store_result
from benchmarks.whisper_words import write_words
from data.instructions import load_conversations
from data.structured_answers import score_structured
from data.text import normalize_text
from modeling.files import write_text
from publishing.report import format_table
from training.launch import run_recipe

CONFIG = "train_audio_lm_barista"
TASK = {"response_column": "slots", "response_format": "json", "instruction": "Order as JSON."}
ALIGN = {"objective": "align", "num_train_epochs": 14, "projector_lr": 4e-4}
PROJECTOR_LR = 1e-4  # in the second stage
# What trains in the second stage of each row.
ROWS = {
    "projector alone": {"projector_lr": 3e-4},
    "+ LLM LoRA": {"llm_mode": "lora", "llm_lr": 1.5e-3},
    "+ encoder LoRA": {"llm_mode": "lora", "llm_lr": 1.5e-3, "encoder_mode": "lora", "encoder_lr": 1e-4},
    "QLoRA": {"llm_mode": "qlora", "llm_lr": 1.5e-3},
    "full LLM": {"llm_mode": "full", "llm_lr": 1e-4},
}
SHOTS = 4
CASCADES = ("cascade, SmolLM2 with LoRA on text", "cascade, slots matched in the text")
# Whole command understood at 24 dB of noise, as the benchmark's authors measured services in 2020.
PUBLISHED = {
    "Amazon Lex": 0.875,
    "Google Dialogflow": 0.825,
    "IBM Watson": 0.96,
    "Microsoft LUIS": 0.93,
    "Rhino": 0.99,
}
NUMBERS = {"8": "eight", "12": "twelve", "16": "sixteen", "20": "twenty"}


def train(arguments: argparse.Namespace, name: str, *, stages: Sequence[Mapping], **flags: object) -> Path:
    """Trains a row, if it is not finished; returns its folder."""
    output = arguments.output_dir / re.sub(r"\W+", "_", name).strip("_")
    if not (output / "eval_results.json").exists():
        run_recipe(
            "train_audio_lm",
            config=CONFIG,
            dataset=arguments.dataset,
            output_dir=output,
            stages=[json.dumps(stage) for stage in stages],
            resume_from_checkpoint=True,
            save_strategy="steps",
            save_steps=25,
            per_device_eval_batch_size=32,
            cache_dir=arguments.output_dir / "cache",
            **flags,
        )
    return output


def measure_rows(arguments: argparse.Namespace, words: Path, names: Sequence[str]) -> list[dict]:
    """Returns the rows of the audio language model and of its examples in the prompt."""
    sides = {"encoder": arguments.encoder, "language_model": arguments.language_model}
    options = {"eval_split": "", "transcripts": words, "per_device_train_batch_size": 8}
    aligned = train(arguments, "aligned", stages=[ALIGN], **options, **sides)
    rows = []
    for name, modes in ROWS.items():
        if name not in names:
            continue
        own = {"num_train_epochs": arguments.epochs, "projector_lr": PROJECTOR_LR} | modes
        if modes.get("llm_mode") == "qlora":  # its language model is another, in 4 bits from the start
            output = train(arguments, name, stages=[ALIGN, own], transcripts=words, **sides)
        else:
            output = train(arguments, name, stages=[own], model_name_or_path=aligned)
        rows.append({"row": name, "epochs": arguments.epochs, **read_json(output / "eval_results.json")})
    if "examples" in names:
        rows.append(measure_examples(arguments, aligned))
    return rows


def measure_examples(arguments: argparse.Namespace, aligned: Path) -> dict:
    """Returns the row of spoken examples in the prompt, which trains nothing on the task."""
    file = arguments.output_dir / f"{SHOTS}_shots.json"
    if not file.exists():
        run_recipe(
            "evaluate_audio_lm", model_name_or_path=aligned, dataset=arguments.dataset, shots=SHOTS, system="",
            max_new_tokens=80, check_silence=False, output_file=file, batch_size=8, **TASK,
        )  # fmt: skip
    scores = {f"eval_{name}": value for name, value in read_json(file).items() if name not in ("rows", "shots")}
    return {"row": f"{SHOTS} spoken examples in the prompt", **scores}


def measure_cascades(arguments: argparse.Namespace, words: Path, names: Sequence[str]) -> list[dict]:
    """Returns the rows of the cascades: the language model trained on transcripts, and slots matched in them."""
    texts = read_texts(words)
    splits = {
        split: load_conversations(arguments.dataset, split=split, system="", **TASK) for split in ("train", "test")
    }
    rows = []
    if "cascade" in names:
        chats = arguments.output_dir / "transcripts_to_slots.jsonl"
        write_text(chats, "".join(_write_chat(split, c, texts) for split, part in splits.items() for c in part))
        output = train(
            argparse.Namespace(**{**vars(arguments), "dataset": chats}), CASCADES[0],
            stages=[{**ROWS["+ LLM LoRA"], "num_train_epochs": arguments.epochs, "projector_mode": "frozen"}],
            encoder=arguments.encoder, language_model=arguments.language_model, response_column="",
        )  # fmt: skip
        results = read_json(output / "eval_results.json")
        rows.append({"row": CASCADES[0], "epochs": arguments.epochs, **results})
    if "matching" in names:
        lexicon = build_lexicon([json.loads(conversation.answer) for conversation in splits["train"]])
        test = splits["test"]
        answers = [json.dumps(match_slots(texts[c.clips[0]["path"]], lexicon)) for c in test]
        scores = score_structured(answers, [conversation.answer for conversation in test])
        rows.append({"row": CASCADES[1], **{f"eval_{name}": value for name, value in scores.items()}})
    return rows


def read_texts(words: Path) -> dict[str, str]:
    """Returns what Whisper heard in each recording, by its path."""
    rows = map(json.loads, words.read_text(encoding="utf-8").splitlines())
    return {row["audio"]: "".join(chunk["text"] for chunk in row["chunks"]).strip() for row in rows}


def _write_chat(split: str, conversation, texts: Mapping[str, str]) -> str:
    asked = f"{texts[conversation.clips[0]['path']]}\n{TASK['instruction']}"
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": conversation.answer}]
    return json.dumps({"split": split, "messages": messages}) + "\n"


def build_lexicon(answers: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """Returns slots with the values that occur in answers, the longest values first."""
    pairs = {(slot, value) for answer in answers for slot, value in answer.items()}
    return sorted(pairs, key=lambda pair: (-len(pair[1]), *pair))


def match_slots(text: str, lexicon: Sequence[tuple[str, str]]) -> dict[str, str]:
    """
    Returns the slots whose values stand in a text, word by word, the longest first; what is matched is used up.

    Figures are read as words.

    Example:

    ```python
    >>> from benchmarks.audio_lm import build_lexicon, match_slots

    >>> lexicon = build_lexicon([{"size": "medium", "roast": "medium roast"}, {"size": "twelve ounce"}])
    >>> match_slots("A 12-ounce medium roast!", lexicon)
    {'roast': 'medium roast', 'size': 'twelve ounce'}

    ```
    """
    left = f" {' '.join(NUMBERS.get(word, word) for word in normalize_text(text).split())} "
    found: dict[str, str] = {}
    for slot, value in lexicon:
        if slot not in found and f" {value} " in left:
            found[slot] = value
            left = left.replace(f" {value} ", " | ", 1)
    return found


def summarize(rows: Sequence[Mapping]) -> str:
    """Returns the table of the documentation, with the published figures below."""
    columns: dict[str, Callable[[Mapping], str]] = {
        "": lambda row: row["row"],
        "trainable": lambda row: f"{row['trainable_parameters']:,}" if "trainable_parameters" in row else "",
        "peak memory": lambda row: f"{row['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in row else "",
        "passes": lambda row: f"{row['epochs']:g}" if "epochs" in row else "",
        "minutes": lambda row: f"{row['train_runtime'] / 60:.1f}" if "train_runtime" in row else "",
        "exact match": lambda row: f"{row['eval_exact_match']:.1%}",
        "slot F1": lambda row: f"{row['eval_slot_f1']:.1%}",
        "not JSON": lambda row: str(row["eval_unparsable"]),
    }
    table = format_table([{name: cell(row) for name, cell in columns.items()} for row in rows])
    published = ", ".join(f"{name} {rate:.1%}" for name, rate in PUBLISHED.items())
    return f"{table}\n\nWhole command understood, as published, at 24 dB of noise: {published}."


def main() -> None:
    """Measures the rows that the command line names; what an earlier run has finished is not run again."""
    choices = [*ROWS, "examples", "cascade", "matching"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="Whisper, with its decoder: a folder or a Hub name.")
    parser.add_argument("--language_model", required=True, help="Causal language model: a folder or a Hub name.")
    parser.add_argument("--dataset", required=True, help="Folder of the spoken commands.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Where models and transcripts go.")
    parser.add_argument("--epochs", type=float, default=2.0, help="Passes over the orders in the second stage.")
    parser.add_argument("--rows", nargs="+", choices=choices, default=choices, help="What to measure.")
    arguments = parser.parse_args()
    words = arguments.output_dir / "words.jsonl"
    write_words(arguments.encoder, arguments.dataset, words, language="en", splits=["train", "test"])
    rows = measure_rows(arguments, words, arguments.rows) if {*ROWS, "examples"} & set(arguments.rows) else []
    rows += measure_cascades(arguments, words, arguments.rows)
    table = summarize(rows)
    print(table)
    kept = [
        {key: value for key, value in row.items() if key not in ("run", "heard", "eval_answers_read")} for row in rows
    ]
    store_result("audio_lm_barista", kept, table, source=__file__)


if __name__ == "__main__":
    main()
