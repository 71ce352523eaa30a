"""A folder with a tokenizer that fits the tiny checkpoints."""

import pytest

from ..tiny import byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return folder
