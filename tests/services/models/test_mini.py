"""The shipped weights themselves."""

import pytest
import torch

from services.errors import ModelNotFoundError
from services.models.architectures import load_generator
from services.models.audiogen.pipeline import AudioGenPipeline
from services.models.latent import clip_generator
from services.models.manifest import verify_manifest
from services.models.mini import PARTS, REAL, mini_folder
from services.models.mini.tagger import EventTagger
from services.models.tango.loading import load_tango
from services.models.tango.pipeline import TangoPipeline
from services.models.words import unknown_words


@pytest.fixture(scope="module")
def tagger() -> EventTagger:
    return EventTagger.from_pretrained(mini_folder("tagger")).float().eval()


@pytest.fixture(scope="module")
def mini() -> TangoPipeline:
    return load_tango(mini_folder("mini"))


def test_the_family_is_whole_and_small_enough_to_ship() -> None:
    for name in PARTS:
        manifest = verify_manifest(mini_folder(name))
        assert manifest.name == name
        assert name in REAL or manifest.license == "Apache-2.0"
    family = mini_folder("mini").parent
    sizes = {
        name: sum(path.stat().st_size for path in (family / name).rglob("*") if path.is_file())
        for name in PARTS
    }
    assert sum(size for name, size in sizes.items() if name not in REAL) < 40e6
    assert sum(sizes.values()) < 60e6, "more is a distribution of its own"
    with pytest.raises(ModelNotFoundError, match="mini-large"):
        mini_folder("mini-large")


@pytest.mark.parametrize(
    ("prompt", "first", "second"),
    [("A dog barks then a siren wails", "dog", "siren"), ("A dog barks after a siren wails", "siren", "dog")],
)
def test_mini_makes_what_the_prompt_says_in_its_order(
    mini: TangoPipeline, tagger: EventTagger, prompt: str, first: str, second: str
) -> None:
    generators = [clip_generator(seed) for seed in range(2)]
    waveforms = mini(prompt, num_waveforms_per_prompt=2, generator=generators).audios
    assert waveforms.shape == (2, 40_960)
    for heard in tagger.detect(torch.from_numpy(waveforms)):
        assert heard[first].centre < heard[second].centre


def test_mini_makes_clips_of_twice_the_length(mini: TangoPipeline, tagger: EventTagger) -> None:
    prompt = "A bell rings then rain falls then a cat meows"
    output = mini(prompt, audio_length_in_s=5.12, generator=clip_generator(0))
    heard = tagger.detect(torch.from_numpy(output.audios))[0]
    assert output.audios.shape == (1, 81_920)
    assert heard["bell"].centre < heard["rain"].centre < heard["cat"].centre


def test_mini_names_the_words_it_does_not_know(mini: TangoPipeline) -> None:
    assert unknown_words(mini.tokenizer, "A dog barks, then a zebra hums") == ("zebra", "hums")


def test_mini_base_is_of_the_same_architecture_and_has_other_weights(mini: TangoPipeline) -> None:
    base = load_tango(mini_folder("mini-base"))
    ours, theirs = mini.unet.state_dict(), base.unet.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert any(not torch.equal(ours[k], theirs[k]) for k in ours)
    for part in ("vae", "text_encoder"):
        shared = getattr(base, part).state_dict()
        assert all(torch.equal(v, shared[k]) for k, v in getattr(mini, part).state_dict().items())


def test_audiogen_makes_what_the_prompt_says_in_its_order(tagger: EventTagger) -> None:
    folder = mini_folder("audiogen")
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 6e6
    pipeline = load_generator(folder)
    assert isinstance(pipeline, AudioGenPipeline)
    prompts = ["A dog barks then a siren wails", "A dog barks after a siren wails"]
    waveforms = pipeline(prompts, generator=[clip_generator(seed) for seed in range(2)]).audios
    first, second = tagger.detect(torch.from_numpy(waveforms))
    assert first["dog"].centre < first["siren"].centre
    assert second["siren"].centre < second["dog"].centre
