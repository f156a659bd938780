"""A Weights & Biases server on this machine, as much of it as the real client asks for.

What arrives can be looked at: runs with history, files and state, artifacts, alerts, saved views,
and every byte received. It can also die or hang. The client's queries are told apart by their
operation's name; a name that is not known here is listed in `unknown` and answered with nothing.
"""

import base64
import gzip
import json
import re
import socket
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "tester"
_OPERATION = re.compile(r"(?:query|mutation)\s+(\w+)")


@dataclass
class StoredRun:
    """One run, as it arrived."""

    project: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    lines: dict[int, str] = field(default_factory=dict)
    num_event_lines: int = 0
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """Rows in their order."""
        return [json.loads(line) for _, line in sorted(self.lines.items())]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of numbers only."""
        return [row for row in self.history if not any(isinstance(v, dict) for v in row.values())]

    @property
    def axes(self) -> dict[str, str]:
        """Metric or pattern -> its x axis, as `define_metric` said it."""
        metrics = self.config["_wandb"]["value"]["m"]
        names = [metric.get("1") or metric.get("2") for metric in metrics]
        return {
            name: names[metric["5"] - 1]
            for name, metric in zip(names, metrics, strict=True)
            if "5" in metric
        }


@dataclass
class StoredArtifact:
    """One version of an artifact: its files by name."""

    name: str
    kind: str
    digest: str
    committed: bool = False
    files: dict[str, bytes] = field(default_factory=dict)


class WandbServer:
    """Starts at once on a free port of the loopback."""

    def __init__(self) -> None:
        self.runs: dict[str, StoredRun] = defaultdict(StoredRun)
        self.artifacts: list[StoredArtifact] = []
        self.alerts: list[dict[str, Any]] = []
        self.views: dict[str, dict[str, Any]] = {}
        self.operations: list[str] = []
        self.unknown: list[str] = []
        self.received: list[bytes] = []
        self.keys: set[str] = set()
        self.dies_after_rows: int | None = None
        self._answering = threading.Event()
        self._answering.set()
        self._lock = threading.Lock()
        self._http = _Http(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def num_rows(self) -> int:
        """Rows of numbers of all runs."""
        return sum(len(run.rows) for run in list(self.runs.values()))

    def hang(self) -> None:
        """Take connections, and answer nothing any more."""
        self._answering.clear()

    def die(self) -> None:
        """Drop every connection and refuse new ones."""
        threading.Thread(target=self._http.shutdown, daemon=True).start()
        self._http.server_close()
        self._http.drop_connections()

    # -- requests --------------------------------------------------------------------------------

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> Any:
        """The reply to one request, as JSON; None means that it hangs until the server ends."""
        self._answering.wait()
        with self._lock:
            self.received.append(path.encode() + b"\n" + body)
            self._note_key(headers)
            if path == "/graphql":
                return self._graphql(json.loads(body))
            if path.endswith("/file_stream"):
                return self._file_stream(path.split("/")[-2], json.loads(body))
            if method == "PUT":
                self._upload(path, body)
        return {}

    def _note_key(self, headers: Any) -> None:
        if (login := headers.get("Authorization", "")).startswith("Basic "):
            self.keys.add(base64.b64decode(login[6:]).decode().partition(":")[2])

    def _file_stream(self, run_id: str, message: dict[str, Any]) -> dict[str, Any]:
        run, files = self.runs[run_id], message.get("files") or {}
        if (history := files.get("wandb-history.jsonl")) is not None:
            for place, line in enumerate(history["content"], start=history["offset"]):
                run.lines[place] = line
        if (events := files.get("wandb-events.jsonl")) is not None:
            run.num_event_lines = events["offset"] + len(events["content"])
        if message.get("complete"):
            run.exit_code = message["exitcode"]
        if self.dies_after_rows is not None and self.num_rows() >= self.dies_after_rows:
            self.die()
        return {"limits": {}}

    def _upload(self, path: str, body: bytes) -> None:
        _, kind, owner, name = path.split("/", 3)
        if kind == "run-files":
            self.runs[owner].files[name] = body
        else:
            self.artifacts[int(owner)].files[name] = body

    # -- GraphQL ---------------------------------------------------------------------------------

    def _graphql(self, message: dict[str, Any]) -> dict[str, Any]:
        operation = (_OPERATION.search(message["query"]) or [None, "?"])[1]
        self.operations.append(operation)
        answer = getattr(self, f"_{operation}", None)
        if answer is None:
            self.unknown.append(operation)
            return {"data": {}}
        return {"data": answer(message.get("variables") or {})}

    def _Viewer(self, asked: dict[str, Any]) -> dict[str, Any]:
        who = {"id": "viewer", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}"}
        return {"viewer": {**who, "teams": {"edges": []}}}

    _GetDefaultEntity = _Viewer

    def _ServerFeaturesQuery(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _OrganizationCoreWeaveOrganizationID(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {"entity": None}

    def _RunResumeStatus(self, asked: dict[str, Any]) -> dict[str, Any]:
        run_id = asked["name"]
        if run_id not in self.runs:
            return {"model": None}
        run = self.runs[run_id]
        tail = json.dumps([run.lines[max(run.lines)]] if run.lines else [])
        summary = run.attributes.get("summaryMetrics") or "{}"
        bucket = {
            "id": f"id-{run_id}", "name": run_id, "summaryMetrics": summary,
            "displayName": run.attributes.get("displayName"), "logLineCount": 0,
            "historyLineCount": len(run.lines), "eventsLineCount": run.num_event_lines,
            "historyTail": tail, "eventsTail": "[]", "config": json.dumps(run.config),
            "tags": [], "notes": None, "wandbConfig": '{"t": 1}',
        }  # fmt: skip
        return {"model": {**_project(run.project), "bucket": bucket}}

    def _UpsertBucket(self, asked: dict[str, Any]) -> dict[str, Any]:
        run_id = asked["name"]
        is_new = run_id not in self.runs
        run = self.runs[run_id]
        run.project = asked.get("project") or run.project
        run.attributes |= {name: value for name, value in asked.items() if value is not None}
        run.config |= json.loads(asked.get("config") or "{}")
        bucket = {
            "id": f"id-{run_id}", "name": run_id, "displayName": asked.get("displayName"),
            "description": None, "config": json.dumps(run.config), "sweepName": None,
            "project": _project(run.project), "historyLineCount": len(run.lines),
        }  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}

    def _CreateRunFiles(self, asked: dict[str, Any]) -> dict[str, Any]:
        run_id = asked["run"]
        files = [
            {"name": name, "uploadUrl": f"{self.url}/run-files/{run_id}/{name}"}
            for name in asked["files"]
        ]
        return {"createRunFiles": {"runID": f"id-{run_id}", "uploadHeaders": [], "files": files}}

    def _MarkRunFilesUploaded(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {"markRunFilesUploaded": {"success": True}}

    def _NotifyScriptableRunAlert(self, asked: dict[str, Any]) -> dict[str, Any]:
        self.alerts.append(asked)
        return {"notifyScriptableRunAlert": {"success": True}}

    def _ArtifactType(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {"project": None}

    def _XXHashDigestsEnabled(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {"entity": {"xxhashDigestsEnabled": False}}

    def _CreateArtifact(self, asked: dict[str, Any]) -> dict[str, Any]:
        given = asked["input"]
        name, digest = given["artifactCollectionName"], given["digest"]
        same = [n for n, a in enumerate(self.artifacts) if (a.name, a.digest) == (name, digest)]
        if not same:
            self.artifacts.append(StoredArtifact(name, given["artifactTypeName"], digest))
        number = same[0] if same else len(self.artifacts) - 1
        state = "COMMITTED" if self.artifacts[number].committed else "PENDING"
        sequence = {"id": name, "latestArtifact": None}
        artifact = {"id": str(number), "state": state, "artifactSequence": sequence}
        return {"createArtifact": {"artifact": artifact}}

    def _CreateArtifactFiles(self, asked: dict[str, Any]) -> dict[str, Any]:
        edges = []
        for spec in asked["input"]["artifactFiles"]:
            number, name = spec["artifactID"], spec["name"]
            node = {
                "id": name, "name": name, "storagePath": name, "displayName": name,
                "uploadUrl": f"{self.url}/artifacts/{number}/{name}", "uploadHeaders": [],
                "uploadMultipartUrls": None, "artifact": {"id": number},
            }  # fmt: skip
            edges.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _CreateArtifactManifest(self, asked: dict[str, Any]) -> dict[str, Any]:
        number = asked["artifactID"]
        file = {
            "id": "manifest", "uploadHeaders": [],
            "uploadUrl": f"{self.url}/artifacts/{number}/wandb_manifest.json",
        }  # fmt: skip
        return {"createArtifactManifest": {"artifactManifest": {"id": number, "file": file}}}

    def _CommitArtifact(self, asked: dict[str, Any]) -> dict[str, Any]:
        artifact = self.artifacts[int(asked["artifactID"])]
        artifact.committed = True
        return {"commitArtifact": {"artifact": {"id": asked["artifactID"], "digest": "d"}}}

    def _View(self, asked: dict[str, Any]) -> dict[str, Any]:
        view = self.views.get(asked["viewName"])
        nodes = [{**view, "spec": json.dumps(view["spec"])}] if view else []
        return {"project": {"allViews": {"edges": [{"node": node} for node in nodes]}}}

    def _UpsertView2(self, asked: dict[str, Any]) -> dict[str, Any]:
        view = {"id": asked.get("id") or f"view-{asked['name']}", "name": asked["name"]}
        is_new = asked["name"] not in self.views
        self.views[asked["name"]] = {**asked, **view, "spec": json.loads(asked["spec"])}
        return {"upsertView": {"view": view, "inserted": is_new}}


def _project(name: str) -> dict[str, Any]:
    return {"id": f"id-{name}", "name": name, "entity": {"id": ENTITY, "name": ENTITY}}


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.connections: set[socket.socket] = set()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of ours."""

    def drop_connections(self) -> None:
        for connection in self.connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # ended by the client
                pass


def _handler(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _reply(self) -> None:
            body = self._body()
            reply = server.answer(self.command, self.path, self.headers, body)
            data = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _reply

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                body = b"".join(iter(self._chunk, b""))
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            is_zipped = self.headers.get("Content-Encoding") == "gzip"
            return gzip.decompress(body) if is_zipped else body

        def _chunk(self) -> bytes:
            size = int(self.rfile.readline(), 16)
            data = self.rfile.read(size)
            self.rfile.readline()
            return data

        def log_message(self, *arguments: Any) -> None:
            """Quiet."""

    return Handler
