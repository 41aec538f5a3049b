import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from services.errors import InvalidInputError
from tests.training.preferences.conftest import Models, Stages
from training.data.store import read_json, read_rows
from training.preferences.captions import (
    CaptionsConfig,
    captions_identity,
    cluster,
    is_temporal,
    pick,
    read_captions,
    select_captions,
    selected,
    temporal,
)
from training.preferences.embedders import (
    TangoEmbedder,
    embedder_identity,
    load_embedder,
    resolve_embedder,
)
from training.soundworld.scenes import split_of

TEXTS = ["A dog barks", "Rain falls, then a bell rings", "A dog barks", "", "Birds sing"]


def _write(path: Path) -> Path:
    match path.suffix:
        case ".csv":
            path.write_text("id,caption\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(TEXTS)))
        case ".jsonl":
            path.write_text("".join(json.dumps({"id": i, "caption": t}) + "\n" for i, t in enumerate(TEXTS)))
        case ".json":
            path.write_text(json.dumps([{"id": i, "caption": t} for i, t in enumerate(TEXTS)]))
        case ".parquet":
            pq.write_table(pa.table({"id": list(range(len(TEXTS))), "caption": TEXTS}), path)
    return path


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json", "parquet"])
def test_every_format_is_read_and_a_missing_column_is_told(tmp_path: Path, suffix: str) -> None:
    path = _write(tmp_path / f"captions.{suffix}")
    for column in (None, "caption"):
        found, left_out = read_captions(CaptionsConfig(source=path, column=column))
        assert list(found) == ["A dog barks", "Rain falls, then a bell rings", "Birds sing"]
        assert left_out == {"unusable": 1, "repeated": 1}
    with pytest.raises(InvalidInputError, match=r"source: .* has no column text; it has id, caption"):
        read_captions(CaptionsConfig(source=path, column="text"))


def test_every_caption_of_a_row_is_read_and_line_breaks_are_spaces(tmp_path: Path) -> None:
    path = tmp_path / "clotho.csv"
    path.write_text(
        'file_name,caption_1,caption_2,caption_3\nx.wav,Rain,"A dog\nbarks",Rain\ny.wav,Bi\0rds,,\n'
    )
    found, left_out = read_captions(CaptionsConfig(source=path))
    assert found == {"Rain": "clotho.csv:2", "A dog barks": "clotho.csv:2"}
    assert left_out == {"unusable": 1, "repeated": 1}


def test_what_is_no_list_of_captions_is_refused(tmp_path: Path) -> None:
    for name, content, says in (
        ("a.txt", "x\ny\n", "source: .*has no column"),
        ("a.jsonl", "{", "a.jsonl:1: is no JSON"),
        ("a.parquet", "PAR1", "source: .*can't be read"),
        ("a.csv", 'caption\n"Rain\nBirds\n', "a.csv:2: has a quote that is not closed"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(InvalidInputError, match=says):
            read_captions(CaptionsConfig(source=tmp_path / name))
    missing = tmp_path / "none.csv"
    with pytest.raises(InvalidInputError, match="can't be read"):
        read_captions(CaptionsConfig(source=missing))
    with pytest.raises(InvalidInputError, match=r"^source: .*none\.csv can't be read: .*; give CSV, JSON"):
        captions_identity(CaptionsConfig(source=missing), None)


def test_each_cluster_gives_its_share() -> None:
    rng = np.random.default_rng(0)
    centres = np.eye(4, 8, dtype=np.float32)
    vectors = np.concatenate(
        [c + rng.normal(0, 0.02, (n, 8)) for c, n in zip(centres, (9, 5, 2, 7), strict=True)]
    )
    labels = cluster(vectors.astype(np.float32), 4, seed=3)
    assert [len(set(labels[a:b])) for a, b in ((0, 9), (9, 14), (14, 16), (16, 23))] == [1, 1, 1, 1]
    assert labels[0] == 0
    assert list(dict.fromkeys(labels.tolist())) == [0, 1, 2, 3]
    picked = pick(labels, 3, seed=1)
    assert np.bincount(labels[picked]).tolist() == [3, 3, 2, 3]
    assert picked == pick(labels, 3, seed=1) != pick(labels, 3, seed=2)


def test_temporal_words() -> None:
    assert is_temporal("A dog barks THEN a cat meows")
    assert is_temporal("A bell, followed by rain")
    assert not is_temporal("An authentic engine idles afterwards")


def test_the_stage_on_the_sound_world(stages: Stages) -> None:
    report = read_json(stages.captions / "report.json")
    assert len(selected(stages.captions)) == report["selected"] == 3
    assert {row["cluster"] for row in read_rows(stages.captions / "captions.jsonl")} == {0, 1, 2}
    assert len(temporal(stages.captions)) == report["temporal"] == 3
    assert all(is_temporal(caption) for caption in temporal(stages.captions))
    assert {split_of(caption) for caption in selected(stages.captions)} == {"train"}


def test_what_was_embedded_is_not_embedded_again(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "captions"
    select_captions(stages.captions_config, output)
    (output / "report.json").unlink()
    wanted = (output / "captions.jsonl").read_bytes()
    (output / "captions.jsonl").unlink()
    monkeypatch.setattr(TangoEmbedder, "embed", lambda *_: pytest.fail("embedded again"))
    select_captions(stages.captions_config, output)
    assert (
        (output / "captions.jsonl").read_bytes()
        == wanted
        == (stages.captions / "captions.jsonl").read_bytes()
    )


def test_captions_that_the_embedder_does_not_read_are_counted(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "captions.csv"
    source.write_text("caption\na dog barks\nLe chien aboie\nrain falls\na dog barks 🐕\nLe chien aboie\n")
    for embedder in (f"tango:{models.tango}", f"clap:{models.clap_a}"):
        config = CaptionsConfig(source=source, embedder=embedder, clusters=1, device="cpu")
        report = select_captions(config, tmp_path / embedder.partition(":")[0])["prompt_warnings"]
        assert (report["prompts"], report["with_warnings"]) == (4, 2)
        assert [one["row"] for one in report["examples"]] == ["captions.csv:3", "captions.csv:5"]
        lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
        assert len(lines) == 1 and "2 of 4 prompts are not read in full" in lines[0]


def test_too_few_captions_are_an_error(stages: Stages, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"clusters: is 900, and there are \d+ captions"):
        select_captions(replace(stages.captions_config, clusters=900), tmp_path / "x")


@pytest.mark.parametrize("kind", ["tango", "clap"])
def test_embedders_give_unit_vectors_that_no_neighbour_changes(models: Models, kind: str) -> None:
    name = f"{kind}:{models.tango if kind == 'tango' else models.clap_a}"
    model = resolve_embedder(name)
    embedder = load_embedder(name, model, "cpu")
    sentences = ["a dog barks", "a bell rings then rain falls while a cat"]
    vectors = embedder.embed(sentences)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.allclose(embedder.embed(sentences[:1])[0], vectors[0], atol=1e-5)
    assert model is not None
    assert embedder_identity(name, model) == f"{kind}:{model.digest}"


def test_an_embedder_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # as if it were not installed
    with pytest.raises(InvalidInputError, match="pip install sentence-transformers"):
        load_embedder("sentence-transformers:thenlper/gte-large", None)
    for name in ("gte-large", "word2vec:x", "tango:"):
        with pytest.raises(InvalidInputError, match="must be sentence-transformers:"):
            resolve_embedder(name)
