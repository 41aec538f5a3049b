"""The spans of a captioning call, from its client to the batch of the model."""

from pathlib import Path

from services.client import AudioClient
from services.models.captioner.model import Captioner
from services.runtime.batch_pace import BatchPace
from tests.services.captioning.serving import MODEL, Served, serving
from tests.services.reward.serving import tone, wav
from tests.services.scoring.serving import save_tiny_clap
from tests.services.scoring.serving import serving as serving_scoring
from tests.services.traces import attributes, recording

CAPTION = "milonga.v1.CaptioningService/CaptionAudio"
WAV = wav(tone()).audio


def test_a_call_decodes_waits_and_describes(served: Served) -> None:
    served.worker.batcher._queue.pace = BatchPace()  # batches are as large as they may be
    with AudioClient(captioning=served.target, retries=0) as client, recording() as traces:
        client.caption_audio([WAV, WAV])
        service = traces.one(CAPTION, "SERVER")
        assert traces.children(traces.one(CAPTION, "CLIENT")) == [CAPTION]
        assert traces.children(service) == ["decode", "caption"]
        assert traces.children(traces.one("caption")) == ["queue", "model"]
        assert attributes(traces.one("caption")) == {"milonga.clips": 2, "milonga.model_digest": MODEL.digest}
        traces.check()


def test_the_scoring_service_is_in_the_trace(captioner: Captioner, tmp_path: Path) -> None:
    with (
        serving_scoring({"a": f"file:{save_tiny_clap(tmp_path / 'a', 0)}"}) as scoring,
        serving(captioner, scoring=scoring.hosted.target) as served,
        AudioClient(captioning=served.target, retries=0) as client,
        recording() as traces,
    ):
        client.caption_audio([WAV])
        assert traces.children(traces.one(CAPTION, "SERVER")) == ["decode", "caption", "refine"]
        names = [name.rpartition("/")[2] for name in traces.children(traces.one("refine"))]
        assert names == ["ListScorers", "BatchEmbedAudio", "BatchEmbedText"]
