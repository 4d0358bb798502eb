"""A cache is shown as it is, verified against its teacher, and comes back from the Hub as it was."""

import math
import re
import shutil

import numpy as np
import pytest
import yaml

from first_trl import __main__ as command
from first_trl import cache_tools
from first_trl.cache.format import CacheError
from first_trl.cache.reader import open_cache
from first_trl.cache_tools import build_card, check_keys, compare_with_teacher, teacher_bytes
from first_trl.stages import cache as stage
from tests.cache_recipe import write_recipe
from tests.cache_samples import contents, description, make_row, make_rows, write_cache
from tests.tiny import build_model, build_tokenizer

pytestmark = pytest.mark.usefixtures("arrow_files")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with its caches, and the teacher they were made by."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        stage.main([str(write_recipe(folder, model={"initializer_range": 0.5}))])
    return folder


@pytest.fixture
def path(folder):
    return folder / "runs" / "tiny" / "cache" / "train"


def run(capsys, *arguments):
    """(exit status, output, errors) of `first-trl cache ...`."""
    capsys.readouterr()
    status = command.main(["cache", *map(str, arguments)])
    said = capsys.readouterr()
    return status, said.out, said.err


# inspect


def test_inspect_shows_totals_bytes_mass_confidence_and_ten_examples_in_words(capsys, path):
    status, page, _ = run(capsys, "inspect", path)
    cache, tokenizer = open_cache(path), build_tokenizer()
    assert status == 0 and "40 in 10 shards" in page and "supervised positions    80\n" in page
    whole, ours = sum(file.stat().st_size for file in path.glob("*.parquet")), teacher_bytes(cache)
    assert 80 * 10 < ours < whole and f"{ours:,} bytes, {ours / 80:.1f} per supervised position" in page
    assert f"{whole:,} bytes, {whole / 80:.1f} per supervised position" in page
    assert f"mean {cache.manifest['totals']['teacher_mass_mean']:.4f}" in page
    assert "all other tokens        their exact sum" in page
    assert page.count("  row ") == 10 and page.count("label '<eos>'") == 10
    bins = [int(line.split()[3]) for line in page.splitlines() if " to " in line]
    assert len(bins) == 10 and sum(bins) == 80
    row = cache.dataset[0]
    for token, log_prob in zip(row["teacher_ids"][0], row["teacher_log_probs"][0], strict=True):
        assert f"{tokenizer.decode([token])!r} {math.exp(log_prob):.3f}" in page
    assert f"all others {math.exp(row['teacher_tail_log_prob'][0]):.3f}" in page
    assert "'Review : " in page and page.count("label 'good'") + page.count("label 'bad'") == 10


def test_inspect_without_a_tokenizer_shows_ids_and_says_so(capsys, tmp_path):
    write_cache(
        tmp_path / "cache", [make_row(0), make_row(1, supervised=0, length=3), make_row(2, supervised=9, length=10)]
    )
    status, page, _ = run(capsys, "inspect", tmp_path / "cache")
    assert status == 0 and "--tokenizer FOLDER_OR_ID shows them as text" in page and "and 6 more positions" in page


def test_inspect_refuses_a_tokenizer_that_would_show_other_words(capsys, path, tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["surprise"])
    tokenizer.save_pretrained(tmp_path / "other")
    status, _, errors = run(capsys, "inspect", path, "--tokenizer", tmp_path / "other")
    assert status == 1 and "tokenizer_sha256 is " in errors and "expected" in errors


# verify


def test_verify_hashes_everything_and_says_what_it_did_not_do(capsys, path, tmp_path):
    status, said, _ = run(capsys, "verify", path)
    assert status == 0 and "10 shards" in said and "40 rows: all as the manifest says" in said
    assert "The teacher was not run" in said
    shutil.copytree(path, tmp_path / "cache")
    shard = tmp_path / "cache" / "train-000004.parquet"
    shard.write_bytes(shard.read_bytes()[:-9] + b"x" + shard.read_bytes()[-8:])
    status, _, errors = run(capsys, "verify", tmp_path / "cache")
    assert status == 1 and "train-000004.parquet is damaged: its sha256 is" in errors


def test_verify_runs_the_teacher_again_and_refuses_other_weights_with_both_hashes(capsys, folder, path, tmp_path):
    status, said, _ = run(capsys, "verify", path, "--teacher", folder / "teacher", "--rows", "40")
    assert status == 0 and "40 rows with 80 supervised positions run again" in said
    build_model(27, seed=1).save_pretrained(tmp_path / "teacher")
    build_tokenizer().save_pretrained(tmp_path / "teacher")
    status, _, errors = run(capsys, "verify", path, "--teacher", tmp_path / "teacher")
    assert status == 1 and "teacher.weights_sha256 is '" in errors and "', expected '" in errors


def test_a_teacher_that_changed_a_little_exceeds_the_tolerance(folder, path):
    import torch
    from transformers import AutoModelForCausalLM

    model, cache = AutoModelForCausalLM.from_pretrained(folder / "teacher").eval(), open_cache(path)
    found = float(re.search(r"probabilities: ([\d.e-]+)", compare_with_teacher(cache, model, vocab_limit=27))[1])
    assert 1e-6 < found < 2.5e-4  # half a step of float16
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.02)
    with pytest.raises(CacheError, match="This is not the teacher of"):
        compare_with_teacher(cache, model, vocab_limit=27)


@pytest.mark.parametrize("kept", [slice(0, 5), slice(1, 6), None])  # the most probable, the next ones, others
def test_a_sample_is_compared_by_its_tokens_and_by_their_rank(tmp_path, kept):
    from first_trl.scoring import teacher_rows
    from tests.test_trainer import random_examples

    model, examples = build_model(27).eval(), random_examples(8, 27)
    rows = teacher_rows(model, examples, top_k=6, tokens_per_batch=64)
    for row in rows:
        left_out = row["teacher_log_probs"][:, 0 if kept == slice(1, 6) else 5]
        row |= {name: row[name][:, kept or slice(0, 5)] for name in ("teacher_ids", "teacher_log_probs")}
        row["teacher_tail_log_prob"] = np.logaddexp(row["teacher_tail_log_prob"], left_out)
        row["teacher_ids"] = row["teacher_ids"] if kept else (row["teacher_ids"] + 1) % 27
    write_cache(tmp_path / "cache", rows, teacher={**description()["teacher"], "dtype": "float32"})
    cache = open_cache(tmp_path / "cache")
    if kept == slice(0, 5):
        assert "run again" in compare_with_teacher(cache, model, vocab_limit=27)
        return
    with pytest.raises(CacheError, match="This is not the teacher"):
        compare_with_teacher(cache, model, vocab_limit=27)


def test_a_key_that_is_not_its_rows_is_found_where_the_bytes_are_as_the_manifest_says(tmp_path, monkeypatch):
    monkeypatch.setattr("first_trl.cache.shard.row_key", lambda *_: "ab" * 32)
    write_cache(tmp_path / "cache", make_rows(6))
    with pytest.raises(CacheError, match=f"row 0 has row_key {'ab' * 32}, its tokens give"):
        check_keys(open_cache(tmp_path / "cache"))


# the Hub


def test_a_cache_comes_back_from_the_hub_as_it_was_with_a_card(hub, path, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    shutil.copytree(path, tmp_path / "cache")
    (tmp_path / "cache" / ".lock").touch()
    before = contents(path)
    status, _, errors = run(capsys, "push", tmp_path / "cache", "me/reviews-cache")
    assert status == 1 and "--license, e.g. cc-by-4.0, or unknown" in errors and not hub.repos
    licensed = ("--license", "cc-by-4.0", "--language", "en")
    assert run(capsys, "push", tmp_path / "cache", "me/reviews-cache", *licensed)[0] == 0
    files = hub.files("datasets/me/reviews-cache")
    card = files.pop("README.md").decode()
    assert files == before
    metadata = yaml.safe_load(card.split("---")[1])
    assert (metadata["license"], metadata["language"]) == ("cc-by-4.0", ["en"])
    assert metadata["size_categories"] == "n<1K" and "were taken from: cc-by-4.0." in card
    assert metadata["configs"] == [{"config_name": "default", "data_files": "train-*.parquet"}]
    assert 'open_cache("me/reviews-cache")' in card and "80" in card
    cache = open_cache("me/reviews-cache")
    assert cache.dataset.to_list() == open_cache(path).dataset.to_list()
    assert run(capsys, "push", tmp_path / "cache", "me/reviews-cache", *licensed, "--revision", "v2")[0] == 0
    assert open_cache("me/reviews-cache", revision="v2").manifest == cache.manifest
    with pytest.raises(CacheError, match="the Hub does not give a data set me/reviews-cache at revision 'v3'"):
        open_cache("me/reviews-cache", revision="v3")


def test_a_teacher_or_tokenizer_that_is_not_there_is_one_line_even_for_a_cache_made_by_hand(tmp_path, path, capsys):
    write_cache(tmp_path / "cache", make_rows(4), teacher={"id": "org/teacher"})
    for arguments in (
        ("verify", tmp_path / "cache", "--teacher", "org/none"),
        ("inspect", path, "--tokenizer", tmp_path / "none"),
    ):
        status, _, errors = run(capsys, *arguments)
        assert status == 1 and "cannot be loaded" in errors and "Traceback" not in errors


def test_a_folder_of_that_name_comes_before_the_hub(path, tmp_path, monkeypatch):
    shutil.copytree(path, tmp_path / "runs" / "cache")
    monkeypatch.chdir(tmp_path)
    assert len(open_cache("runs/cache").dataset) == 40
    with pytest.raises(CacheError, match="runs/cache is a folder here, which has no revision 'v2'"):
        open_cache("runs/cache", revision="v2")
    with pytest.raises(CacheError, match=r"There is no folder runs/cach here, and the Hub does not give .*HF_HUB_OFF"):
        open_cache("runs/cach")


@pytest.mark.parametrize(
    ("prompt", "cell"),
    [
        ("{text}", "`{text}`"),
        ("a | `b`\n{text}", "`` a \\| `b`\\n{text} ``"),
        ("`` {text} ``` <img>", "```` `` {text} ``` <img> ````"),
    ],
)
def test_the_card_tells_no_path_of_this_machine_and_survives_odd_names_and_templates(tmp_path, prompt, cell):
    task = {"prompt": prompt, "completion": "{label}", "max_length": 9}
    teacher = {**description()["teacher"], "id": "<img src=x>\n# [a](http://b) `c`"}
    extra = {"cache": 0, "size": 0, "license": "mit"}  # names that the templates use
    write_cache(tmp_path / "cache", make_rows(4), task=task, teacher=teacher, **extra)
    cache = open_cache(tmp_path / "cache")
    card = build_card(cache, "me/it", "unknown")
    assert f"{sum(shard['bytes'] for shard in cache.manifest['shards']):,} bytes" in cache_tools.describe(cache)
    assert str(tmp_path) not in card and "is not known: ask" in card
    assert [line for line in card.splitlines() if line.startswith("| prompt")] == [f"| prompt | {cell} |"]
    assert r"# Teacher cache: &lt;img src=x&gt; \# \[a\](http://b) \`c\`" in card.splitlines()


def test_licence_and_language_are_those_that_the_data_set_of_the_rows_names(tmp_path, monkeypatch):
    from huggingface_hub import DatasetCard

    asked = []

    def load(name, **options):
        asked.append(name)
        return DatasetCard("---\nlicense: mit\nlanguage: [de]\n---\n")

    monkeypatch.setattr(DatasetCard, "load", load)
    found = cache_tools.source_card({"path": "org/reviews", "files_sha256": None})
    assert (found.license, found.language, asked) == ("mit", ["de"], ["org/reviews"])
    assert cache_tools.source_card({"path": "json", "files_sha256": "00"}).license is None
    write_cache(tmp_path / "cache", make_rows(4) * 300, rows_per_shard=1200)
    card = build_card(open_cache(tmp_path / "cache"), "me/it", found.license, found.language)
    metadata = yaml.safe_load(card.split("---")[1])
    assert (metadata["license"], metadata["size_categories"]) == ("mit", "1K<n<10K")


@pytest.mark.parametrize("leak", ["hf_" + "a" * 30, "home"])
def test_a_cache_with_a_token_or_a_path_in_its_manifest_is_not_published(tmp_path, leak, hub, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "someone"))
    leak = str(tmp_path / "someone" / "secrets") if leak == "home" else leak
    write_cache(tmp_path / "cache", make_rows(4), dataset={"path": leak})
    status, _, errors = run(capsys, "push", tmp_path / "cache", "me/it", "--license", "mit")
    assert status == 1 and "the card holds" in errors and not hub.repos


@pytest.mark.parametrize("quantization", [None, "nf4", "fp4", "int8"])
def test_verify_loads_the_teacher_as_its_manifest_says(folder, path, monkeypatch, quantization):
    loaded = {}
    monkeypatch.setattr("first_trl.modeling.load_model", lambda path, **arguments: loaded.update(arguments))
    cache = open_cache(path)
    cache.manifest["teacher"]["quantization"] = quantization
    cache_tools._load_teacher(cache, str(folder / "teacher"))
    config = loaded["quantization_config"]
    if quantization is None:
        assert config is None
    else:
        assert config.load_in_8bit == (quantization == "int8") and config.load_in_4bit == (quantization != "int8")
        assert quantization == "int8" or config.bnb_4bit_quant_type == quantization
