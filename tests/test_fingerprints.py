"""Same thing, same digest; any difference that matters to a student, another digest."""

import copy
import hashlib

import numpy as np
import pytest

from first_trl.cache.format import dataset_fingerprint, row_key, tokenizer_fingerprint
from first_trl.cache.identity import chat_template_fingerprint, weights_fingerprint
from tests.cache_samples import FakeTokenizer


def test_a_tokenizer_is_known_by_its_ids_and_not_by_their_order_or_roles():
    tokenizer, reordered, swapped = FakeTokenizer(), FakeTokenizer(), FakeTokenizer()
    reordered.vocabulary = dict(reversed(reordered.vocabulary.items()))
    reordered.pad_token_id = reordered.eos_token_id = 1
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(reordered)
    swapped.vocabulary["<3>"], swapped.vocabulary["<4>"] = 4, 3
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(swapped)


def test_a_chat_template_is_known_by_every_character_and_none_by_none():
    tokenizer = FakeTokenizer()
    other = copy.copy(tokenizer)
    other.chat_template += " "
    assert chat_template_fingerprint(tokenizer) != chat_template_fingerprint(other)
    other.chat_template = None
    assert chat_template_fingerprint(other) is None


def test_a_row_key_is_the_hash_of_lengths_and_int32_bytes_and_a_dataset_that_of_its_rows_in_order():
    expected = b"".join(
        len(values).to_bytes(8, "little") + np.array(values, dtype="<i4").tobytes() for values in ([5, 6], [-100, 6])
    )
    assert row_key([5, 6], [-100, 6]) == hashlib.sha256(expected).hexdigest()
    assert row_key(np.array([5, 6]), np.array([-100, 6])) == row_key([5, 6], [-100, 6])
    assert len({row_key([1, 2], [3]), row_key([1], [2, 3]), row_key([1, 2, 3], []), row_key([3], [1, 2])}) == 4
    keys = [row_key([i], [i]) for i in range(3)]
    assert dataset_fingerprint(iter(keys)) == dataset_fingerprint(keys)
    assert len({dataset_fingerprint(keys), dataset_fingerprint(keys[::-1]), dataset_fingerprint(keys[:2])}) == 3


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "adapter_config.json", "pytorch_model-1.bin"])
def test_weights_are_known_by_the_bytes_of_their_files_and_configuration_alone(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{tmp_path} holds no model weights"):
        weights_fingerprint(tmp_path)
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(b"weights")
    before = weights_fingerprint(tmp_path)
    for other in ("training_args.bin", "README.md", "trainer_state.json"):
        (tmp_path / other).write_bytes(b"anything")
    assert weights_fingerprint(tmp_path) == before
    (tmp_path / name).write_bytes(b"0")
    middle = weights_fingerprint(tmp_path)
    (tmp_path / name).write_bytes(b"1")
    assert len({before, middle, weights_fingerprint(tmp_path)}) == 3
