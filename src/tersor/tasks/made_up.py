"""Examples made up for models whose inputs no text gives: images and sound, drawn with a fixed seed.

Images have the spectrum of photographs (amplitude 1 / frequency; Field 1987, https://doi.org/10.1364/JOSAA.4.002379)
and are stretched to all of 0 to 255. Waves are voices of a few harmonics that rise and fall, with a little noise, at
zero mean and unit variance, as feature extractors give them. They show whether two models do the same, not how well.
"""

import numpy as np
from jaxtyping import Float, UInt8

from tersor.tasks.split import SEED

RATE = 16_000  # samples a second
SECONDS = 1.0


def images(num: int, height: int, width: int, channels: int = 3) -> UInt8[np.ndarray, "row height width channel"]:
    """Images as uint8, channels last.

    >>> images(2, 8, 8).shape
    (2, 8, 8, 3)
    """
    generator = np.random.default_rng(SEED)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1 / max(height, width)
    drawn = np.empty((num, height, width, channels), np.uint8)
    for row in range(num):
        noise = generator.standard_normal((2, channels + 1, *frequency.shape))
        spectrum = (0.8 * noise[:, :1] + 0.4 * noise[:, 1:]) / frequency  # channels of a photograph are alike
        image = np.fft.irfft2(spectrum[0] + 1j * spectrum[1], s=(height, width))
        low, high = image.min(), image.max()
        drawn[row] = np.rint(255 * (image - low) / max(high - low, 1e-12)).transpose(1, 2, 0)
    return drawn


def waves(num: int, samples: int = int(RATE * SECONDS)) -> Float[np.ndarray, "row sample"]:
    """Sound of zero mean and unit variance, float32."""
    generator = np.random.default_rng(SEED)
    time = np.arange(samples) / RATE
    pitch = generator.uniform(80, 400, (num, 1)) * (
        1 + 0.05 * np.sin(2 * np.pi * generator.uniform(1, 6, (num, 1)) * time)
    )
    phase = 2 * np.pi * np.cumsum(pitch, 1) / RATE
    sound = sum(generator.uniform(0, 1, (num, 1)) / k * np.sin(k * phase) for k in range(1, 9))
    envelope = np.abs(np.sin(np.pi * generator.uniform(1, 4, (num, 1)) * time + generator.uniform(0, 3, (num, 1))))
    sound = sound * envelope + 0.02 * generator.standard_normal((num, samples))
    sound -= sound.mean(1, keepdims=True)
    return (sound / sound.std(1, keepdims=True)).astype(np.float32)


def spectrograms(num: int, frames: int, bands: int) -> Float[np.ndarray, "row frame band"]:
    """Log spectra of zero mean and unit variance that change slowly, float32."""
    drawn = images(num, frames, bands, 1)[..., 0].astype(np.float32)
    drawn -= drawn.mean((1, 2), keepdims=True)
    return drawn / np.maximum(drawn.std((1, 2), keepdims=True), 1e-6)
