"""Speech units: every 20 ms of speech as the nearest of k centroids in the states of an encoder's layer.

Any encoder of transformers serves (HuBERT, Wav2Vec2, WavLM, Whisper, this project's own), or log-mel energies alone,
for which no model is needed. The centroids come from scikit-learn's mini-batch k-means, as fairseq's do.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors.torch import load_file, save_file
from sklearn.cluster import MiniBatchKMeans
from transformers import AutoFeatureExtractor, AutoModel

from data.audio import SAMPLING_RATE
from modeling import DeepSpeech2FeatureExtractor
from modeling.files import find_whole, write_whole

LOG_MEL = "log_mel"  # the encoder that is none
HOP_SAMPLES = 320  # 20 ms at 16 kHz, of log-mel energies and of most encoders
PROBE_SAMPLES = 10 * SAMPLING_RATE
HOP_STEP = 80  # hops are multiples of 5 ms
# K-means as in fairseq's recipe.
BATCH_FRAMES = 10_000
NUM_STARTS = 5
CENTROIDS_NAME, SETTINGS_NAME = "centroids.safetensors", "unit_settings.json"


@dataclass(frozen=True)
class UnitSettings:
    """
    What units are made of.

    Args:
        encoder: "log_mel", or a model's folder or Hub name.
        layer: Of the encoder's hidden states, 0 its input; None for log-mel energies.
        hop_samples: Samples at 16 kHz from one unit to the next.
        num_units: Number of units.
    """

    encoder: str
    layer: int | None
    hop_samples: int
    num_units: int


class LogMelEncoder:
    """Log-mel energies of 40 ms windows, one each 20 ms."""

    hop_samples = HOP_SAMPLES
    max_samples = None

    def __init__(self):
        self._extractor = DeepSpeech2FeatureExtractor(
            feature_size=80, hop_length=HOP_SAMPLES, win_length=2 * HOP_SAMPLES, n_fft=1024
        )

    def __call__(self, samples: np.ndarray) -> torch.Tensor:
        """Returns frames `(frames, 80)` of `samples` `(samples,)`."""
        return self._extractor.log_mel(samples)


class LayerEncoder:
    """
    States of one layer of a model of transformers; of an encoder-decoder, of its encoder.

    Each clip runs alone: models whose first layer normalises over the padded length would else give it other units in
    another batch.

    Args:
        name: Folder or Hub name.
        layer: Of `hidden_states`, 0 the first layer's input.
        device: Where the model runs.

    Raises:
        ValueError: The model has no such layer, or its features are of another sampling rate.
    """

    def __init__(self, name: str, layer: int, *, device: str | torch.device = "cpu"):
        self._extractor = AutoFeatureExtractor.from_pretrained(name, trust_remote_code=False)
        model = AutoModel.from_pretrained(name, trust_remote_code=False).eval().to(device)
        self._model = model.get_encoder() if model.config.is_encoder_decoder else model
        if self._extractor.sampling_rate != SAMPLING_RATE:
            raise ValueError(
                f"`encoder` must hear {SAMPLING_RATE} Hz, got {name}, which hears {self._extractor.sampling_rate} Hz. "
                "Choose another one."
            )
        self._layer, self._is_padded = 0, model.config.model_type == "whisper"
        # Whisper hears 30 s, however little of them is speech.
        self.max_samples = self._extractor.n_samples if self._is_padded else None
        states = self._run(np.zeros(PROBE_SAMPLES, np.float32))
        if not 0 <= layer < len(states):
            raise ValueError(
                f"`layer` must be from 0 to {len(states) - 1} of {name}, got {layer}. Choose one between."
            )
        self._layer = layer
        heard = self.max_samples or PROBE_SAMPLES
        self.hop_samples = round(heard / states[layer].shape[1] / HOP_STEP) * HOP_STEP

    @torch.inference_mode()
    def _run(self, samples: np.ndarray) -> tuple[torch.Tensor, ...]:
        inputs = self._extractor(samples, sampling_rate=SAMPLING_RATE, return_tensors="pt")
        inputs = {
            key: value.to(self._model.device) for key, value in inputs.items() if key == self._model.main_input_name
        }
        return self._model(**inputs, output_hidden_states=True).hidden_states

    def __call__(self, samples: np.ndarray) -> torch.Tensor:
        """Returns frames `(frames, hidden)` of `samples` `(samples,)`."""
        states = self._run(samples)[self._layer][0].float().cpu()
        return states[: -(-len(samples) // self.hop_samples)] if self._is_padded else states


def load_unit_encoder(
    encoder: str, layer: int | None, *, device: str | torch.device = "cpu"
) -> LogMelEncoder | LayerEncoder:
    """
    Returns what turns samples into frames.

    Raises:
        ValueError: A layer is given for log-mel energies, or none for a model; or as [`LayerEncoder`].
    """
    if (encoder == LOG_MEL) != (layer is None):
        rule = f"be left out for {LOG_MEL}" if encoder == LOG_MEL else f"be given for {encoder}"
        raise ValueError(f"`layer` must {rule}, got {layer}. Models have layers, energies do not.")
    return LogMelEncoder() if encoder == LOG_MEL else LayerEncoder(encoder, layer, device=device)


class UnitExtractor:
    """
    Turns speech into units.

    Args:
        settings: What the units are made of.
        centroids: `(units, width)`.
        encoder: From [`load_unit_encoder`]; default: loaded as `settings` say.
        device: Where a model runs.

    Example:

    ```python
    >>> import numpy as np
    >>> from inference.speech_units import UnitExtractor

    >>> noise = np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    >>> extractor = UnitExtractor.fit([noise], num_units=4)
    >>> extractor(noise).shape
    (51,)

    ```
    """

    def __init__(
        self,
        settings: UnitSettings,
        centroids: torch.Tensor,
        *,
        encoder: LogMelEncoder | LayerEncoder | None = None,
        device: str | torch.device = "cpu",
    ):
        self.settings, self.centroids = settings, centroids.float()
        self.encoder = encoder or load_unit_encoder(settings.encoder, settings.layer, device=device)

    @classmethod
    def fit(
        cls,
        clips: Iterable[np.ndarray],
        *,
        num_units: int,
        encoder: str = LOG_MEL,
        layer: int | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> "UnitExtractor":
        """
        Finds the centroids of what is heard in `clips`.

        Args:
            clips: Samples `(samples,)` at 16 kHz each; all their frames are in memory together.
            num_units: How many centroids.
            encoder: "log_mel" or a model.
            layer: Of a model.
            seed: Of the first centroids and of the order of frames.
            device: Where a model runs.

        Raises:
            ValueError: There are fewer frames than units.
        """
        encoder_model = load_unit_encoder(encoder, layer, device=device)
        parts = [encoder_model(samples).numpy() for samples in clips]
        num_frames = sum(map(len, parts))
        if not 1 <= num_units <= num_frames:
            raise ValueError(
                f"`num_units` must be from 1 to {num_frames}, the frames of the clips, got {num_units}. Give more "
                "clips."
            )
        kmeans = MiniBatchKMeans(
            num_units, batch_size=BATCH_FRAMES, n_init=NUM_STARTS, reassignment_ratio=0.0, random_state=seed
        )
        kmeans.fit(np.concatenate(parts))
        settings = UnitSettings(encoder, layer, encoder_model.hop_samples, num_units)
        return cls(settings, torch.from_numpy(kmeans.cluster_centers_).float(), encoder=encoder_model)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> "UnitExtractor":
        """
        Loads what `save_pretrained` wrote.

        Raises:
            ValueError: The folder holds no units, or other centroids than it says.
        """
        path = find_whole(folder, SETTINGS_NAME)
        if not path.is_file():
            raise ValueError(f"`units` must be a folder of extract_units.py, got {folder} without {SETTINGS_NAME}.")
        stored = json.loads(path.read_text(encoding="utf-8"))
        fingerprint = stored.pop("fingerprint", None)
        centroids = load_file(find_whole(folder, CENTROIDS_NAME))["centroids"]
        extractor = cls(UnitSettings(**stored), centroids, device=device)
        if extractor.fingerprint != fingerprint:
            raise ValueError(
                f"`units` must hold the centroids of fingerprint {fingerprint}, got {extractor.fingerprint} in "
                f"{folder}. Extract the units again."
            )
        return extractor

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes centroids and settings."""
        with write_whole(folder) as scratch:
            self.write(scratch)

    def write(self, folder: Path) -> None:
        """Writes centroids and settings into a folder that is being written."""
        save_file({"centroids": self.centroids.contiguous()}, folder / CENTROIDS_NAME)
        stored = {**asdict(self.settings), "fingerprint": self.fingerprint}
        (folder / SETTINGS_NAME).write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over the centroids: where they differ, the same unit means another sound."""
        return xxhash.xxh3_64_hexdigest(self.centroids.contiguous().numpy().tobytes())

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """
        Returns the unit of every frame `(frames,)` of `samples` `(samples,)` at 16 kHz.

        Raises:
            ValueError: The clip is longer than the encoder hears.
        """
        longest = self.encoder.max_samples
        if longest and len(samples) > longest:
            raise ValueError(
                f"A clip must have at most {longest / SAMPLING_RATE:g} s for {self.settings.encoder}, got "
                f"{len(samples) / SAMPLING_RATE:.1f} s. Cut it."
            )
        return torch.cdist(self.encoder(samples), self.centroids).argmin(-1).numpy()


def reduce_units(units: Sequence[int]) -> tuple[list[int], list[int]]:
    """
    Returns units without consecutive repeats, and how many frames each lasts.

    Example:
        >>> reduce_units([7, 7, 7, 2, 7])
        ([7, 2, 7], [3, 1, 1])
    """
    runs = [(int(unit), len(list(run))) for unit, run in groupby(units)]
    return [unit for unit, _ in runs], [num_frames for _, num_frames in runs]
