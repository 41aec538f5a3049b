"""Whether a folder or file holds a model of the kind that it says: what `milonga serve` would refuse.

Needs torch.
"""

from pathlib import Path

from services.errors import DigestMismatchError
from services.models.architectures import check_generator
from services.models.clap.laion import load_laion
from services.models.clap.loading import check_clap_folder, clap_config
from services.models.folders import read_json, read_shapes
from services.models.manifest import read_manifest
from services.models.mini import mini_folder
from services.models.reward.model import MODEL_TYPE, RewardHead, read_reward_config
from services.models.state_dicts import check_weights, on_meta


def check_model(path: Path) -> None:
    """Raise `ModelError` unless `path` holds a whole model: text to audio, CLAP or reward.

    Of a folder, keys and shapes are compared and nothing is loaded; a LAION checkpoint has to be.
    """
    if path.is_file():
        load_laion(path)
        return
    config = path / "config.json"
    kind = read_json(config).get("model_type") if config.exists() else None
    if kind == "clap":
        check_clap_folder(path, clap_config(path))
    elif kind == MODEL_TYPE:
        _check_reward(path)
    else:
        check_generator(path)


def _check_reward(folder: Path) -> None:
    config = read_reward_config(folder)
    check_weights(str(folder), on_meta(lambda: RewardHead(config)), read_shapes(folder))
    if folder == mini_folder("reward"):
        clap = read_manifest(mini_folder("clap-a"))
        if clap.digest != config.clap_digest:
            raise DigestMismatchError(
                f"{folder} was trained on {config.clap_name} ({config.clap_digest}), and beside it lies "
                f"{clap.digest}; install milonga again"
            )
