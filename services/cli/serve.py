"""`milonga serve`: run a microservice in this process."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Run a service until SIGTERM or Ctrl-C.", no_args_is_help=True)

_SETTINGS = (
    "Every flag is also read from the environment: --metrics-port is MILONGA_METRICS_PORT. So are settings "
    "without a flag: MILONGA_BATCH_SHAPES, MILONGA_MAX_QUEUE, MILONGA_MAX_CLIP_COUNT, MILONGA_THREADS, "
    "MILONGA_MAX_REQUEST_BYTES, MILONGA_MAX_CONNECTION_AGE_SECONDS."
)


@app.callback()
def _root() -> None:
    # Keeps `generation` a sub-command while it is the only service.
    pass


@app.command(epilog=_SETTINGS)
def generation(
    model: Annotated[
        str | None,
        typer.Option(
            help="Model URI: mini, mini-base, file:PATH, hf:OWNER/NAME, each also with #sha256:HEX.",
            show_default=False,
        ),
    ] = None,
    listen: Annotated[
        str | None, typer.Option(help="HOST:PORT, or unix:/PATH.", show_default="127.0.0.1:50051")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1.", show_default="auto")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16.", show_default="float32")
    ] = None,
    exact: Annotated[
        bool | None,
        typer.Option(
            "--exact/--no-exact",
            help="Always run one batch shape: the same request gives the same bits under any load.",
            show_default="no-exact",
        ),
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Prometheus metrics over HTTP.", show_default="off")
    ] = None,
    health_port: Annotated[
        int | None, typer.Option(help="Health service in plaintext, for kubelet probes.", show_default="off")
    ] = None,
    tls_cert_file: Annotated[
        Path | None, typer.Option(help="Certificate chain (PEM).", show_default="plaintext")
    ] = None,
    tls_key_file: Annotated[Path | None, typer.Option(help="Its private key (PEM).")] = None,
    tls_client_ca_file: Annotated[
        Path | None, typer.Option(help="Authorities (PEM) that clients' certificates must come from: mTLS.")
    ] = None,
    drain_delay_seconds: Annotated[
        float | None,
        typer.Option(help="On SIGTERM: serve on for so long after readiness is off.", show_default="0"),
    ] = None,
    grace_seconds: Annotated[
        float | None,
        typer.Option(help="After that: how long calls under way may take.", show_default="30"),
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="auto, json, console.", show_default="auto")] = None,
    log_level: Annotated[
        str | None, typer.Option(help="debug, info, warning, error.", show_default="info")
    ] = None,
) -> None:
    """Serve one model: prompts in, clips out (milonga.v1.GenerationService)."""
    from services.generation import serve as service
    from services.runtime.settings import load_settings

    service.run(
        load_settings(
            service.GenerationSettings,
            model=model,
            listen=listen,
            device=device,
            dtype=dtype,
            exact=exact,
            metrics_port=metrics_port,
            health_port=health_port,
            tls_cert_file=tls_cert_file,
            tls_key_file=tls_key_file,
            tls_client_ca_file=tls_client_ca_file,
            drain_delay_seconds=drain_delay_seconds,
            grace_seconds=grace_seconds,
            log_format=log_format,
            log_level=log_level,
        )
    )
