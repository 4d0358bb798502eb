"""What every test shares: no network, and the tiny tokenizer and models of `tests.tiny`."""

import os

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_TELEMETRY="1")

import pytest  # noqa: E402

from tests.tiny import build_model, build_tokenizer  # noqa: E402


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def make_model():
    return build_model
