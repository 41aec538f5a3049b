"""Compute the metrics of `fixtures` by other implementations, and write ``references.json`` for the tests.

The packages depend on torchvision and torchaudio, which conflict with this project's torch. So they are
installed without dependencies into a separate environment that also sees ``make parity``'s libraries::

    python3 -m venv /tmp/metrics
    ls -d $PWD/.venv-parity/lib/*/site-packages > $(echo /tmp/metrics/lib/*/site-packages)/parity.pth
    /tmp/metrics/bin/pip install --no-deps torch-fidelity==0.4.0 kadtk==1.1.0 audioldm-eval==0.0.3 \\
        panns-inference==0.1.1 hear21passt==0.0.26
    PYTHONPATH=.:protos /tmp/metrics/bin/python -m tests.training.evaluation.references

Only functions that compute metrics are called; other imports of their modules (models, plots, hubs) are
replaced by mocks.
"""

import importlib.util
import json
import sys
import tempfile
import types
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers.audio_utils import mel_filter_bank

from tests.training.evaluation import fixtures
from training.evaluation.panns import VARIANTS, load_panns
from training.evaluation.passt import load_passt

OUTPUT = Path(__file__).with_name("references.json")
PACKAGES = (
    "torch-fidelity",
    "kadtk",
    "audioldm-eval",
    "panns-inference",
    "hear21passt",
    "torchlibrosa",
    "numpy",
    "torch",
)
STANDINS = (
    *("matplotlib", "matplotlib.pyplot", "torch_fidelity.utils", "hypy_utils", "hypy_utils.tqdm_utils"),
    *(
        "kadtk.emb_loader",
        "kadtk.model_loader",
        "panns_inference.config",
        "timm.models._hub",
        "torchaudio.transforms",
    ),
)
SAMPLES = 40_000
"""Samples of each test waveform of CNN14."""


def module(package: str, name: str) -> Any:
    """Import one file of a package without its `__init__`."""
    root = Path(str(distribution(package).locate_file(package.replace("-", "_"))))
    if root.name not in sys.modules:
        parent = types.ModuleType(root.name)
        parent.__path__ = [str(root)]
        sys.modules[root.name] = parent
    full = f"{root.name}.{name}"
    spec = importlib.util.spec_from_file_location(full, root / f"{name.replace('.', '/')}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[full] = loaded
    with mock.patch.dict(sys.modules, {standin: mock.MagicMock() for standin in STANDINS}):
        spec.loader.exec_module(loaded)
    return loaded


def distances() -> dict[str, dict[str, float]]:
    """Return the distances of `fixtures.SETS`, by case and implementation."""
    fid, kid = module("torch-fidelity", "metric_fid"), module("torch-fidelity", "metric_kid")
    kad = module("kadtk", "kad")
    found = {}
    for case, (generated, reference) in fixtures.SETS.items():
        statistics = [fid.fid_features_to_statistics(torch.from_numpy(x)) for x in (generated, reference)]
        row = {
            "torch-fidelity": fid.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
        }
        tensors = [torch.from_numpy(x) for x in (generated, reference)]
        options = {"cache_dirs": (None, None), "device": "cpu", "precision": torch.float64}
        row["kadtk"] = kad.calc_kernel_audio_distance(*tensors, **options).item()
        row["kadtk bandwidth 3"] = kad.calc_kernel_audio_distance(*tensors, bandwidth=3.0, **options).item()
        if len(generated) == len(reference):
            kernels = [
                kid.kernel_rbf(x, y, kid_kernel_rbf_sigma=3.0)
                for x, y in ((generated, generated), (generated, reference), (reference, reference))
            ]
            row["torch-fidelity u-statistic 3"] = kid.mmd2(*kernels, mmd_est="u-statistic")
        found[case] = {name: float(value) for name, value in row.items()}
    return found


def posteriors() -> dict[str, float]:
    """Return KL divergences of `fixtures.PAIRED` and inception scores of `fixtures.SCORED`."""
    generated, reference = (
        {"logits": torch.from_numpy(x), "file_path_": [f"{i}.wav" for i in range(len(x))]}
        for x in fixtures.PAIRED
    )
    kl, _, _ = module("audioldm-eval", "metrics.kl").calculate_kl(generated, reference, "logits")
    isc = module("torch-fidelity", "metric_isc").isc_features_to_metric
    scored = torch.from_numpy(fixtures.SCORED)
    return {
        "audioldm-eval kl softmax": kl["kullback_leibler_divergence_softmax"],
        "audioldm-eval kl sigmoid": kl["kullback_leibler_divergence_sigmoid"],
        "torch-fidelity is 1": isc(scored, splits=1)["inception_score_mean"],
        "torch-fidelity is 10": isc(scored, splits=10)["inception_score_mean"],
    }


def cnn14() -> dict[str, float]:
    """Return the largest differences of our CNN14 and panns_inference's, with the same random weights."""
    upstream = module("panns-inference", "models")
    found = {}
    for variant in VARIANTS.values():
        torch.manual_seed(0)
        theirs = upstream.Cnn14(
            variant.sampling_rate, variant.n_fft, variant.hop_length, 64, 50, variant.maximum_hertz, 527
        ).eval()
        for name, buffer in theirs.named_buffers():  # as in trained models: neither 0 nor 1
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn_like(buffer) * 0.1 - (20.0 if name.startswith("bn0") else 0.0))
            if name.endswith("running_var"):
                buffer.copy_(torch.rand_like(buffer) + (100.0 if name.startswith("bn0") else 0.5))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "Cnn14.pth"
            torch.save({"iteration": 1, "model": theirs.state_dict()}, path)
            ours = load_panns(path)
        waveforms = torch.randn(3, SAMPLES) * torch.tensor([[0.3], [0.01], [1e-4]])
        waveforms[1] += 0.3 * torch.sin(torch.arange(SAMPLES) * 0.2)
        with torch.inference_mode():
            expected, got = theirs(waveforms), ours(waveforms)
        rate = variant.sampling_rate
        scale = expected["embedding"].abs().max()
        difference = (expected["embedding"] - got.embeddings_BD).abs().max()
        found[f"{rate} Hz embedding, relative"] = float(difference / scale)
        found[f"{rate} Hz embedding, clips apart, relative"] = float(
            (got.embeddings_BD[0] - got.embeddings_BD[1]).abs().max() / scale
        )
        found[f"{rate} Hz posterior"] = float(
            (expected["clipwise_output"] - got.logits_BK.sigmoid()).abs().max()
        )
    return found


def passt() -> dict[str, float]:
    """Return the largest differences of our PaSST and hear21passt's, with the same random weights.

    torchaudio's mel filters are replaced by those of transformers, which are Kaldi's too.
    """
    filters = mel_filter_bank(
        num_frequency_bins=513,
        num_mel_filters=128,
        min_frequency=0.0,
        max_frequency=15_000.0,
        sampling_rate=32_000,
        mel_scale="kaldi",
        triangularize_in_mel_space=True,
    )
    torchaudio = mock.MagicMock()
    torchaudio.compliance.kaldi.get_mel_banks.return_value = (
        torch.from_numpy(filters.T[:, :-1]).float(),
        None,
    )
    with mock.patch.dict(sys.modules, {"torchaudio": torchaudio}):
        preprocess = module("hear21passt", "models.preprocess")
        module("hear21passt", "models.helpers.vit_helpers")
        upstream = module("hear21passt", "models.passt")
    upstream.first_RUN = False
    spectrogram = preprocess.AugmentMelSTFT(fmin_aug_range=10, fmax_aug_range=2000).eval()
    found = {}
    for stride in (10, 16):
        torch.manual_seed(0)
        theirs = upstream.PaSST(stride=stride, distilled=True).eval()
        for name, parameter in theirs.named_parameters():  # as in trained models: neither 0 nor 1
            if name.endswith(("bias", "norm.weight")):
                parameter.data += 0.1 * torch.randn_like(parameter)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "passt.pt"
            torch.save(theirs.state_dict(), path)
            ours = load_passt(path)
        for seconds in (2, 10):
            waveforms = torch.randn(2, seconds * 32_000) * torch.tensor([[0.3], [0.01]])
            waveforms[1] += 0.3 * torch.sin(torch.arange(seconds * 32_000) * 0.2)
            with torch.inference_mode():
                logits, features = theirs(spectrogram(waveforms)[:, None])
                got = ours(waveforms)
            case = f"stride {stride}, {seconds} s"
            scale = features.abs().max()
            found[f"{case}, embedding, relative"] = float((features - got.embeddings_BD).abs().max() / scale)
            found[f"{case}, embedding, clips apart, relative"] = float(
                (got.embeddings_BD[0] - got.embeddings_BD[1]).abs().max() / scale
            )
            found[f"{case}, posterior"] = float((logits.sigmoid() - got.logits_BK.sigmoid()).abs().max())
    return found


def keys() -> dict[str, str]:
    """Return names and shapes of the weights of panns_inference's CNN14 at 16 kHz."""
    theirs = module("panns-inference", "models").Cnn14(16_000, 512, 160, 64, 50, 8_000, 527)
    return {key: "x".join(map(str, tensor.shape)) for key, tensor in theirs.state_dict().items()}


def passt_keys() -> dict[str, str]:
    """Return names and shapes of the weights of hear21passt's PaSST with a stride of 10."""
    theirs = module("hear21passt", "models.passt").PaSST(stride=10, distilled=True)
    return {key: "x".join(map(str, tensor.shape)) for key, tensor in theirs.state_dict().items()}


def main() -> None:
    """Write ``references.json``."""
    written = {
        "versions": {name: version(name) for name in PACKAGES},
        "distances": distances(),
        "posteriors": posteriors(),
        "cnn14": cnn14(),
        "cnn14 keys at 16 kHz": keys(),
        "passt": passt(),
        "passt keys": passt_keys(),
    }
    OUTPUT.write_text(json.dumps(written, indent=1) + "\n")
    print(OUTPUT.read_text())


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
