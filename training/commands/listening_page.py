"""The page of `milonga train listen`: players and spectrograms, a row per prompt."""

from html import escape

from services.audio.encoding import encode_audio
from training.commands.pages import cards, page, player, spectrogram, table
from training.runs.listening import LOUDNESS, Listened, Sound


def html_page(found: Listened) -> bytes:
    """Return the page, with the clips in it."""
    parts = [
        f"<p>The first {len(found.prompts)} prompts of {escape(found.rule)}, in their order: none was "
        "chosen. The seed of a clip depends on its prompt alone, and is the same for all models. Every clip "
        f"is brought to {LOUDNESS:g} dB (root mean square).</p>",
        table(
            f"<th>{escape(name)}</th><td>{escape(str(model['name']))} {escape(str(model['version']))}</td>"
            f"<td>{escape(str(model['digest'])[:19])}…</td>"
            for name, model in found.models
        ),
    ]
    for prompt, sounds in found.prompts:
        parts += [f"<h2>{escape(prompt)}</h2>", cards(map(_card, sounds))]
    return page(f"Listen: {', '.join(name for name, _ in found.models)}", parts)


def _card(sound: Sound) -> str:
    flac = encode_audio(sound.waveform_N, sound.sampling_rate, "flac")
    facts = f"{len(sound.waveform_N) / sound.sampling_rate:.2f} s, {sound.sampling_rate} Hz"
    return (
        f"<figure>{spectrogram(sound.waveform_N, sound.sampling_rate)}{player(flac)}"
        f"<figcaption>{escape(sound.title)}<span>{facts}</span></figcaption></figure>"
    )
