"""Settings of the web door."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from services.client.connection import TLS, ConnectionOptions
from services.runtime.settings import ProcessSettings


class WebSettings(ProcessSettings):
    """Settings of the web door: the services behind it, and what it accepts."""

    listen: str = "127.0.0.1:8080"
    """Address of the web door: HOST:PORT (port 0: any free one)."""
    generation: str = "127.0.0.1:50051"
    """Address of the generation service."""
    scoring: str | None = None
    """Address of the scoring service. Default: no scores."""
    reward: str | None = None
    """Address of the reward service. Default: no rewards."""
    captioning: str | None = None
    """Address of the captioning service. Default: no captions."""
    explanation: str | None = None
    """Address of the explanation service. Default: no explanations."""
    challenger: str | None = None
    """Address of a second generation service, whose clips the studio compares with the first one's."""
    studio: bool = True
    """Have the studio, a page for people, at /. Needs the extra studio."""
    registry: str | None = None
    """Address of the MLflow server whose versions and promotions the studio shows. Signed clips state the
    runs that trained and promoted their model."""
    services_tls: bool = False
    """Use TLS to reach the services."""
    services_tls_ca_file: Path | None = None
    """CA certificates (PEM) to verify the services' certificates. Default: the system's."""
    services_tls_server_name: str | None = None
    """Name in the services' certificates, if it is not that of the address."""
    services_health_check: bool = False
    """Watch the health of each address of a service's name, and send no requests to one that drains: for
    headless Services."""
    allow_insecure_token: bool = False
    """Pass callers' tokens on to other machines in plaintext, without `services_tls`."""
    anonymous: Literal["auto", "allowed", "refused"] = "auto"
    """Whether requests without a token are passed on, to services that serve anonymous callers. auto: only on
    an address that no other machine reaches."""
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Port of Prometheus metrics, on the host of `listen`; 0: any free port. Default: `/metrics` of the web
    door itself."""
    sign_cert: Path | None = None
    """Certificate chain (PEM). With `sign_key`, every clip is signed, and states what made it (C2PA)."""
    sign_key: Path | None = None
    """Its private key (PEM)."""
    sign_prompt: bool = False
    """State the prompt itself in signed clips, not only its hash."""
    trusted_signers: Path | None = None
    """Certificates (PEM) of authorities whose signatures `/v1/provenance` calls trusted."""
    ratings: str | None = None
    """Database of ratings by people: sqlite:///FILE, or postgresql://USER@HOST/NAME. Default: no ratings."""
    timeout_seconds: float = Field(default=600.0, gt=0, le=86_400)
    """Time after which a request is cancelled."""
    max_body_bytes: int = Field(default=2**18, gt=0, le=2**30)
    """Maximum size of a request's body without sounds."""
    max_audio_bytes: int = Field(default=64 * 2**20, gt=0, le=2**30)
    """Maximum size of a body with sounds."""
    max_held_bytes: int = Field(default=256 * 2**20, gt=0, le=2**40)
    """Maximum bytes of all bodies that are received or processed. Beyond that, requests are refused (503)."""
    max_requests: int = Field(default=1000, gt=0, le=1_000_000)
    """Maximum number of requests at a time. Beyond that, requests are refused (503)."""
    wait_seconds: float = Field(default=30.0, ge=0, le=3600)
    """Time that a request waits if the queue of its service is full. Then it is refused (503). 0: no wait."""
    body_seconds: float = Field(default=30.0, gt=0, le=3600)
    """Time that a head, and then a body, may take to arrive."""
    send_seconds: float = Field(default=60.0, gt=0, le=3600)
    """Time in which a client must read on. One that does not is disconnected."""

    @field_validator("listen")
    @classmethod
    def _check_port(cls, listen: str) -> str:
        if listen.startswith("unix"):
            raise ValueError("must be host:port (0.0.0.0:8080 for every interface)")
        return listen

    @model_validator(mode="after")
    def _check_services_tls(self) -> Self:
        if not self.services_tls and (self.services_tls_ca_file or self.services_tls_server_name):
            raise ValueError("services_tls_ca_file and services_tls_server_name need services_tls")
        return self

    @model_validator(mode="after")
    def _check_signature(self) -> Self:
        if (self.sign_cert is None) != (self.sign_key is None):
            raise ValueError("sign_cert and sign_key need each other; give both or neither")
        return self

    @property
    def admits_anonymous(self) -> bool:
        """Whether requests without a token are passed on."""
        return self.is_local if self.anonymous == "auto" else self.anonymous == "allowed"

    @property
    def addresses(self) -> dict[str, str | None]:
        """Addresses of services, by the client's argument."""
        return {
            "target": self.generation,
            "scoring": self.scoring,
            "reward": self.reward,
            "captioning": self.captioning,
            "explanation": self.explanation,
        }

    @property
    def tls(self) -> TLS | None:
        """TLS of the connections to the services; None: plaintext."""
        if not self.services_tls:
            return None
        return TLS(ca_file=self.services_tls_ca_file, server_name=self.services_tls_server_name)

    @property
    def options(self) -> ConnectionOptions:
        """How to reach the services, without an identity of its own. Callers retry, who know how long to."""
        return {
            "tls": self.tls,
            "token": "",
            "allow_insecure_token": self.allow_insecure_token,
            "timeout": self.timeout_seconds,
            "health_check": self.services_health_check,
            "retries": 0,
        }
