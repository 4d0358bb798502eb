"""A cache comes back as it was written, or not at all."""

import json
import os
import random
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from first_trl.cache.format import (
    SEAL,
    CacheError,
    cache_schema,
    dataset_fingerprint,
    render_manifest,
    row_key,
    tokenizer_fingerprint,
)
from first_trl.cache.identity import chat_template_fingerprint
from first_trl.cache.reader import check_cache, check_vocabulary, open_cache
from first_trl.cache_tools import teacher_bytes
from first_trl.files import file_digest
from tests.cache_samples import VOCABULARY, FakeTokenizer, contents, description, make_row, make_rows, write_cache

COLUMNS = ["input_ids", "labels", "teacher_ids", "teacher_log_probs", "teacher_tail_log_prob"]


pytestmark = pytest.mark.usefixtures("arrow_files")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache"


def assert_same_rows(dataset, rows, dtype=np.float16):
    assert len(dataset) == len(rows)
    for found, row in zip(dataset, rows, strict=True):
        assert found["input_ids"] == list(row["input_ids"]) and found["labels"] == list(row["labels"])
        assert found["teacher_ids"] == row["teacher_ids"].tolist()
        assert found["teacher_log_probs"] == row["teacher_log_probs"].astype(dtype).tolist()
        assert found["teacher_tail_log_prob"] == row["teacher_tail_log_prob"].tolist()
        assert found["row_key"] == row_key(row["input_ids"], row["labels"])


@pytest.mark.parametrize("rows_per_shard", [1, 3, 10, 11])
def test_rows_come_back_in_order_whatever_the_size_of_a_shard(path, rows_per_shard):
    rows = make_rows(10)
    manifest = write_cache(path, rows, rows_per_shard=rows_per_shard)
    assert len(manifest["shards"]) == -(-10 // rows_per_shard)
    assert_same_rows(open_cache(path).dataset, rows)


@pytest.mark.parametrize(("dtype", "stored"), [("float16", pa.float16()), ("float32", pa.float32())])
def test_columns_have_the_types_of_the_format_on_disk_and_in_memory(path, dtype, stored):
    rows = make_rows(5, top_k=3)
    write_cache(path, rows, top_k=3, dtype=dtype)
    cache = open_cache(path)
    schema = pa.schema(
        {
            "input_ids": pa.list_(pa.int32()),
            "labels": pa.list_(pa.int32()),
            "teacher_ids": pa.list_(pa.list_(pa.int32(), 3)),
            "teacher_log_probs": pa.list_(pa.list_(stored, 3)),
            "teacher_tail_log_prob": pa.list_(pa.float32()),
            "row_key": pa.string(),
        }
    )
    assert cache.dataset.data.schema.equals(schema) and cache_schema(3, dtype).equals(schema)
    assert cache.dataset.features == datasets.Features.from_arrow_schema(schema)
    assert_same_rows(cache.dataset, rows, np.dtype(dtype))


def test_a_teacher_row_stands_for_each_supervised_token_but_a_first_one(path):
    rows = [make_row(0, supervised=1, length=30), make_row(1, supervised=0, length=4), make_row(2, supervised=3)]
    row = make_row(0, supervised=3, length=4)
    row |= {"input_ids": row["input_ids"][1:], "labels": row["labels"][1:]}
    row |= {name: row[name][1:] for name in COLUMNS[2:]}  # three labels, of which nothing predicts the first
    write_cache(path, [*rows, row])
    dataset = open_cache(path).dataset
    assert [len(row["teacher_ids"]) for row in dataset] == [1, 0, 3, 2]
    assert_same_rows(dataset, [*rows, row])


def test_infinities_survive_and_what_float16_cannot_hold_becomes_one(path):
    row = make_row(0, supervised=2, length=3)
    row["teacher_log_probs"] = np.array([[0, -1e5, -np.inf, -np.inf, -np.inf], [-1e-4, -9.3, -12, -50, -65000]])
    row["teacher_tail_log_prob"] = np.array([-np.inf, -np.inf])
    write_cache(path, [row])
    found = open_cache(path).dataset[0]
    assert found["teacher_log_probs"][0] == [0] + [-np.inf] * 4
    assert np.allclose(found["teacher_log_probs"][1], row["teacher_log_probs"][1], rtol=2**-11)
    assert found["teacher_tail_log_prob"] == [-np.inf, -np.inf]


def test_the_manifest_has_the_totals_and_the_job(path):
    rows = make_rows(9)
    assert write_cache(path, rows) == open_cache(path).manifest
    manifest = open_cache(path).manifest
    mass = 1 - np.exp(np.concatenate([row["teacher_tail_log_prob"] for row in rows]).astype(np.float64))
    totals = manifest["totals"]
    assert totals["rows"] == 9 and totals["supervised_positions"] == len(mass)
    assert totals["teacher_mass_mean"] == pytest.approx(mass.mean(), abs=1e-6)
    assert totals["teacher_mass_p10"] == pytest.approx(np.quantile(mass, 0.1, method="inverted_cdf"), abs=1e-4)
    assert manifest["dataset_fingerprint"] == dataset_fingerprint(row_key(r["input_ids"], r["labels"]) for r in rows)
    assert {name: manifest[name] for name in description()} == description()
    assert (manifest["top_k"], manifest["dtype"], manifest["rows_per_shard"]) == (5, "float16", 4)


@pytest.mark.parametrize("name", ["validation", "odd [name]*"])
def test_datasets_loads_the_folder_as_it_is(tmp_path, name):
    path, rows = tmp_path / name, make_rows(9)
    write_cache(path, rows)
    (path / "README.md").write_text("# A cache")
    if name.isalpha():  # `datasets` reads brackets and stars as patterns
        loaded = datasets.load_dataset("parquet", data_dir=str(path), split="train")
        assert_same_rows(loaded, rows)
        assert loaded.features == open_cache(path).dataset.features
    assert_same_rows(open_cache(path).dataset, rows)


def test_rows_are_memory_mapped_once_and_never_those_of_an_earlier_cache(path, arrow_files):
    write_cache(path, make_rows(4))
    (file,) = open_cache(path).dataset.cache_files
    before, times = os.stat(file["filename"]), {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    assert file["filename"].startswith(str(arrow_files))
    open_cache(path)
    assert os.stat(file["filename"]).st_mtime_ns == before.st_mtime_ns
    shutil.rmtree(path)
    rows = make_rows(8)[4:]
    write_cache(path, rows)
    for name, at in times.items():
        os.utime(path / name, ns=(at, at))
    assert_same_rows(open_cache(path).dataset, rows)
    assert len(list(arrow_files.rglob("*.arrow"))) == 1


@pytest.mark.parametrize("supervised", [63, 1])
def test_the_teacher_costs_at_most_24_bytes_per_supervised_position(path, supervised):
    # ids without any pattern and log-probabilities spread widely: nothing that real text has to compress
    rows = [make_row(i, vocabulary=151_936, supervised=supervised, length=64) for i in range(512)]
    manifest = write_cache(path, rows, rows_per_shard=512)
    assert manifest["totals"]["supervised_positions"] == 512 * supervised
    assert teacher_bytes(open_cache(path)) / (512 * supervised) <= 24


def test_every_flipped_bit_is_refused_with_a_clear_error(path):
    write_cache(path, make_rows(10))
    originals = contents(path)
    bits = {name: random.Random(0).sample(range(8 * len(content)), 40) for name, content in originals.items()}
    chosen = [(name, bit) for name in bits for bit in bits[name]]
    for name, bit in chosen:
        changed = bytearray(originals[name])
        changed[bit // 8] ^= 1 << bit % 8
        (path / name).write_bytes(changed)
        with pytest.raises(CacheError, match=str(path)):
            open_cache(path)
        (path / name).write_bytes(originals[name])
    assert len(chosen) == 160 and len(open_cache(path).dataset) == 10


def swapped_tokenizer():
    tokenizer = FakeTokenizer()
    tokenizer.vocabulary["<3>"], tokenizer.vocabulary["<4>"] = 4, 3
    return tokenizer


MISMATCHES = {
    "two token ids swapped": {"tokenizer": swapped_tokenizer()},
    "one more token": {"tokenizer": FakeTokenizer(VOCABULARY + 1)},
    "no chat template": {"chat_template_sha256": None},
    "another K": {"top_k": 7},
    "another dtype": {"dtype": "float32"},
    "another teacher": {"teacher": {"id": "org/other"}},
    "no adapter": {"teacher": {"adapter_sha256": None}},
    "quantisation": {"teacher": {"quantization": "nf4"}},
    "an entry that the cache lacks": {"teacher": {"attn_implementation": "sdpa"}},
    "other rows": {"dataset_fingerprint": "55" * 32},
    "another split": {"dataset": {"split": "validation"}},
    "another prompt": {"task": {"prompt": "{text}"}},
    "no end of sequence": {"task": {"append_eos": False}},
    "other template arguments": {"task": {"chat_template_kwargs": {"enable_thinking": True}}},
    "fewer template arguments": {"task": {"chat_template_kwargs": {}}},
    "another library": {"library_versions": {"torch": "2.11.0"}},
}


@pytest.fixture(scope="module")
def sound_cache(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", path / "arrow")
        write_cache(path / "cache", make_rows(10))
        return open_cache(path / "cache")


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_cache_that_does_not_fit_is_refused_with_both_values(sound_cache, name):
    with pytest.raises(CacheError) as raised:
        check_cache(sound_cache, **MISMATCHES[name])
    message, found = str(raised.value), sound_cache.manifest
    assert str(sound_cache.path) in message and "To fix it, " in message and "make the cache again" in message
    ((entry, value),) = MISMATCHES[name].items()
    if entry == "tokenizer":
        entry, value = "tokenizer_sha256", tokenizer_fingerprint(value)
    place = entry
    if isinstance(value, dict):
        ((key, value),) = value.items()
        found, entry, place = found[entry], key, f"{place}.{key}"
    assert f"{place} is {found.get(entry, 'absent')!r}, expected {value!r}" in message


def test_a_cache_that_fits_is_accepted(sound_cache):
    tokenizer = FakeTokenizer()
    tokenizer.pad_token_id = 0
    check_cache(
        sound_cache,
        tokenizer=tokenizer,
        chat_template_sha256=chat_template_fingerprint(tokenizer),
        top_k=5,
        teacher={"id": "org/teacher", "quantization": None},
        task={"max_length": 64, "chat_template_kwargs": {"enable_thinking": False}},
    )
    check_vocabulary(sound_cache, VOCABULARY, tokenizer)


def test_every_mismatch_is_named_at_once_and_hostile_values_are_cut_and_cleaned(sound_cache, path):
    with pytest.raises(CacheError, match=r"top_k is 5, expected 3; task.max_length is 64, expected 9"):
        check_cache(sound_cache, top_k=3, task={"max_length": 9})
    write_cache(path, make_rows(4), teacher={"id": "\x1b[2J" + "a" * 100_000})
    with pytest.raises(CacheError) as raised:
        check_cache(open_cache(path), teacher={"id": "org/teacher"})
    assert len(str(raised.value)) < 1000 and "\x1b" not in str(raised.value)


@pytest.mark.parametrize("column", ["teacher_ids", "input_ids"])
def test_a_token_beyond_the_vocabulary_is_named(path, column):
    rows = make_rows(10)
    if column == "teacher_ids":
        rows[6][column][0, 2] = 44
    else:
        rows[6][column][0] = 44
        rows[6]["labels"][0] = -100
    write_cache(path, rows)
    cache = open_cache(path)
    check_vocabulary(cache, 45)
    with pytest.raises(CacheError, match=rf"{column} of row 6 .* token id 44 .* vocabulary has 44 entries"):
        check_vocabulary(cache, 44)
    with pytest.raises(CacheError, match=r"token id 44 \('<44>'\)"):
        check_vocabulary(cache, 44, FakeTokenizer(50))
    with pytest.raises(CacheError, match=r"token id 44 .* tokenizer ends at id 39"):
        check_vocabulary(cache, 64, FakeTokenizer())


def reseal(path, change):
    """Rewrite a manifest as someone would who knows how it is sealed."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    change(manifest)
    manifest.pop(SEAL, None)
    (path / "manifest.json").write_bytes(render_manifest(manifest))


def edit(path, change):
    text = (path / "manifest.json").read_text()
    assert change(text) != text
    (path / "manifest.json").write_text(change(text))


def truncate(file, keep):
    file.write_bytes(file.read_bytes()[:keep])


def swap(path):
    first, second = path / "train-000000.parquet", path / "train-000001.parquet"
    first.rename(path / "x")
    second.rename(first)
    (path / "x").rename(second)


CHANGED = r"is damaged, or was changed after it was written"
K_IS_5 = '"top_k": 5'
DAMAGES = {
    "no folder": (shutil.rmtree, r"no such folder"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), r"has no manifest.json: the cache was never finished"),
    "empty manifest": (lambda p: (p / "manifest.json").write_bytes(b""), CHANGED),
    "manifest of another kind": (lambda p: (p / "manifest.json").write_text("[]"), CHANGED),
    "manifest not in UTF-8": (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe"), CHANGED),
    "nested manifest": (lambda p: (p / "manifest.json").write_text("[" * 10**5), CHANGED),
    "an edited value": (lambda p: edit(p, lambda t: t.replace(K_IS_5, '"top_k": 7')), CHANGED),
    "a key given twice": (lambda p: edit(p, lambda t: t.replace(K_IS_5, '"top_k": 7, "top_k": 5')), CHANGED),
    "other blanks": (lambda p: edit(p, lambda t: t.replace(K_IS_5, '"top_k":  5')), CHANGED),
    "not a number": (lambda p: edit(p, lambda t: t.replace(K_IS_5, '"top_k": NaN')), CHANGED),
    "other version": (lambda p: reseal(p, lambda m: m.update(schema_version=9)), r"schema_version is 9: .* 1"),
    "a wrong type": (lambda p: reseal(p, lambda m: m.update(top_k="5")), r"top_k is '5': .* integer"),
    "a truth for a number": (lambda p: reseal(p, lambda m: m.update(top_k=True)), r"top_k is True: .* integer"),
    "an entry missing": (lambda p: reseal(p, lambda m: m.pop("task")), r"task is absent"),
    "an unknown dtype": (lambda p: reseal(p, lambda m: m.update(dtype="int8")), r"dtype is 'int8': .*'float32'"),
    "a shard without a hash": (lambda p: reseal(p, lambda m: m["shards"][1].pop("sha256")), r"sha256 is absent"),
    "shards listed out of order": (lambda p: reseal(p, lambda m: m["shards"].reverse()), r"named 'train-000002"),
    "a shard outside": (lambda p: reseal(p, lambda m: m["shards"][0].update(name="../x")), r"named '../x'"),
    "other totals": (lambda p: reseal(p, lambda m: m["totals"].update(rows=11)), r"rows is 11, its shards have 10"),
    "other K": (lambda p: reseal(p, lambda m: m.update(top_k=7)), r"columns is .*\[5\].*, the manifest has .*\[7\]"),
    "truncated shard": (lambda p: truncate(p / "train-000001.parquet", 99), r"size in bytes is 99, the manifest has"),
    "missing shard": (lambda p: (p / "train-000001.parquet").unlink(), r"3 shards and lacks 1: train-000001.parquet"),
    "extra shard": (lambda p: shutil.copy(p / "train-000000.parquet", p / "train-000003.parquet"), r"has 4 Parquet"),
    "extra file below": (lambda p: shutil.copytree(p, p / "copy"), r"has 6 Parquet files .* lists 3"),
    "shards swapped": (swap, r"sha256 is|size in bytes is"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_cache_is_refused_with_its_place_and_remedy(path, name):
    damage, message = DAMAGES[name]
    write_cache(path, make_rows(10))
    damage(path)
    with pytest.raises(CacheError, match=f"(?s){path}.*({message})") as raised:
        open_cache(path)
    assert str(raised.value).endswith(".")  # a sentence with the remedy comes last


def test_without_hashing_presence_and_size_are_still_compared(path):
    write_cache(path, make_rows(10))
    shard = path / "train-000001.parquet"
    truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(CacheError, match="size in bytes"):
        open_cache(path, verify=False)


# Contents that no teacher gives, under a manifest that fits them: name -> (what is done to a shard's table, message).
FALSIFIED = {
    "nan": (lambda columns: columns["teacher_log_probs"][2][0].__setitem__(1, float("nan")), "do not sum to 1"),
    "plus fifty nats": (lambda columns: columns["teacher_log_probs"][2][0].__setitem__(0, 50.0), "do not sum to 1"),
    "a tail of three nats": (lambda columns: columns["teacher_tail_log_prob"][2].__setitem__(0, 3.0), "do not sum"),
    "unsorted": (lambda columns: columns["teacher_log_probs"][2][0].reverse(), "not sorted"),
    "a negative id": (lambda columns: columns["teacher_ids"][2][0].__setitem__(1, -7), "outside 0 to 39"),
    "an id beyond the vocabulary": (
        lambda columns: columns["teacher_ids"][2][0].__setitem__(1, 40),
        "outside 0 to 39",
    ),
    "a doubled id": (
        lambda columns: columns["teacher_ids"][2][0].__setitem__(1, columns["teacher_ids"][2][0][0]),
        "the same token kept twice",
    ),
    "a position less": (lambda columns: [columns[name][2].pop() for name in COLUMNS[2:]], "without an entry in tea"),
    "a tail less": (lambda columns: columns["teacher_tail_log_prob"][2].pop(), "teacher_tail_log_prob"),
    "a row that is null": (lambda columns: columns["teacher_ids"].__setitem__(2, None), "teacher_ids holds a null"),
    "a value that is null": (lambda columns: columns["teacher_ids"][2][0].__setitem__(1, None), "ids holds a null"),
    "no token": (lambda columns: [columns[name].__setitem__(2, []) for name in COLUMNS], "no token"),
    "a label less": (lambda columns: columns["labels"][2].pop(), "more tokens than labels"),
    "another label": (lambda columns: columns["labels"][2].__setitem__(-1, 3), "labels other than -100"),
    "a negative token": (lambda columns: columns["input_ids"][2].__setitem__(0, -1), "labels other than -100"),
    "a token beyond": (lambda columns: columns["input_ids"][2].__setitem__(0, 40), "beyond the tokenizer's last, 39"),
}


def falsify(path, change):
    """Rewrite shard 1 as someone would who knows how a cache is sealed."""
    file = path / "train-000001.parquet"
    table = pa.parquet.read_table(file)
    columns = table.to_pydict()
    change(columns)
    pa.parquet.write_table(pa.table(columns, schema=table.schema), file)
    found = {"bytes": file.stat().st_size, "sha256": file_digest(file)}
    reseal(path, lambda manifest: manifest["shards"][1].update(found))


@pytest.mark.parametrize("name", FALSIFIED)
def test_contents_that_no_teacher_gives_are_refused_whatever_the_manifest_says(path, name):
    change, message = FALSIFIED[name]
    write_cache(path, make_rows(10), vocab_size=VOCABULARY)
    open_cache(path)
    falsify(path, change)
    with pytest.raises(CacheError, match=message) as raised:
        open_cache(path)
    assert "train-000001.parquet" in str(raised.value) and ("ow 6" in str(raised.value) or "null" in message)


def test_a_shard_of_few_bytes_and_many_values_is_refused_before_it_is_read(path):
    write_cache(path, make_rows(10))

    file = path / "train-000001.parquet"
    table = pa.parquet.read_table(file)
    for place, (name, value) in enumerate({"input_ids": 7, "labels": -100}.items()):
        values = pa.array(np.full(12_000_000, value, dtype=np.int32))
        lists = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3, len(values)], pa.int32()), values)
        table = table.set_column(place, table.schema.field(name), lists)
    pa.parquet.write_table(table, file)
    found = {"bytes": file.stat().st_size, "sha256": file_digest(file)}
    reseal(path, lambda manifest: manifest["shards"][1].update(found))
    assert found["bytes"] < 10_000
    with pytest.raises(CacheError, match=r"train-000001.parquet: 24,.* values in .* bytes"):
        open_cache(path)


@pytest.mark.parametrize("name", ["manifest.json", "train-000001.parquet"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_regular_file_is_refused_and_never_read(path, name, kind):
    write_cache(path, make_rows(10))
    (path / name).unlink()
    if kind == "pipe":
        os.mkfifo(path / name)
    elif kind == "device":
        (path / name).symlink_to("/dev/zero")
    else:
        (path / name).mkdir()
    with pytest.raises(CacheError, match="not a regular file"):
        open_cache(path)


def test_rows_that_datasets_cannot_copy_are_an_error_of_the_cache(sound_cache, monkeypatch):
    def fail(*_, **__):
        raise datasets.exceptions.DatasetGenerationError("not generated") from ValueError("list of odd length")

    monkeypatch.setattr(datasets.Dataset, "from_parquet", fail)
    with pytest.raises(CacheError, match="cannot be read: list of odd length"):
        open_cache(sound_cache.path)
