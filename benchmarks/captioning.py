"""Speed and memory of a captioner: alone and in batches, stage by stage, beam size by beam size.

    python -m benchmarks.captioning [--model URI | --random base|released] [--clips 16] [--tokens 20]
        [--beams 2 3 4 5 6 7 8] [--rounds 3] [--threads N] [--processor-time] [--device auto]
        [--dtype float32] [--output FILE]

``--model`` is a captioner, the embedded one unless given. Its clips are scenes of the sound world of 5.12 s,
and a caption ends by itself, after ``--tokens`` at most.

``--random base`` has random weights of EAT-base and of a language model with 134M parameters,
``--random released`` of SLAM-AAC's sizes (EAT-base and Vicuna-7B: a GPU with 20 GiB, ``--dtype float16``).
Their clips are noise of 10.24 s, and random weights end no sentence: each caption has ``--tokens`` tokens.

Each comparison is a ratio within one run: what is compared takes turns. On a machine that others use too,
``--processor-time`` with ``--threads 1`` measures the processor's seconds instead of the clock's.
"""

import argparse
import json
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.measuring import machine, memory_mib, write_report
from services.models.captioner.config import PROMPT, CaptionerConfig
from services.models.captioner.eat import EatConfig, EatEncoder
from services.models.captioner.filterbank import SAMPLING_RATE
from services.models.captioner.model import CaptionClip, Captioner, make_projector
from services.models.folders import pick_device, pick_dtype
from services.weights.uri import ModelURI, resolve
from training.soundworld.scenes import SceneConfig, make_scene

SIZES: Final[dict[str, dict[str, int]]] = {
    "base": {
        "hidden_size": 768,
        "intermediate_size": 2_048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "released": {
        "hidden_size": 4_096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
}
"""Language models by `--random`; ``released`` is Vicuna-7B."""


def random_captioner(size: str, device: str, dtype: str) -> Captioner:
    """Return a captioner of random weights, made on the device."""
    words = ["<unk>", "<s>", "</s>", *dict.fromkeys(PROMPT.replace(":", " :").split())]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    config, encoder = CaptionerConfig(), EatConfig()
    kind = pick_dtype("dtype", dtype)
    with torch.device(pick_device(device)):
        eat, projector = EatEncoder(encoder), make_projector(config, encoder, SIZES[size]["hidden_size"])
        default = torch.get_default_dtype()
        torch.set_default_dtype(kind)
        try:
            llm = LlamaForCausalLM(LlamaConfig(vocab_size=32_000, **SIZES[size]))
        finally:
            torch.set_default_dtype(default)
    captioner = Captioner(eat, projector, llm, fast, config)
    return captioner.to(pick_device(device)).eval().requires_grad_(False)


def load(arguments: argparse.Namespace) -> Captioner:
    """Return the captioner to measure."""
    if arguments.random:
        return random_captioner(arguments.random, arguments.device, arguments.dtype)
    folder = resolve(ModelURI.parse(arguments.model)).folder
    return Captioner.from_pretrained(folder, device=arguments.device, dtype=arguments.dtype)


def noise(count: int, seconds: float) -> list[NDArray[np.float32]]:
    """Return clips of noise [N]."""
    rng, samples = np.random.default_rng(0), int(seconds * SAMPLING_RATE)
    return [(0.1 * rng.standard_normal(samples)).astype(np.float32) for _ in range(count)]


def scenes(count: int) -> list[NDArray[np.float32]]:
    """Return scenes of the sound world [N]."""
    config = SceneConfig(duration=5.12, single=0.15, sequence=0.6, three=0.5, split="validation")
    return [make_scene(0, index, config).waveform for index in range(count)]


class Measurements:
    """What is measured of one captioner."""

    def __init__(self, captioner: Captioner, arguments: argparse.Namespace) -> None:
        self.captioner, self.tokens, self.rounds = captioner, arguments.tokens, arguments.rounds
        self.beams = tuple(arguments.beams)
        self.clock = time.process_time if arguments.processor_time else time.perf_counter
        sounds = (
            noise(arguments.clips, captioner.max_seconds) if arguments.random else scenes(arguments.clips)
        )
        self.clips: list[CaptionClip] = [captioner.prepare(one, SAMPLING_RATE) for one in sounds]

    def batching(self) -> dict[str, Any]:
        """Captions a second of all clips at once, and of one clip after the other, with 4 beams."""
        count = len(self.clips)
        together, alone = self._turns(
            lambda: self._caption(self.clips, (4,)),
            lambda: [self._caption([clip], (4,)) for clip in self.clips],
        )
        return {
            "clips": count,
            "one_at_a_time_captions_a_second": count / alone,
            "batched_captions_a_second": count / together,
            "ratio": alone / together,
        }

    def stages(self) -> dict[str, Any]:
        """Time of one clip by stage, with all beam sizes."""
        clip, beams = self.clips[:1], self.beams
        audio = self.captioner.encode(clip)
        encode, prefill, generate = self._turns(
            lambda: self.captioner.encode(clip),
            lambda: self._search(audio, beams, tokens=1),
            lambda: self._search(audio, beams),
        )
        total = encode + generate
        return {
            "seconds": total,
            "encode": encode / total,
            "prefill": prefill / total,
            "decode": (generate - prefill) / total,
        }

    def beam_sizes(self) -> dict[str, Any]:
        """Seconds of one clip's search: all beam sizes in one pass, one by one, and by transformers."""
        beams = self.beams
        audio = self.captioner.encode(self.clips[:1])
        together, apart, library = self._turns(
            lambda: self._search(audio, beams),
            lambda: [self._search(audio, (size,)) for size in beams],
            lambda: [self._generate(audio, size) for size in beams],
        )
        return {
            "beams": list(beams),
            "one_pass_seconds": together,
            "one_by_one_seconds": apart,
            "transformers_one_by_one_seconds": library,
            "one_by_one_over_one_pass": apart / together,
            "transformers_over_one_pass": library / together,
        }

    def _caption(self, clips: list[CaptionClip], beams: tuple[int, ...]) -> object:
        return self._search(self.captioner.encode(clips), beams)

    def _search(self, audio: torch.Tensor, beams: tuple[int, ...], tokens: int | None = None) -> object:
        return self.captioner.generate(audio, beams=beams, max_new_tokens=tokens or self.tokens)

    def _generate(self, audio: torch.Tensor, size: int) -> object:
        return self.captioner.language_model.generate(
            inputs_embeds=self.captioner.prompts(audio),
            num_beams=size,
            do_sample=False,
            max_new_tokens=self.tokens,
            eos_token_id=self.captioner.tokenizer.eos_token_id,
            pad_token_id=self.captioner.tokenizer.pad_token_id,
        )

    def _turns(self, *acts: Callable[[], object]) -> list[float]:
        """Return the median seconds of each act; each has a turn per round, after one that does not count."""
        for act in acts:
            self._timed(act)
        rounds = [[self._timed(act) for act in acts] for _ in range(self.rounds)]
        return [median(times) for times in zip(*rounds, strict=True)]

    def _timed(self, act: Callable[[], object]) -> float:
        start = self.clock()
        with torch.inference_mode():
            act()
        if self.captioner.device.type == "cuda":
            torch.cuda.synchronize()
        return self.clock() - start


def memory(captioner: Captioner) -> dict[str, float]:
    """Return the memory of the process, and of the GPU, in MiB."""
    found = memory_mib()
    if captioner.device.type == "cuda":
        found["gpu_peak"] = torch.cuda.max_memory_allocated() / 2**20
    return {key: round(value) for key, value in found.items()}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the report."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    before = memory_mib()["VmRSS"]
    captioner = load(arguments)
    loaded = memory(captioner)
    measurements = Measurements(captioner, arguments)
    return {
        "date": date.today().isoformat(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "clock": "processor" if arguments.processor_time else "wall",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "model": arguments.random or arguments.model,
        "dtype": arguments.dtype,
        "parameters_millions": {
            "encoder": _millions(captioner.encoder),
            "projector": _millions(captioner.projector),
            "language_model": _millions(captioner.language_model),
        },
        "tokens": arguments.tokens,
        "batching": measurements.batching(),
        "stages": measurements.stages(),
        "beam_sizes": measurements.beam_sizes(),
        "memory_mib": {
            "before_loading": round(before),
            "loaded": loaded["VmRSS"],
            **{key: value for key, value in memory(captioner).items() if key != "VmRSS"},
        },
    }


def _millions(part: torch.nn.Module) -> float:
    return round(sum(parameter.numel() for parameter in part.parameters()) / 1e6, 2)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="mini:captioner")
    parser.add_argument("--random", choices=sorted(SIZES))
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--beams", type=int, nargs="+", default=[2, 3, 4, 5, 6, 7, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path)
    return parser.parse_args(words)


def main() -> None:
    """Measure, print and write the report."""
    arguments = parse()
    report = measure(arguments)
    print(json.dumps(report, indent=2))
    if arguments.output:
        write_report(arguments.output, report)


if __name__ == "__main__":
    main()
