"""YAMNet in TensorFlow Lite: 521 classes of AudioSet, and the 1,024 features below them.

    pip install "milonga[judges]"                    # ai-edge-litert
    model = load_yamnet(Path("yamnet.tflite"))
    model.windows(waveform_N, 22_050)                # YamnetOutput(embeddings_WD, logits_WK)

A window has 15,600 samples at 16 kHz (0.975 s). The features are an inner tensor of the file: the mean over
time and frequency before the last layer. Source: TensorFlow's model garden, ``research/audioset/yamnet``.

Shape legend: N samples, W windows, D features, K classes.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from services.audio.resampling import resample
from services.errors import MilongaError, ModelFormatError, ModelNotFoundError
from services.models.folders import one_line

SAMPLING_RATE: Final = 16_000
WINDOW: Final = 15_600
"""Samples of a window."""
HOP: Final = 3_840
"""Samples between two windows: 0.24 s, half of YAMNet's own, since events are short."""
DIMENSION: Final = 1_024
CLASSES: Final = 521
FEATURES: Final = "global_average_pooling2d/Mean"
LOGITS: Final = "dense/BiasAdd"
"""Ends of the names of inner tensors."""
EXTRA: Final = 'pip install "milonga[judges]"'

FloatMatrix = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class YamnetOutput:
    """Features and logits of a clip's windows."""

    embeddings_WD: FloatMatrix
    logits_WK: FloatMatrix

    @property
    def times_W(self) -> FloatMatrix:
        """Return the centre of each window, in seconds from the clip's start."""
        centres_W = np.arange(len(self.embeddings_WD)) * HOP + WINDOW / 2
        return (centres_W / SAMPLING_RATE).astype(np.float32)


class Yamnet:
    """YAMNet, for inference on the CPU. Not thread-safe."""

    def __init__(self, interpreter: Any, features: int, logits: int) -> None:
        self._interpreter, self._features, self._logits = interpreter, features, logits
        (given,) = interpreter.get_input_details()
        self._input, self._shape = given["index"], tuple(given["shape"])

    def windows(self, waveform_N: NDArray[np.float32], sampling_rate: int) -> YamnetOutput:
        """Return the output for a mono clip; a clip shorter than a window is padded with silence.

        The last window ends with the clip or begins less than `HOP` after the one before.
        """
        mono = resample(np.asarray(waveform_N, dtype=np.float32), sampling_rate, SAMPLING_RATE)
        missing = WINDOW - len(mono) if len(mono) < WINDOW else -(len(mono) - WINDOW) % HOP
        padded = np.pad(mono, (0, missing))
        starts = range(0, len(padded) - WINDOW + 1, HOP)
        rows = [self._window(padded[start : start + WINDOW]) for start in starts]
        features, logits = zip(*rows, strict=True)
        return YamnetOutput(np.stack(features), np.stack(logits))

    def _window(self, window_N: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        self._interpreter.set_tensor(self._input, window_N.reshape(self._shape))
        self._interpreter.invoke()
        features, logits = (self._interpreter.get_tensor(one) for one in (self._features, self._logits))
        return features.ravel().copy(), logits.ravel().copy()


def load_yamnet(path: Path) -> Yamnet:
    """Load YAMNet from a ``.tflite`` file.

    Raises `ModelNotFoundError` if there is no such file, `ModelFormatError` if it is another model,
    `MilongaError` if the extra ``judges`` is not installed.
    """
    if not path.is_file():
        raise ModelNotFoundError(f"{path} is not a file; give the path of yamnet.tflite")
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise MilongaError(f"YAMNet needs ai-edge-litert: run `{EXTRA}`") from error
    try:
        with warnings.catch_warnings():
            # It says that inner tensors cost memory, which for 135 small ones is little.
            warnings.simplefilter("ignore")
            interpreter = Interpreter(str(path), num_threads=1, experimental_preserve_all_tensors=True)
        interpreter.allocate_tensors()
        found = {one["name"]: one for one in interpreter.get_tensor_details()}
    except (ValueError, RuntimeError) as error:
        raise ModelFormatError(f"{path} is no TensorFlow Lite model: {one_line(error)}") from error
    shapes = {FEATURES: (1, DIMENSION), LOGITS: (1, CLASSES)}
    inner = [
        next(
            (
                one["index"]
                for name, one in found.items()
                if name.endswith(end) and tuple(one["shape"]) == shape
            ),
            None,
        )
        for end, shape in shapes.items()
    ]
    inputs = [tuple(one["shape"]) for one in interpreter.get_input_details()]
    features, logits = inner
    if features is None or logits is None or inputs not in ([(1, WINDOW)], [(WINDOW,)]):
        raise ModelFormatError(
            f"{path} is another model than YAMNet: it has inputs {inputs}; give the file with an input of "
            f"{WINDOW} samples"
        )
    return Yamnet(interpreter, features, logits)
