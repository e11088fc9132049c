from __future__ import annotations

import pytest

from tests.tiny import build_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def bare_tokenizer():
    bare = build_tokenizer()
    bare.chat_template = None
    return bare
