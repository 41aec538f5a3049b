"""An instruction model of transformers in this process, for whoever has no endpoint.

--set llm.folder=qwen2.5-3b-instruct --set llm.structured=none
"""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from services.errors import ModelFormatError, ModelNotFoundError
from services.models.folders import one_line, pick_device
from services.models.state_dicts import quiet_loading

_MAX_NEW_TOKENS: Final = 1_024


class LocalChat:
    """Answers messages. Thread-safe: answers are written one at a time."""

    def __init__(self, folder: Path, device: str = "auto") -> None:
        """Load the model and its tokenizer; no code of the folder runs.

        Raises:
            ModelNotFoundError: there is no such folder.
            ModelFormatError: it is no causal language model with a chat template.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if not folder.is_dir():
            raise ModelNotFoundError(f"{folder} is not a folder; it must hold an instruction model")
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            with quiet_loading():
                self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, **options)
                self._model: Any = AutoModelForCausalLM.from_pretrained(
                    folder, dtype="auto", use_safetensors=True, **options
                )
        except Exception as error:  # any exception of the library means that the folder is invalid
            raise ModelFormatError(f"{folder} can't be loaded: {one_line(error)}") from error
        if not self._tokenizer.chat_template:
            raise ModelFormatError(f"{folder} has no chat template; give an instruction model")
        self._model.to(pick_device(device)).eval()
        self._lock = threading.Lock()

    def answer(self, messages: Sequence[Mapping[str, str]], temperature: float, seed: int) -> str:
        """Return the answer to `messages`; the same seed gives the same."""
        with self._lock, torch.inference_mode(), torch.random.fork_rng():
            inputs = self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).to(self._model.device)
            torch.manual_seed(seed)
            sampling = (
                {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
            )
            output = self._model.generate(**inputs, max_new_tokens=_MAX_NEW_TOKENS, **sampling)
            text: str = self._tokenizer.decode(
                output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
        return text
