"""Names on the hub, with a hub that is out of reach and one that answers."""

import http.server
import json
import threading
import time

import datasets
import pytest
from huggingface_hub import constants

from oprd import hub
from oprd.errors import ConfigError, Unreachable
from oprd.models.loading import load_config

CONFIG = json.dumps({"model_type": "qwen2", "hidden_size": 24}).encode()
COMMIT = "0123456789" * 4


class Hub(http.server.BaseHTTPRequestHandler):
    """Has one file, ``config.json`` of ``org/tiny``."""

    asked: list[str]

    def do_HEAD(self):
        self.asked.append(self.path)
        found = self.path == "/org/tiny/resolve/main/config.json"
        self.send_response(200 if found else 404)
        if not found:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(len(CONFIG) if found else 0))
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        if "/org/tiny/" in self.path:
            self.wfile.write(CONFIG)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub on this machine, online mode, and an empty cache."""
    Hub.asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # so that it is put back
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "_set_by_us", False)
    hub._reachable_in.cache_clear()
    yield server
    server.shutdown()
    server.server_close()
    hub._reachable_in.cache_clear()


def test_a_mistyped_directory_fails_in_seconds_without_a_network(server, tmp_path, monkeypatch):
    server.shutdown()
    server.server_close()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "student").mkdir()
    begun = time.monotonic()
    with pytest.raises(Unreachable) as failed:
        load_config("studnet")
    assert time.monotonic() - begun < 20  # retries take a minute and more
    assert str(failed.value) == (
        "no model at 'studnet': there is no such directory on this machine (did you mean "
        f"student?), it is not in the hub's cache, and the hub ({constants.ENDPOINT}) can't be "
        "reached"
    )
    assert constants.HF_HUB_OFFLINE


def test_a_hub_that_answers_is_asked(server):
    assert load_config("org/tiny").hidden_size == 24
    with pytest.raises(
        ConfigError, match=r"no such directory.*loading it from the hub failed"
    ) as e:
        load_config("org/missing")
    assert not isinstance(e.value, Unreachable)
    assert "/org/missing/resolve/main/config.json" in Hub.asked


def test_what_is_in_the_cache_needs_no_hub(server):
    load_config("org/tiny")
    server.shutdown()
    server.server_close()
    hub._reachable_in.cache_clear()
    assert load_config("org/tiny").hidden_size == 24


def test_a_hub_that_comes_back_is_asked_again(server, monkeypatch):
    monkeypatch.setattr(hub, "reachable", lambda: False)
    with pytest.raises(Unreachable):
        load_config("org/tiny")
    hub._reachable_in.cache_clear()
    monkeypatch.setattr(hub, "reachable", lambda: True)
    assert load_config("org/tiny").hidden_size == 24
    assert not constants.HF_HUB_OFFLINE


def test_offline_mode_that_the_user_asked_for_stays_on(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Unreachable, match="HF_HUB_OFFLINE=1 keeps it from being looked up"):
        load_config("org/tiny")
    assert not Hub.asked
