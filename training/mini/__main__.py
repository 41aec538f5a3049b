"""Train the whole mini family, part after part; each part resumes.

    make mini            (python -m training.mini)

On two cores this takes hours. What is finished is not done again; remove a part's folder under
`build/mini` to train it again.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from services.models.mini import PARTS

MINI = "training.mini."
LATER = ("reward", "captioner", "audiogen")
"""Parts that learn from others as they ship."""


def stages(trunk_steps: int, base_steps: int, mini_steps: int) -> list[list[str]]:
    """Return modules with their arguments, in order; `{work}` is to be the working folder."""
    work = ["--work", "{work}"]
    denoiser = [f"{MINI}denoiser", *work]
    from_trunk = ["--init", "{work}/trunk/final"]
    return [
        [f"{MINI}autoencoder", *work],
        [f"{MINI}text_encoder", *work],
        [f"{MINI}latents", *work],
        [*denoiser, "--name", "trunk", "--captions", "web", "--steps", str(trunk_steps), "--decay", "0"],
        [*denoiser, "--name", "mini-base", "--captions", "web", "--steps", str(base_steps), *from_trunk],
        [*denoiser, "--name", "mini", "--captions", "true", "--steps", str(mini_steps), *from_trunk],
        [f"{MINI}tagger", *work],
        [f"{MINI}vocoder", *work],
        [f"{MINI}clap", *work, "--name", "clap-a"],
        [f"{MINI}clap", *work, "--name", "clap-b"],
        # The reward model uses clap-a as it ships, and learns from clips of mini.
        [f"{MINI}package", *work, *(f"--only={name}" for name in PARTS if name not in LATER)],
        ["services.cli", "train", "reward", "--recipe", "mini", "--output", "{work}/reward"],
        [f"{MINI}package", *work, "--only=reward"],
        # The captioner also learns from clips of mini.
        [f"{MINI}captioner_clips", *work],
        [f"{MINI}captioner_encoder", *work],
        [f"{MINI}captioner", *work],
        [f"{MINI}package", *work, "--only=captioner"],
        [f"{MINI}codec", *work],
        [f"{MINI}audiogen", *work],
        [f"{MINI}package", *work, "--only=audiogen"],
        [f"{MINI}evaluate_captioner", "--output", "{work}/evaluation-captioner.json"],
        [f"{MINI}evaluate", "--reconstruction", "300", "--output", "{work}/evaluation.json"],
        [f"{MINI}evaluate", "--model=audiogen", "--seeds=1", "--output", "{work}/evaluation-audiogen.json"],
        [f"{MINI}evaluate_audiogenx", "--output", "{work}/evaluation-audiogenx.json"],
        [f"{MINI}evaluate_clap", "--output", "{work}/evaluation-clap.json"],
        [f"{MINI}evaluate_reward", "--output", "{work}/evaluation-reward.json"],
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/mini"))
    parser.add_argument("--trunk-steps", type=int, default=3_000, help="steps that both denoisers share")
    parser.add_argument("--base-steps", type=int, default=2_000, help="further steps of mini-base")
    parser.add_argument("--mini-steps", type=int, default=4_500, help="further steps of mini")
    arguments = parser.parse_args()
    for stage in stages(arguments.trunk_steps, arguments.base_steps, arguments.mini_steps):
        command = [sys.executable, "-m", *(word.format(work=arguments.work) for word in stage)]
        print("▸", " ".join(command[2:]), flush=True)
        try:
            code = subprocess.run(command, check=False).returncode
        except KeyboardInterrupt:
            # The program got the signal too, and saved a checkpoint.
            return 130
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
