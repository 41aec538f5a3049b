"""Train the whole mini family, part after part; each part resumes where it was.

    make mini            (python -m training.mini)

On two cores this takes hours. What is finished is not done again; remove a part's folder under
`build/mini` to train it anew.
"""

import argparse
import subprocess
import sys
from pathlib import Path

STAGES: tuple[tuple[str, ...], ...] = (
    ("autoencoder",),
    ("text_encoder",),
    ("latents",),
    ("denoiser", "--name", "trunk", "--captions", "web", "--steps", "{trunk}", "--decay", "0"),
    (
        "denoiser",
        "--name",
        "mini-base",
        "--captions",
        "web",
        "--init",
        "{work}/trunk/final",
        "--steps",
        "{branch}",
    ),
    (
        "denoiser",
        "--name",
        "mini",
        "--captions",
        "true",
        "--init",
        "{work}/trunk/final",
        "--steps",
        "{branch}",
    ),
    ("tagger",),
    ("package",),
    ("evaluate", "--output", "{work}/evaluation.json"),
)
"""Programs of this package with their arguments, in order."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/mini"))
    parser.add_argument(
        "--trunk-steps", type=int, default=6_000, help="denoiser steps that both models share"
    )
    parser.add_argument(
        "--branch-steps", type=int, default=12_000, help="denoiser steps of each model after that"
    )
    arguments = parser.parse_args()
    values = {"work": arguments.work, "trunk": arguments.trunk_steps, "branch": arguments.branch_steps}
    for program, *flags in STAGES:
        command = [sys.executable, "-m", f"training.mini.{program}"]
        if program != "evaluate":
            command += ["--work", str(arguments.work)]
        command += [flag.format(**values) for flag in flags]
        print("▸", " ".join(command[2:]), flush=True)
        code = subprocess.run(command, check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
