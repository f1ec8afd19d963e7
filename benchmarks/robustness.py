"""Word error rate of bases and adapters on the same test clips as recorded and as they could have been.

    python -m benchmarks.robustness --dataset fsdd --output_dir outputs/personalization
    python -m benchmarks.robustness --dataset synthetic --output_dir outputs/demo

Real digits: each speaker's base, trained without that speaker, alone and with the speaker's adapter from 60 seconds;
trained here if `benchmarks.personalization` has not left them. The embedded corpus: the base of `make demo` on its own
ordinary voices, and with the adapters on the unusual ones. No condition is one of training.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np

from benchmarks.personalization import train_adapter, train_base
from benchmarks.recording_conditions import Condition, list_conditions
from benchmarks.results_file import RESULTS_FOLDER, store_result
from data.augmentation import split_clip
from data.corpora import load_corpus
from data.speakers import select_speakers
from data.synthesis import ORDINARY_VOICES, UNUSUAL_VOICES
from data.utterances import UtteranceDataset, decode_clips
from inference.decoding import load_recognizer
from inference.scoring import evaluate_dataset
from publishing.report import format_table

ADAPTER_SECONDS = 60
MOST_JOINED = 4  # digits in an utterance, as in training
SEED = 7


@dataclass(frozen=True)
class Listener:
    """
    A base, alone or with an adapter, and whom it hears.

    Args:
        name: Its column in the table.
        base: Folder of the base.
        adapter: Folder of the adapter.
        speakers: Whose test clips it hears.
    """

    name: str
    base: Path
    adapter: Path | None
    speakers: tuple[str, ...]


class RecordedUtterances(UtteranceDataset):
    """Utterances as they would have been recorded in `condition`; an utterance has one draw for all conditions."""

    condition: Condition

    def hear(self, index: int, generator: np.random.Generator) -> np.ndarray:
        """Returns the samples `(samples,)` of one utterance."""
        clips = [self.clips[row]["samples"] for row in self.groups[index]]
        if len(clips) == 1 and " " in self.references[index]:
            clips = split_clip(clips[0])  # a pause in the middle is one between words
        return self.condition(clips, generator)


def list_listeners(dataset: str, folder: Path) -> list[Listener]:
    """Returns who hears the corpus; trains the bases and adapters of real speakers that are not in `folder`."""
    if dataset == "synthetic":
        ordinary = tuple(voice.speaker_id for voice in ORDINARY_VOICES)
        unusual = [voice.speaker_id for voice in UNUSUAL_VOICES]
        adapted = [
            Listener("adapters, unusual voices", folder / "base", folder / speaker, (speaker,)) for speaker in unusual
        ]
        return [Listener("base, ordinary voices", folder / "base", None, ordinary), *adapted]
    speakers = sorted(set(load_corpus(dataset, split="test")["speaker_id"]))
    listeners = []
    for speaker in speakers:
        base = train_base(dataset, speaker, folder)
        others = [other for other in speakers if other != speaker]
        adapter = train_adapter(dataset, speaker, others, folder, seconds=ADAPTER_SECONDS)
        listeners += [Listener("base", base, None, (speaker,)), Listener("adapter, 60 s", base, adapter, (speaker,))]
    return listeners


def measure(listener: Listener, dataset: str, conditions: dict[str, Condition]) -> list[dict]:
    """Returns one row a condition, with the listener's scores on the test clips of its speakers."""
    adapters = {"adapter": str(listener.adapter)} if listener.adapter else None
    model, processor = load_recognizer(str(listener.base), adapters)
    corpus = load_corpus(dataset, split="test", required_columns=("audio", "text", "speaker_id"))
    corpus = select_speakers(corpus, list(listener.speakers))
    most_joined = 1 if dataset == "synthetic" else MOST_JOINED
    options = {"is_joined": most_joined > 1, "is_evaluation": True}
    clips = decode_clips(corpus, processor, samples_per_logit=model.config.inputs_to_logits_ratio, **options)
    utterances = RecordedUtterances(clips, processor, concatenate=(1, most_joined), seed=SEED)
    rows = []
    for name, condition in conditions.items():
        utterances.condition = condition
        scores = evaluate_dataset(model, processor, utterances, batch_size=32)["overall"]
        rows.append(
            {
                "listener": listener.name,
                "speakers": listener.speakers,
                "condition": name,
                "wer": scores["wer"],
                "words": scores["words"],
            }
        )
    return rows


def summarize(rows: Sequence[dict]) -> str:
    """Returns the table: a line a condition, a column a kind of listener: its mean WER, and points above the first."""
    listeners = list(dict.fromkeys(row["listener"] for row in rows))
    plain = rows[0]["condition"]

    def average(listener: str, condition: str) -> float:
        return mean(row["wer"] for row in rows if (row["listener"], row["condition"]) == (listener, condition))

    lines = []
    for condition in dict.fromkeys(row["condition"] for row in rows):
        line = {"condition": condition}
        for listener in listeners:
            wer, change = average(listener, condition), average(listener, condition) - average(listener, plain)
            line[f"WER, {listener}"] = f"{wer:.1%}" if condition == plain else f"{wer:.1%} ({100 * change:+.1f})"
        lines.append(line)
    return format_table(lines)


def main(arguments: Sequence[str] | None = None, *, results_folder: str | Path = RESULTS_FOLDER) -> None:
    """Runs the benchmark; what an earlier run has trained is not trained again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="synthetic, or a folder of `python -m data.prepare_fsdd`.")
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="Where bases and adapters are, as of make demo, or go."
    )
    options = parser.parse_args(arguments)
    conditions = list_conditions()
    rows = []
    for listener in list_listeners(options.dataset, options.output_dir):
        rows += measure(listener, options.dataset, conditions)
    table = summarize(rows)
    print(table)
    name = "synthetic" if options.dataset == "synthetic" else "fsdd"
    store_result(f"robustness_{name}", rows, table, source=__file__, folder=results_folder)


if __name__ == "__main__":
    main()
