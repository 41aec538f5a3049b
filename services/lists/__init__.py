"""Lists of prompts, captions and clips: one reader for every command."""

from services.lists.captions import caption_fault
from services.lists.classes import class_captions, class_phrase
from services.lists.clips import AUDIO_SUFFIXES, EmbeddedClip, find_audio
from services.lists.columns import AUDIO_NAMES, CLASS_NAMES, FOLD_NAMES, PROMPT_NAMES, SOURCE_NAMES
from services.lists.entries import Entry, find_clip, read_list, shortened
from services.lists.rows import STANDARD_INPUT, check_text_column, unreadable
from services.lists.wordings import Wordings, read_wordings

__all__ = [
    "AUDIO_NAMES", "AUDIO_SUFFIXES", "CLASS_NAMES", "FOLD_NAMES", "PROMPT_NAMES", "SOURCE_NAMES",
    "STANDARD_INPUT", "EmbeddedClip", "Entry", "Wordings", "caption_fault", "check_text_column",
    "class_captions", "class_phrase", "find_audio", "find_clip", "read_list", "read_wordings", "shortened",
    "unreadable",
]  # fmt: skip
