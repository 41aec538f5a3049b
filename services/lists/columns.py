"""Names of columns, by preference: the first that a row has is used."""

from typing import Final

PROMPT_NAMES: Final = ("prompt", "captions", "caption", "text", "prompt_text", "target")
"""Captions; each also numbered: ``caption_1``. TTA-Bench has `prompt_text`."""

AUDIO_NAMES: Final = (
    "audio", "location", "audio_path", "path", "wav", "file", "file_name", "filename", "source", "chosen",
)  # fmt: skip
"""Clips. AudioCaps has `caption`, Tango `location` and `captions`, WavCaps `audio` and `caption`, Clotho
`file_name`, SLAM-AAC `source` and `target`, Audio-alpaca `chosen`."""

CLASS_NAMES: Final = ("class", "category", "label", "class_name")
"""Classes of clips, which give captions where there are none. ESC-50 has `category`."""

SOURCE_NAMES: Final = (
    "recording", "recording_id", "source", "source_id", "freesound_id", "fsid", "src_file", "youtube_id",
    "sound_id",
)  # fmt: skip
"""The recording that a clip is a piece of."""

FOLD_NAMES: Final = ("fold", "split", "subset", "partition")
"""The part of the data set that a clip belongs to."""
