"""deploy/: Kubernetes, HAProxy, Prometheus, vLLM's parser and ours take what it says to them."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from guilomo_serve import cli, flags
from guilomo_serve.server import access, lifecycle
from tests.serve.helpers import eventually, free_port

pytestmark = pytest.mark.slow  # vLLM's parser

DEPLOY = Path(__file__).parents[2] / "deploy"
VARIANTS = ("one-gpu", "tensor-parallel", "replicas")
KUBERNETES = "1.32"


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


@pytest.fixture(scope="module", params=VARIANTS)
def rendered(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The manifests of a variant, as kubectl would send them."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl, which puts base and variant together, is not installed")
    folder = DEPLOY / "kubernetes" / request.param
    done = subprocess.run(
        [kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def of_kind(manifests: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = (manifest for manifest in manifests if manifest["kind"] == kind)
    return found


def server_of(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    pod = of_kind(manifests, "Deployment")["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    return server


def parsed(args: list[str]) -> Any:
    """What guilomo-serve makes of a container's arguments. Raises if it does not know one."""
    given = [re.sub(r"\$\(\w+\)", "value", arg) for arg in args]
    return flags.parse("guilomo-serve", given, cli._add_flags)


def base_manifests() -> Iterator[dict[str, Any]]:
    for path in sorted((DEPLOY / "kubernetes").rglob("*.yaml")):
        if path.name != "kustomization.yaml":
            yield from documents(path)


def test_kubernetes_takes_the_manifests() -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    kinds = set()
    for manifest in base_manifests():
        kinds.add(manifest["kind"])
        if manifest["kind"] != "ServiceMonitor":  # the Prometheus Operator's
            validate(manifest, KUBERNETES, strict=True)
    assert {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"} < kinds


def test_kubernetes_takes_the_variants(rendered: list[dict[str, Any]]) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    for manifest in rendered:
        if manifest["kind"] != "ServiceMonitor":
            validate(manifest, KUBERNETES, strict=True)
    labels = of_kind(rendered, "Deployment")["spec"]["template"]["metadata"]["labels"]
    monitored = of_kind(rendered, "ServiceMonitor")["spec"]["selector"]["matchLabels"]
    service = of_kind(rendered, "Service")
    assert monitored.items() <= service["metadata"]["labels"].items()
    for selector in (
        service["spec"]["selector"],
        of_kind(rendered, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        of_kind(rendered, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()


def test_guilomo_serve_takes_the_variants_arguments(rendered: list[dict[str, Any]]) -> None:
    server = server_of(rendered)
    args = parsed(server["args"])
    gpus = int(server["resources"]["limits"]["nvidia.com/gpu"])
    assert args.tensor_parallel_size == gpus
    with pytest.raises((flags.UsageError, SystemExit)):
        parsed([*server["args"], "--no-such-flag=1"])
    volumes = {mount["mountPath"] for mount in server["volumeMounts"]}
    # One server has its catalogue on a volume, several have copies there and names elsewhere.
    replicas = of_kind(rendered, "Deployment")["spec"]["replicas"]
    assert (args.state if replicas == 1 else args.state_files) in volumes
    assert args.state.startswith("postgresql://") == (replicas > 1)


def test_a_pod_has_the_time_that_it_needs_to_end() -> None:
    base = documents(DEPLOY / "kubernetes" / "base" / "deployment.yaml")
    pod, server = base[0]["spec"]["template"]["spec"], server_of(base)
    _, seconds = server["lifecycle"]["preStop"]["exec"]["command"]
    needed = int(seconds) + parsed(server["args"]).shutdown_timeout
    needed += lifecycle._CLOSING_S + lifecycle._STOPPING_S
    assert needed < pod["terminationGracePeriodSeconds"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert server[probe]["httpGet"]["path"] in access._OPEN["GET"]


def test_guilomo_serve_takes_the_arguments_of_compose() -> None:
    (compose,) = documents(DEPLOY / "compose" / "compose.yaml")
    replica = compose["services"]["replica-1"]
    args = parsed(replica["command"])
    grace = int(replica["stop_grace_period"].removesuffix("s"))
    assert args.shutdown_timeout + lifecycle._CLOSING_S + lifecycle._STOPPING_S < grace
    assert args.state.startswith("postgresql://database/")
    for service in compose["services"].values():
        for volume in service.get("volumes", ()):
            if volume.startswith("."):
                assert (DEPLOY / "compose" / volume.split(":")[0]).is_file(), volume


def test_compose_and_its_router_and_prometheus_name_the_same_replicas() -> None:
    (compose,) = documents(DEPLOY / "compose" / "compose.yaml")
    replicas = {name for name in compose["services"] if name.startswith("replica-")}
    for name in ("haproxy.cfg", "prometheus.yaml"):
        text = (DEPLOY / "compose" / name).read_text()
        assert set(re.findall(r"(replica-\d):8000", text)) == replicas


class Stand(BaseHTTPRequestHandler):
    """A replica to a load balancer: ready, but who is bad answers no request."""

    protocol_version = "HTTP/1.1"
    bad = ""  # "503", as a replica that ends or has lost its lease; "gone", as one that is killed

    def do_GET(self) -> None:
        self._answer(200)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.bad == "gone":
            self.close_connection = True
        else:
            self._answer(503 if self.bad else 200)

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Says nothing."""


class Streaming(Stand):
    """A replica that streams its answers, in ten parts."""

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for _ in range(10):
            time.sleep(0.02)
            self.wfile.write(b"4\r\npart\r\n")
        self.wfile.write(b"0\r\n\r\n")


@contextmanager
def balanced(kinds: Sequence[type[Stand]], folder: Path) -> Iterator[int]:
    """The port of a HAProxy with our settings before such replicas."""
    haproxy = shutil.which("haproxy", path="/usr/sbin:/usr/bin")
    if haproxy is None:
        pytest.skip("haproxy is not installed")
    stands = [ThreadingHTTPServer(("127.0.0.1", 0), kind) for kind in kinds]
    for stand in stands:
        threading.Thread(target=stand.serve_forever, daemon=True).start()
    port = free_port()
    text = (DEPLOY / "compose" / "haproxy.cfg").read_text().replace("bind :8000", f"bind :{port}")
    for n, stand in enumerate(stands, 1):
        text = text.replace(f"replica-{n}:8000", f"127.0.0.1:{stand.server_port}")
    config = folder / "haproxy.cfg"
    config.write_text(text)
    balancer = subprocess.Popen([haproxy, "-db", "-f", str(config)], stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: answers(f"http://127.0.0.1:{port}"), "HAProxy answers", 20)
        yield port
    finally:
        balancer.terminate()
        balancer.wait()
        for stand in stands:
            stand.shutdown()
            stand.server_close()


@pytest.mark.parametrize("bad", ["503", "gone"])
def test_haproxy_asks_another_replica_for_what_one_does_not_answer(
    bad: str, tmp_path: Path
) -> None:
    kinds = [type("Bad", (Stand,), {"bad": bad}), Stand, Stand]
    with balanced(kinds, tmp_path) as port:
        for n in range(12):  # names, of whom each replica has some
            # Longer than HAProxy keeps by itself; and clients send it after the headers.
            body = json.dumps({"model": f"adapter-{n}", "prompt": 60_000 * "x"}).encode()
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            client.putrequest("POST", "/v1/completions")
            client.putheader("Content-Length", str(len(body)))
            client.endheaders()
            client.send(body)
            assert client.getresponse().status == 200, n
            client.close()


def test_haproxy_passes_parts_of_a_stream_on_as_they_come(tmp_path: Path) -> None:
    """By itself it keeps them for up to 200 ms, to send several at once."""
    parts = []
    with (
        balanced(3 * [Streaming], tmp_path) as port,
        socket.create_connection(("127.0.0.1", port), timeout=20) as client,
    ):
        client.sendall(b"GET / HTTP/1.1\r\nHost: front\r\nConnection: close\r\n\r\n")
        while part := client.recv(2**16):
            parts.append(part)
    assert b"".join(parts).count(b"part") == 10
    assert len(parts) > 5


def answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.ConnectionError:
        return False


def test_vllm_takes_what_the_examples_give_it(tiny_model: Path) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    (stack,) = documents(DEPLOY / "examples" / "production-stack.yaml")
    (spec,) = stack["servingEngineSpec"]["modelSpec"]
    parser = make_arg_parser(FlexibleArgumentParser())
    # As its chart has them (helm/templates/deployment-vllm-multi.yaml).
    args = ["--model", spec["modelURL"], "--enable-lora", "--enable-prefix-caching"]
    args += ["--max_loras", str(spec["vllmConfig"]["maxLoras"]), *spec["vllmConfig"]["extraArgs"]]
    assert parser.parse_args(args).max_lora_rank == flags._MAX_RANK

    (ray,) = documents(DEPLOY / "examples" / "ray_serve.yaml")
    (config,) = ray["applications"][0]["args"]["llm_configs"]
    served = AsyncEngineArgs(model=str(tiny_model), **config["engine_kwargs"])
    assert served.create_engine_config().lora_config.max_lora_rank == flags._MAX_RANK


def test_promtool_takes_the_alerts() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    rules = str(DEPLOY / "prometheus_rules.yaml")
    done = subprocess.run(
        [promtool, "check", "rules", rules], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_each_alert_is_explained() -> None:
    (rules,) = documents(DEPLOY / "prometheus_rules.yaml")
    alerts = [rule["alert"] for group in rules["groups"] for rule in group["rules"]]
    text = (DEPLOY.parent / "docs" / "operations.md").read_text()
    assert 5 <= len(alerts) <= 8
    assert [name for name in alerts if f"`{name}`" not in text] == []
