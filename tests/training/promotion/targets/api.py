"""A Kubernetes API server of one namespace: the calls of a promotion, with controllers that act at once.

It speaks real HTTP, so that the tests see what the official client sends.
"""

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

import grpc
from kubernetes import client

from milonga.v1 import generation_pb2, generation_pb2_grpc, model_pb2
from training.cluster.namespace import Namespace
from training.promotion.targets.cluster import PIN_ANNOTATION, Cluster

Json = dict[str, Any]
Calls = TypeVar("Calls", bound=Namespace)


@dataclass
class Request:
    """A request."""

    method: str
    path: str
    query: dict[str, str]
    content_type: str
    body: Any


@dataclass
class Api:
    """The state of the namespace `milonga`."""

    port: int
    """Of the pods' grpc."""
    deployments: dict[str, Json] = field(default_factory=dict)
    pods: dict[str, list[Json]] = field(default_factory=dict)
    lease: Json | None = None
    requests: list[Request] = field(default_factory=list)
    status: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Errors by a pattern of `METHOD path`."""
    roll: Callable[["Api", str], None] = lambda api, name: api.reconcile(name)
    """What the Deployment controller does about a change."""

    def reconcile(self, name: str, fault: Json | None = None) -> None:
        """Give a Deployment the pods that it asks for; `fault` is the state of each one's init container."""
        deployment = self.deployments[name]
        pin = (deployment["spec"]["template"]["metadata"].get("annotations") or {}).get(PIN_ANNOTATION)
        count = deployment["spec"]["replicas"]
        self.pods[name] = [self._pod(f"{name}-{i}", name, pin, fault) for i in range(count)]
        good = 0 if fault else count
        deployment["status"] = {
            "observedGeneration": deployment["metadata"]["generation"],
            "replicas": count,
            "updatedReplicas": count,
            "availableReplicas": good,
        }

    def add(self, name: str, replicas: int, pin: str | None = None) -> None:
        """Make a Deployment."""
        annotations = {PIN_ANNOTATION: pin} if pin else {}
        self.deployments[name] = {
            "metadata": {"name": name, "uid": f"uid-of-{name}", "generation": 1},
            "spec": {
                "replicas": replicas,
                "template": {
                    "metadata": {"annotations": annotations},
                    "spec": {"containers": [{"image": "x"}]},
                },
            },
        }
        self.reconcile(name)

    def pin(self, name: str) -> str | None:
        """What is pinned."""
        found: str | None = self.deployments[name]["spec"]["template"]["metadata"]["annotations"].get(
            PIN_ANNOTATION
        )
        return found

    def _pod(self, name: str, container: str, pin: str | None, fault: Json | None) -> Json:
        ready = "False" if fault else "True"
        return {
            "metadata": {"name": name, "annotations": {PIN_ANNOTATION: pin} if pin else {}},
            "spec": {
                "containers": [{"name": container, "ports": [{"name": "grpc", "containerPort": self.port}]}]
            },
            "status": {
                "podIP": "127.0.0.1",
                "conditions": [{"type": "Ready", "status": ready}],
                "initContainerStatuses": [{"name": "fetch", "state": fault}] if fault else [],
            },
        }

    def answer(self, request: Request) -> tuple[int, Json | Iterator[str]]:
        """What a request gets: an object, or a text as it comes about."""
        self.requests.append(request)
        for pattern, (code, message) in self.status.items():
            if re.search(pattern, f"{request.method} {request.path}"):
                return code, {"kind": "Status", "message": message}
        space = "/namespaces/milonga"
        if (
            found := re.fullmatch(rf"/apis/apps/v1{space}/deployments/(\w+)(/scale)?", request.path)
        ) is not None:
            name = found[1]
            if name not in self.deployments:
                return 404, {"kind": "Status", "message": f'deployments.apps "{name}" not found'}
            deployment = self.deployments[name]
            if request.method == "PATCH":
                before = json.dumps(deployment["spec"])
                if found[2]:
                    deployment["spec"]["replicas"] = request.body["spec"]["replicas"]
                else:
                    template = deployment["spec"]["template"]["metadata"]
                    template["annotations"] = request.body["spec"]["template"]["metadata"]["annotations"]
                if json.dumps(deployment["spec"]) != before:
                    deployment["metadata"]["generation"] += 1
                    self.roll(self, name)
            return 200, deployment
        if request.path == f"/api/v1{space}/pods":
            name = request.query["labelSelector"].partition("=")[2]
            return 200, {"items": self.pods.get(name, [])}
        if request.path.startswith(f"/apis/coordination.k8s.io/v1{space}/leases"):
            if request.method == "GET":
                return (200, self.lease) if self.lease else (404, {"message": "not found"})
            version = (self.lease or {"metadata": {"resourceVersion": "0"}})["metadata"]["resourceVersion"]
            if request.method == "PUT" and request.body["metadata"].get("resourceVersion") != version:
                return 409, {"message": "the object has been modified"}
            metadata = {**request.body["metadata"], "resourceVersion": str(int(version) + 1)}
            self.lease = {**request.body, "metadata": metadata}
            return 200, self.lease
        return 404, {"kind": "Status", "message": f"nothing is at {request.path}"}


class Weights(generation_pb2_grpc.GenerationServiceServicer):
    """The service in every pod: says which weights it has."""

    def __init__(self) -> None:
        self.digest = ""

    def GenerateAudio(self, request: Any, context: Any) -> Any:
        """Not request."""
        raise NotImplementedError

    StreamGenerateAudio = GenerateAudio

    def GetModel(self, request: Any, context: Any) -> generation_pb2.GetModelResponse:
        """See generation.proto."""
        return generation_pb2.GetModelResponse(
            model=model_pb2.ModelVersion(name="milonga-tango", version="?", digest=self.digest)
        )


@contextlib.contextmanager
def weights_served() -> Iterator[tuple[Weights, int]]:
    """A service, and its port."""
    server = grpc.server(ThreadPoolExecutor(4))
    weights = Weights()
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(weights, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield weights, port
    finally:
        server.stop(0).wait()


@contextlib.contextmanager
def api_served(api: Api, *, patience: float = 0.5) -> Iterator[Cluster]:
    """The official client of a real HTTP server."""
    with namespace_served(api, Cluster, patience=patience) as cluster:
        yield cluster


@contextlib.contextmanager
def namespace_served(api: Api, kind: type[Calls], *, patience: float = 0.5) -> Iterator[Calls]:
    """It, with the calls of `kind`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            url = urlsplit(self.path)
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            request = Request(
                self.command,
                url.path,
                query,
                self.headers.get("Content-Type") or "",
                json.loads(text or b"null"),
            )
            code, answer = api.answer(request)
            self.send_response(code)
            if not isinstance(answer, dict):
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for part in answer:
                    self.wfile.write(f"{len(part.encode()):x}\r\n{part}\r\n".encode())
                self.wfile.write(b"0\r\n\r\n")
                return
            body = json.dumps(answer).encode()
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PATCH = do_PUT = do_POST = _any

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    configuration = client.Configuration()
    configuration.host = f"http://127.0.0.1:{server.server_port}"
    configuration.retries = False
    try:
        yield kind("milonga", configuration=configuration, where="the cluster test", patience=patience)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
