"""Pictures of what a vibrometer hears: the spectrograms of a recording and of its simulation.

python -m publishing.ldv_pictures speech.wav glass.wav pair.png
"""

import argparse
from pathlib import Path

import numpy as np
import scipy.signal
from matplotlib.figure import Figure

from data.audio import SAMPLING_RATE, read_audio
from publishing.pictures import save_figure

WINDOW_SECONDS = 0.025  # of the spectrograms
FLOOR_DB = -70  # below the loudest point


def draw_pair(path: str | Path, samples: np.ndarray, heard: np.ndarray, sampling_rate: int) -> None:
    """
    Draws the spectrograms of a recording and of what the vibrometer hears into a PNG file, whole.

    Args:
        path: The picture.
        samples: `(samples,)` from the microphone.
        heard: `(samples,)` from the vibrometer.
        sampling_rate: Of both in Hz.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    panels = figure.subplots(2, sharex=True, sharey=True)
    window_samples = round(WINDOW_SECONDS * sampling_rate)
    for axes, signal, title in zip(panels, (samples, heard), ("microphone", "vibrometer"), strict=True):
        frequencies, seconds, power = scipy.signal.spectrogram(
            signal, sampling_rate, nperseg=window_samples, noverlap=window_samples // 2
        )
        decibels = 10 * np.log10(power / power.max() + 10 ** (FLOOR_DB / 10))
        mesh = axes.pcolormesh(seconds, frequencies / 1000, decibels, cmap="magma", vmin=FLOOR_DB, vmax=0)
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_ylabel("kHz")
    panels[-1].set_xlabel("seconds")
    figure.colorbar(mesh, ax=panels, label="dB below the loudest")
    save_figure(figure, path)


def main(arguments: list[str] | None = None) -> None:
    """Draws the two recordings named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m publishing.ldv_pictures", allow_abbrev=False)
    parser.add_argument("recording", help="What a microphone recorded.")
    parser.add_argument("heard", help="What the vibrometer heard, from `python -m data.ldv`.")
    parser.add_argument("picture", type=Path, help="The .png to write.")
    options = parser.parse_args(arguments)
    if options.picture.suffix != ".png":
        parser.error(f"`{options.picture}` must end in .png.")
    try:
        clips = [read_audio(path) for path in (options.recording, options.heard)]
    except ValueError as error:
        parser.error(str(error))
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    draw_pair(options.picture, *clips, SAMPLING_RATE)


if __name__ == "__main__":
    main()
