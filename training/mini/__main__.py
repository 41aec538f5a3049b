"""Train the whole mini family, part after part; each part resumes where it was.

    make mini            (python -m training.mini)

On two cores this takes hours. What is finished is not done again; remove a part's folder under
`build/mini` to train it anew.
"""

import argparse
import subprocess
import sys
from pathlib import Path


def stages(trunk_steps: int, base_steps: int, mini_steps: int) -> list[list[str]]:
    """Programs of this package with their arguments, in order; `{work}` stands for the working folder."""
    trunk = ["denoiser", "--name", "trunk", "--captions", "web", "--steps", str(trunk_steps), "--decay", "0"]
    base = ["denoiser", "--name", "mini-base", "--captions", "web", "--steps", str(base_steps)]
    mini = ["denoiser", "--name", "mini", "--captions", "true", "--steps", str(mini_steps)]
    from_trunk = ["--init", "{work}/trunk/final"]
    return [
        ["autoencoder"],
        ["text_encoder"],
        ["latents"],
        trunk,
        base + from_trunk,
        mini + from_trunk,
        ["tagger"],
        ["vocoder"],
        ["package"],
        ["evaluate", "--reconstruction", "300", "--output", "{work}/evaluation.json"],
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/mini"))
    parser.add_argument("--trunk-steps", type=int, default=3_000, help="steps that both denoisers share")
    parser.add_argument("--base-steps", type=int, default=2_000, help="further steps of mini-base")
    parser.add_argument("--mini-steps", type=int, default=4_500, help="further steps of mini")
    arguments = parser.parse_args()
    for program, *flags in stages(arguments.trunk_steps, arguments.base_steps, arguments.mini_steps):
        command = [sys.executable, "-m", f"training.mini.{program}"]
        if program != "evaluate":
            command += ["--work", str(arguments.work)]
        command += [flag.format(work=arguments.work) for flag in flags]
        print("▸", " ".join(command[2:]), flush=True)
        try:
            code = subprocess.run(command, check=False).returncode
        except KeyboardInterrupt:
            # The program had it too, and saved what it had.
            return 130
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
