"""Programs that train the embedded model family from scratch on the sound world (`make mini`).

In order: autoencoder ▸ text_encoder ▸ latents ▸ denoiser (a trunk, then `mini-base` and `mini`) ▸ tagger ▸
clap (`clap-a`, `clap-b`) ▸ package ▸ the reward model (`milonga train reward`) ▸
captioner_clips, captioner_encoder, captioner ▸ evaluate.
"""

from services.environment import quiet_libraries

quiet_libraries()
