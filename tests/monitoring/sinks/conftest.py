"""A real https server on loopback, with a certificate authority of its own."""

import http.server
import shutil
import ssl
import subprocess
import threading
import time
from pathlib import Path

import pytest

HOSTS = "DNS:localhost,DNS:hook.example"


@pytest.fixture(scope="session")
def certificate(tmp_path_factory) -> Path:
    """Key and self-signed certificate of localhost and hook.example, in one file."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate of the test's server")
    folder = tmp_path_factory.mktemp("certificate")
    key, found = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        [
            *"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes".split(),
            *"-days 2 -subj /CN=localhost -addext".split(), f"subjectAltName={HOSTS}",
            *f"-keyout {key} -out {found}".split(),
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    found.write_bytes(key.read_bytes() + found.read_bytes())
    return found


class Server:
    """Answers with `statuses` one after the other, the last one for ever; `hang` drips bytes."""

    def __init__(self, certificate: Path) -> None:
        self.statuses, self.headers, self.hang = [200], {}, False
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        self.port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _handler(self):
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                server.requests.append((self.path, dict(self.headers), body))
                if server.hang:
                    return self._drip()
                statuses = server.statuses
                self.send_response(statuses.pop(0) if len(statuses) > 1 else statuses[0])
                for name, value in server.headers.items():
                    self.send_header(name, value)
                self.end_headers()

            def _drip(self):
                """A byte now and then: never silent for long, never done."""
                try:
                    for letter in "HTTP/1.1 200 and so on" * 20:
                        self.wfile.write(letter.encode())
                        self.wfile.flush()
                        time.sleep(0.05)
                except OSError:
                    self.close_connection = True

            def log_message(self, *args):
                """Tests need no log."""

        return Handler


@pytest.fixture
def server(certificate):
    started = Server(certificate)
    yield started
    started.close()
