"""What every test shares: no network, and the tiny tokenizer and models of `tests.tiny`."""

import os
import signal

# A shell starts jobs in the background with SIGINT ignored, and what they start inherits that: Ctrl-C would be lost
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_TELEMETRY="1")

import pytest  # noqa: E402

from tests.tiny import build_model, build_tokenizer  # noqa: E402


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def make_model():
    return build_model


@pytest.fixture
def arrow_files(tmp_path, monkeypatch):
    """The folder of memory-mapped rows, one for each test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "arrow")
    return tmp_path / "arrow" / "first_trl"


@pytest.fixture
def hub(monkeypatch):
    """A hub that this process is logged in to, with no waiting between the client's own retries."""
    from tests.loopback_hub import TOKEN, loopback_hub

    with loopback_hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        files = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        from huggingface_hub import set_client_factory
        from huggingface_hub.utils._http import default_client_factory

        set_client_factory(default_client_factory)  # a new session: one made offline stays offline
        yield hub
        set_client_factory(default_client_factory)
