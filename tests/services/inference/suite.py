"""What any server of our models must do through the Open Inference Protocol: ours, and a real Triton.

Run against ours by `tests/services/inference/test_suite.py`, against Triton by `tests/triton/test_suite.py`:
each has a fixture `served`. The models are the embedded ones, and generation has the settings `EXACT`.
Shapes: n rows.
"""

import asyncio
import queue
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from numpy.typing import NDArray

from services.models.manifest import read_manifest
from services.models.mini import mini_folder
from tests.services.audio.sounds import file_of, tone
from tests.services.inference.asking import parameters, refusal, tensor

PROMPTS = ["a dog barks then a siren wails", "a bell rings"]
TONES = [tone(0.5), tone(0.5, hertz=880.0)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Addresses:
    """Which server answers for which model."""

    models: Mapping[str, str]
    is_triton: bool = False

    @property
    def tango(self) -> str:
        return self.models["tango"]

    @property
    def clap(self) -> str:
        return self.models["clap"]


def inputs(prompts: list[Any], **tensors: tuple[str, Any]) -> list[triton.InferInput]:
    """Of tango, with as few steps as will do."""
    given = {"NUM_INFERENCE_STEPS": ("INT32", [4]), "DURATION": ("FP32", [0.64]), **tensors}
    return [
        tensor("PROMPT", "BYTES", prompts),
        *(tensor(name, datatype, values) for name, (datatype, values) in given.items()),
    ]


def pairs(prompts: list[Any], audio: Any, rate: int | None = 16_000) -> list[triton.InferInput]:
    """Of clap and reward: samples."""
    column = np.array(prompts, dtype=object).reshape(-1, 1)
    made = [tensor("PROMPT", "BYTES", column), tensor("AUDIO", "FP32", audio)]
    return made if rate is None else [*made, tensor("SAMPLE_RATE", "INT32", [[rate]] * len(prompts))]


def sounds(audio: Any, rate: int | None = 16_000) -> list[triton.InferInput]:
    """Of caption: samples."""
    return pairs([""] * len(audio), audio, rate)[1:]


class Stream:
    """A stream of tritonclient's sync client, on a connection of its own."""

    def __init__(self, address: str) -> None:
        self.client = triton.InferenceServerClient(address)
        self.answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self.under_way = False
        # With the status of an error, where there is one.
        self.client.start_stream(
            lambda result, error: self.answers.put((result, error)), headers={"triton_grpc_error": "true"}
        )

    def ask(self, inputs: list[Any], model: str = "tango", **options: Any) -> None:
        self.under_way = True
        self.client.async_stream_infer(model, inputs, **options)

    def get(self) -> Any:
        result, error = self.answers.get(timeout=120)
        if error is not None:
            self.under_way = False
            raise error
        self.under_way = not parameters(result)["triton_final_response"]
        return result

    def all(self) -> list[Any]:
        """Every answer to the one request."""
        results = [self.get()]
        while self.under_way:
            results.append(self.get())
        return results

    def close(self) -> None:
        # Where Triton 2.51 has refused a request itself, a stream that is cancelled keeps the model loaded.
        self.client.stop_stream(cancel_requests=self.under_way)
        self.client.close()


@contextmanager
def stream(address: str) -> Iterator[Stream]:
    """A stream that is left in the end, whatever is under way."""
    opened = Stream(address)
    try:
        yield opened
    finally:
        opened.close()


def clips_of(results: list[Any]) -> dict[int, NDArray[np.float32]]:
    """[N] each: the clips among the answers, by row."""
    clips = [one for one in results if one.as_numpy("AUDIO") is not None]
    return {int(one.as_numpy("ROW")[0]): one.as_numpy("AUDIO")[0] for one in clips}


def clip(address: str, prompt: str, **tensors: tuple[str, Any]) -> NDArray[np.float32]:
    """[N]: the clip of one prompt."""
    with stream(address) as opened:
        opened.ask(inputs([prompt], **tensors))
        return clips_of(opened.all())[0]


def digest(name: str) -> str:
    """Of an embedded model."""
    return read_manifest(mini_folder(name)).digest


EMBEDDED: Final = {
    "tango": "mini",
    "clap": "clap-a",
    "reward": "reward",
    "caption": "captioner",
    "explain": "mini",
}
"""Embedded weights by model."""


def version(model: str) -> str:
    """Of the embedded weights of a model."""
    return read_manifest(mini_folder(EMBEDDED[model])).version


SOUND: list[tuple[str, str, list[int]]] = [
    ("PROMPT", "BYTES", [-1, 1]),
    ("AUDIO", "FP32", [-1, -1]),
    ("SAMPLE_RATE", "INT32", [-1, 1]),
    ("ENCODED_AUDIO", "BYTES", [-1, 1]),
]
OPTIONAL = ["AUDIO", "SAMPLE_RATE", "ENCODED_AUDIO"]
DESCRIBED: dict[str, tuple[Any, ...]] = {
    "clap": (
        *(SOUND, [("SCORE", "FP32", [-1, 2]), ("READABLE", "BOOL", [-1, 2]), ("DIGEST", "BYTES", [-1, 2])]),
        *(OPTIONAL, 64, False),
    ),
    "reward": (
        SOUND,
        [
            ("REWARD", "FP32", [-1, 1]),
            ("PROBABILITY", "FP32", [-1, 1]),
            ("READABLE", "BOOL", [-1, 1]),
            ("DIGEST", "BYTES", [-1, 1]),
        ],
        *(OPTIONAL, 64, False),
    ),
    "caption": (
        SOUND[1:],
        [
            ("CAPTION", "BYTES", [-1, 1]),
            ("CANDIDATES", "BYTES", [-1, -1]),
            ("SCORES", "FP32", [-1, -1]),
            ("DIGEST", "BYTES", [-1, 1]),
        ],
        *(OPTIONAL, 64, False),
    ),
    "explain": (
        [
            ("PROMPT", "BYTES", [-1]),
            *((name, "BYTES", [-1]) for name in ("METHOD", "WITHOUT", "REPLACEMENT")),
            ("ITERATIONS", "INT32", [-1]),
            ("NEGATIVE_PROMPT", "BYTES", [-1]),
            ("SEED", "INT64", [-1]),
            ("NUM_INFERENCE_STEPS", "INT32", [-1]),
            ("GUIDANCE_SCALE", "FP32", [-1]),
            ("GUIDANCE_STOP", "FP32", [-1]),
            ("DURATION", "FP32", [-1]),
            ("SCHEDULER", "BYTES", [-1]),
            *SOUND[1:],
        ],
        [
            ("MATRIX", "FP32", [-1, -1]),
            ("WORDS", "BYTES", [-1]),
            ("FRAME_SECONDS", "FP32", [1]),
            ("AUDIO", "FP32", [-1, -1]),
            ("SAMPLE_RATE", "INT32", [1]),
            ("SEED", "INT64", [-1]),
            ("DIGEST", "BYTES", [-1]),
            ("PROGRESS", "FP32", [1]),
        ],
        [
            *("METHOD", "WITHOUT", "REPLACEMENT", "ITERATIONS", "NEGATIVE_PROMPT", "SEED"),
            *("NUM_INFERENCE_STEPS", "GUIDANCE_SCALE", "GUIDANCE_STOP", "DURATION", "SCHEDULER"),
            *OPTIONAL,
        ],
        *(0, True),
    ),
    "tango": (
        [
            ("PROMPT", "BYTES", [-1]),
            ("NEGATIVE_PROMPT", "BYTES", [-1]),
            ("SEED", "INT64", [-1]),
            ("NUM_INFERENCE_STEPS", "INT32", [-1]),
            ("GUIDANCE_SCALE", "FP32", [-1]),
            ("GUIDANCE_STOP", "FP32", [-1]),
            ("DURATION", "FP32", [-1]),
            ("SCHEDULER", "BYTES", [-1]),
            ("PROFILE", "BYTES", [-1]),
            ("LOUDNESS", "FP32", [-1]),
            ("ADAPTER", "BYTES", [-1]),
        ],
        [
            ("AUDIO", "FP32", [-1, -1]),
            ("SAMPLE_RATE", "INT32", [1]),
            ("SEED", "INT64", [-1]),
            ("DIGEST", "BYTES", [-1]),
            ("ROW", "INT32", [1]),
            ("PROGRESS", "FP32", [1]),
        ],
        [
            "NEGATIVE_PROMPT",
            "SEED",
            "NUM_INFERENCE_STEPS",
            "GUIDANCE_SCALE",
            "GUIDANCE_STOP",
            "DURATION",
            "SCHEDULER",
            "PROFILE",
            "LOUDNESS",
            "ADAPTER",
        ],
        *(0, True),
    ),
}
"""Inputs, outputs, optional inputs, most rows of a batch, and whether it streams, by model."""


def test_each_model_is_described_the_same(served: Addresses) -> None:
    described: dict[str, Any] = {}
    for name, address in served.models.items():
        with triton.InferenceServerClient(address) as client:
            assert client.is_server_live()
            assert client.is_server_ready()
            assert client.is_model_ready(name, version(name))
            assert not client.is_model_ready(name, "99")
            metadata = client.get_model_metadata(name)
            config = client.get_model_config(name).config
            assert client.get_server_metadata().version
            states = {
                (one.name, one.version): one.state for one in client.get_model_repository_index().models
            }
            assert states[name, version(name)] == "READY"
        sides = (metadata.inputs, metadata.outputs)
        told = [[(one.name, one.datatype, list(one.shape)) for one in side] for side in sides]
        optional = [one.name for one in config.input if one.optional]
        described[name] = (*told, optional, config.max_batch_size, config.model_transaction_policy.decoupled)
    assert described == DESCRIBED


def test_a_stream_tells_progress_and_gives_each_clip(served: Addresses) -> None:
    with stream(served.tango) as opened:
        opened.ask(inputs(PROMPTS, SEED=("INT64", [7, 8])), request_id="mine")
        results = opened.all()
    assert {one.get_response().id for one in results} == {"mine"}
    assert {one.get_response().model_version for one in results} == {version("tango")}
    clips = [one for one in results if one.as_numpy("AUDIO") is not None]
    assert results[-1] is clips[-1]
    assert sorted(int(one.as_numpy("ROW")[0]) for one in clips) == [0, 1]
    for one in clips:
        assert one.as_numpy("AUDIO").shape == (1, 10_240)
        assert 0.001 < np.abs(one.as_numpy("AUDIO")).max() <= 1
        assert one.as_numpy("SAMPLE_RATE").tolist() == [16_000]
        assert one.as_numpy("SEED").tolist() == [7 + one.as_numpy("ROW")[0]]
        assert one.as_numpy("DIGEST").tolist() == [digest("mini").encode()]
    for row in range(2):
        told = [one for one in results if one not in clips and one.as_numpy("ROW")[0] == row]
        fractions = [float(one.as_numpy("PROGRESS")[0]) for one in told]
        assert fractions == sorted(fractions)
        assert fractions[-4:] == [0.25, 0.5, 0.75, 1.0]


def test_who_wants_clips_alone_gets_them_alone(served: Addresses) -> None:
    with stream(served.tango) as opened:
        opened.ask(inputs(PROMPTS), outputs=[triton.InferRequestedOutput(one) for one in ("AUDIO", "ROW")])
        results = opened.all()
    assert len(results) == 2
    assert set(clips_of(results)) == {0, 1}


def test_every_setting_counts(served: Addresses) -> None:
    with stream(served.tango) as opened:
        opened.ask(inputs(PROMPTS[:1], SEED=("INT64", [2**62 + 1])))
        plain = opened.all()
    assert plain[-1].as_numpy("SEED").tolist() == [2**62 + 1]
    for name, setting in {
        "NEGATIVE_PROMPT": ("BYTES", ["rain"]),
        "NUM_INFERENCE_STEPS": ("INT32", [3]),
        "GUIDANCE_SCALE": ("FP32", [1.5]),
        "GUIDANCE_STOP": ("FP32", [0.5]),
        "SCHEDULER": ("BYTES", ["unipc"]),
        "PROFILE": ("BYTES", ["quality"]),
    }.items():
        other = clip(served.tango, PROMPTS[0], SEED=("INT64", [2**62 + 1]), **{name: setting})
        assert not np.array_equal(other, clips_of(plain)[0]), name
    assert len(clip(served.tango, PROMPTS[0], DURATION=("FP32", [1.28]))) == 20_480


async def test_asyncio(served: Addresses) -> None:
    async with triton_aio.InferenceServerClient(served.tango) as client:

        async def requests() -> AsyncIterator[dict[str, Any]]:
            for number in range(3):
                given = inputs(PROMPTS[:1], SEED=("INT64", [number]))
                yield {"model_name": "tango", "inputs": given, "request_id": str(number)}
            await asyncio.sleep(0)

        found: dict[str, Any] = {}
        async for result, error in client.stream_infer(requests()):
            assert error is None
            if result.as_numpy("AUDIO") is not None:
                found[result.get_response().id] = result.as_numpy("AUDIO")
    assert set(found) == {"0", "1", "2"}
    async with triton_aio.InferenceServerClient(served.clap) as client:
        one, other = await asyncio.gather(*(client.infer("clap", pairs(PROMPTS, TONES)) for _ in range(2)))
        np.testing.assert_allclose(one.as_numpy("SCORE"), other.as_numpy("SCORE"), atol=1e-5)


def test_scores_and_rewards_of_samples_and_of_files(served: Addresses) -> None:
    files = [
        tensor("PROMPT", "BYTES", [[prompt] for prompt in PROMPTS]),
        tensor("ENCODED_AUDIO", "BYTES", [[file_of(one, subtype="FLOAT")] for one in TONES]),
    ]
    for name, outputs in (("clap", ("SCORE",)), ("reward", ("REWARD", "PROBABILITY"))):
        with triton.InferenceServerClient(served.models[name]) as client:
            of_samples = client.infer(name, pairs(PROMPTS, TONES))
            of_files = client.infer(name, files)
        for output in outputs:
            made = of_samples.as_numpy(output)
            assert (made.dtype, made.shape) == (np.float32, (2, 2 if name == "clap" else 1))
            assert np.isfinite(made).all()
            np.testing.assert_allclose(of_files.as_numpy(output), made, atol=1e-5)
        digests = [digest("clap-a"), digest("clap-b")] if name == "clap" else [digest("reward")]
        assert of_samples.as_numpy("DIGEST").tolist() == [[one.encode() for one in digests]] * 2
    rewards = of_samples.as_numpy("REWARD")
    np.testing.assert_allclose(of_samples.as_numpy("PROBABILITY"), 1 / (1 + np.exp(-rewards)), atol=1e-5)


def test_captions_of_samples_and_of_files(served: Addresses) -> None:
    files = [tensor("ENCODED_AUDIO", "BYTES", [[file_of(one, subtype="FLOAT")] for one in TONES])]
    with triton.InferenceServerClient(served.models["caption"]) as client:
        of_samples, of_files = client.infer("caption", sounds(TONES)), client.infer("caption", files)
    captions, candidates, scores = map(of_samples.as_numpy, ("CAPTION", "CANDIDATES", "SCORES"))
    assert of_files.as_numpy("CAPTION").tolist() == captions.tolist()
    assert captions.tolist() == candidates[:, :1].tolist()
    assert candidates.shape == scores.shape
    assert np.array_equal(np.sort(scores)[:, ::-1], scores)
    assert of_samples.as_numpy("DIGEST").tolist() == [[digest("captioner").encode()]] * 2


def test_words_by_frames_of_a_clip_that_is_made_and_of_a_given_one(served: Addresses) -> None:
    given = {"PROMPT": ("BYTES", [PROMPTS[0]]), "SEED": ("INT64", [7]), "NUM_INFERENCE_STEPS": ("INT32", [2])}
    own = [tensor(name, kind, values) for name, (kind, values) in given.items()]
    answers: list[Any] = []
    with stream(served.models["explain"]) as opened:
        for given_clip in ([], sounds(TONES[:1])):
            opened.ask([*own, *given_clip], "explain")
            *progress, last = opened.all()
            fractions = [float(one.as_numpy("PROGRESS")[0]) for one in progress]
            assert fractions == sorted(fractions) and fractions[-1] == 1.0
            answers.append(last)
    for found in answers:
        words = [word.decode() for word in found.as_numpy("WORDS")]
        assert words == PROMPTS[0].split()
        matrix_WT = found.as_numpy("MATRIX")
        assert matrix_WT.shape[0] == len(words) and (matrix_WT >= 0).all() and matrix_WT.any()
        seconds = found.as_numpy("AUDIO").shape[1] / found.as_numpy("SAMPLE_RATE")[0]
        frame = found.as_numpy("FRAME_SECONDS")[0]
        assert abs(matrix_WT.shape[1] * frame - seconds) < frame
        assert found.as_numpy("SEED").tolist() == [7]
        assert found.as_numpy("DIGEST").tolist() == [digest("mini").encode()]
        if not served.is_triton:  # its Python backend has no parameters of answers
            assert parameters(found)["method"] == "occlusion"


EXPLAIN_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"PROMPT": ("BYTES", [""])}, "request.prompt: is empty"),
    ({"METHOD": ("BYTES", ["magic"])}, "method: is 'magic'"),
    ({"WITHOUT": ("BYTES", ["cat"])}, "without: is 'cat', which is not in the prompt"),
    ({"SEED": ("INT64", [-1])}, "request.seed"),
    ({"DURATION": ("FP32", [99.0])}, "request.duration: is 99 s"),
    ({"PROMPT": ("BYTES", ["rain", "thunder"])}, "PROMPT"),
]


@pytest.mark.parametrize(("given", "says"), EXPLAIN_FAULTS)
def test_bad_input_of_explain(served: Addresses, given: dict[str, Any], says: str) -> None:
    tensors = {"PROMPT": ("BYTES", [PROMPTS[0]]), "NUM_INFERENCE_STEPS": ("INT32", [2])} | given
    with stream(served.models["explain"]) as opened:
        opened.ask([tensor(name, kind, values) for name, (kind, values) in tensors.items()], "explain")
        status, message = refusal(opened.all)
    assert status == "INVALID_ARGUMENT"
    assert says in message, message


def test_clips_of_several_lengths_at_once(served: Addresses) -> None:
    tones = [tone(0.5 + 0.1 * n, hertz=200.0 * (n + 1)) for n in range(8)]
    with triton.InferenceServerClient(served.clap) as client:

        def score(sound: NDArray[np.float32]) -> NDArray[np.float32]:
            found: NDArray[np.float32] = client.infer("clap", pairs(PROMPTS[:1], [sound])).as_numpy("SCORE")
            return found

        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(score, tones))
        np.testing.assert_allclose(together, [score(sound) for sound in tones], atol=1e-5)


TANGO_FAULTS: list[tuple[list[Any], str]] = [
    ([tensor("SEED", "INT64", [1])], "PROMPT"),
    (inputs([b"\xff"]), "prompt: tensor PROMPT is not UTF-8"),
    (inputs([""]), "prompt: is empty"),
    (inputs(["a"] * 9), "prompt: tensor PROMPT has 9 rows, expected between 1 and 8"),
    (inputs([["a"]]), "PROMPT"),
    (inputs(PROMPTS[:1], SEED=("INT32", [1])), "SEED"),
    (inputs(PROMPTS, SEED=("INT64", [1, 2, 3])), "seed: tensor SEED has 3 rows, expected 2"),
    (inputs(PROMPTS[:1], NUM_INFERENCE_STEPS=("INT32", [0])), "num_inference_steps: is 0"),
    (inputs(PROMPTS[:1], SCHEDULER=("BYTES", ["euler"])), "scheduler: is 'euler'"),
    (inputs(PROMPTS[:1], AUDIO=("FP32", [[0.0]])), "AUDIO"),
]


@pytest.mark.parametrize(("given", "says"), TANGO_FAULTS)
def test_bad_input_of_tango(served: Addresses, given: list[Any], says: str) -> None:
    with stream(served.tango) as opened:
        opened.ask(given)
        with pytest.raises(triton.InferenceServerException) as caught:
            opened.all()
    # Of what Triton refuses itself, before a model sees it, its streams tell no status.
    unsaid = served.is_triton and caught.value.status() is None
    assert unsaid or caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert says in caught.value.message()


PAIR_FAULTS: list[tuple[list[Any], str]] = [
    (pairs(PROMPTS, TONES)[1:], "PROMPT"),
    (pairs(PROMPTS, TONES)[:1], "audio: tensor AUDIO is missing"),
    (pairs(PROMPTS, TONES, None), "sample_rate_hertz: tensor SAMPLE_RATE is missing"),
    (pairs(PROMPTS, TONES, 7), "pairs[0].clip.sample_rate_hertz: is 7"),
    (pairs([b"\xff", "a dog"], TONES), "prompt[0]: tensor PROMPT is not UTF-8"),
    (pairs(PROMPTS, TONES[0]), "AUDIO"),
    (pairs(PROMPTS[:1], TONES), "AUDIO"),
    (pairs(["a"] * 65, np.zeros((65, 8000))), "64"),
    ([tensor("PROMPT", "BYTES", [["a"]]), tensor("AUDIO", "INT32", [[1]])], "AUDIO"),
    (
        [tensor("PROMPT", "BYTES", [["a"]]), tensor("ENCODED_AUDIO", "BYTES", [[b"nonsense"]])],
        "pairs[0].clip.audio: begins with 6e 6f 6e 73",
    ),
    (
        [*pairs(PROMPTS[:1], TONES[:1]), tensor("ENCODED_AUDIO", "BYTES", [[b"x"]])],
        "has both tensors AUDIO and ENCODED_AUDIO",
    ),
]


@pytest.mark.parametrize("model", ["clap", "reward"])
@pytest.mark.parametrize(("given", "says"), PAIR_FAULTS)
def test_bad_input_of_clap_and_reward(served: Addresses, model: str, given: list[Any], says: str) -> None:
    with triton.InferenceServerClient(served.models[model]) as client:
        status, message = refusal(lambda: client.infer(model, given))
    assert status == "INVALID_ARGUMENT"
    assert says in message, message


CLIP_FAULTS: list[tuple[list[Any], str]] = [
    *((given[1:], says.replace("pairs[0].clip", "clips[0]")) for given, says in PAIR_FAULTS[1:4]),
    (sounds(np.zeros((1, 8000))), "clips[0].audio: is silent"),
    (sounds(np.zeros((65, 8000))), "64"),
    ([tensor("AUDIO", "INT32", [[1]])], "AUDIO"),
    (
        [tensor("ENCODED_AUDIO", "BYTES", [[b"nonsense"]])],
        "clips[0].audio: begins with 6e 6f 6e 73",
    ),
    (
        [*sounds(TONES[:1]), tensor("ENCODED_AUDIO", "BYTES", [[b"x"]])],
        "has both tensors AUDIO and ENCODED_AUDIO",
    ),
]


@pytest.mark.parametrize(("given", "says"), CLIP_FAULTS)
def test_bad_input_of_caption(served: Addresses, given: list[Any], says: str) -> None:
    with triton.InferenceServerClient(served.models["caption"]) as client:
        status, message = refusal(lambda: client.infer("caption", given))
    assert status == "INVALID_ARGUMENT"
    # Triton itself refuses a request without inputs.
    assert (says if given or not served.is_triton else "request has 0 inputs") in message, message


def test_what_is_not_served_is_not_found(served: Addresses) -> None:
    for name, address in served.models.items():
        with triton.InferenceServerClient(address) as client:
            for call in (
                partial(client.infer, "another", pairs(PROMPTS, TONES)),
                partial(client.get_model_metadata, "another"),
                partial(client.get_model_metadata, name, "9"),
                partial(client.get_model_config, name, "9"),
            ):
                status, message = refusal(call)
                assert status == "NOT_FOUND"
                assert "unknown model" in message


def test_one_who_leaves_a_stream_frees_its_place(served: Addresses) -> None:
    """Four times as many as fit into a call: were their places kept, the first who came would end first."""
    long = inputs(PROMPTS[:1], NUM_INFERENCE_STEPS=("INT32", [1000]))
    with stream(served.tango) as stays:
        stays.ask(long)
        stays.get()
        for _ in range(8):
            with stream(served.tango) as leaves:
                leaves.ask(long)
                while leaves.get().as_numpy("PROGRESS")[0] == 0:
                    pass
        clip(served.tango, PROMPTS[0])
        while not stays.answers.empty():
            stays.get()
        assert stays.under_way


def test_many_requests_of_every_kind(served: Addresses) -> None:
    """240 requests at 16 in flight, good ones and bad ones: each gets its own answer."""
    local = threading.local()
    alone = clip(served.tango, PROMPTS[0], SEED=("INT64", [7]), NUM_INFERENCE_STEPS=("INT32", [2]))

    def ask(number: int) -> str:
        if not hasattr(local, "clients"):
            local.clients = {
                name: triton.InferenceServerClient(address) for name, address in served.models.items()
            }
        match number % 6:
            case 0 | 1:
                seed = 7 if number % 6 == 0 else number
                made = clip(
                    served.tango, PROMPTS[0], SEED=("INT64", [seed]), NUM_INFERENCE_STEPS=("INT32", [2])
                )
                assert np.array_equal(made, alone) == (seed == 7)
                return "clip"
            case 2:
                result = local.clients["clap"].infer("clap", pairs(PROMPTS, TONES))
                assert result.as_numpy("SCORE").shape == (2, 2)
                return "score"
            case 3:
                result = local.clients["reward"].infer("reward", pairs(PROMPTS[:1], TONES[:1]))
                assert result.as_numpy("REWARD").shape == (1, 1)
                return "reward"
            case 4:
                result = local.clients["caption"].infer("caption", sounds(TONES))
                assert result.as_numpy("CAPTION").shape == (2, 1)
                return "caption"
            case _:
                status, _ = refusal(
                    lambda: local.clients["reward"].infer("reward", pairs(PROMPTS, TONES, None))
                )
                return status

    with ThreadPoolExecutor(16) as pool:
        answered = Counter(pool.map(ask, range(240)))
    assert answered == {"clip": 80, "score": 40, "reward": 40, "caption": 40, "INVALID_ARGUMENT": 40}
