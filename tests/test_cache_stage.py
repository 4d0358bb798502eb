"""The cache stage as a user runs it: under several processes, killed, restarted, and read by the stages after it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import count
from pathlib import Path

import datasets
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import first_trl.scoring
from first_trl.cache.format import CacheError, shard_name
from first_trl.cache.identity import library_versions, open_recipe_cache, teacher_identity
from first_trl.cache.reader import parquet_files
from first_trl.cache.writer import write_shards
from first_trl.files import new_folder
from first_trl.recipe import load_recipe, teacher_section
from first_trl.run import Run
from first_trl.stages import cache as stage
from first_trl.stages import distill
from tests.cache_recipe import write_recipe
from tests.cache_samples import contents, make_row, make_rows, small_job, whole_job
from tests.tiny import build_model, build_tokenizer

ROOT = Path(__file__).parent.parent
ROLES = ("train", "validation")


pytestmark = pytest.mark.usefixtures("arrow_files")


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def launch(recipe, processes, *overrides):
    """Start the stage under accelerate, as `first-trl cache` does."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", f"--num_processes={processes}", "--num_machines=1"]
    launcher += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    launcher += ["--multi_gpu"] if processes > 1 else []  # accelerate's name for torchrun; gloo where there is no GPU
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", "first_trl.stages.cache", str(recipe), *overrides]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def finish(job):
    _, said = job.communicate(timeout=300)
    assert job.returncode == 0, said[-3000:]
    return said


def caches(folder):
    return [contents(folder / "tiny" / "cache" / role) for role in ROLES]


def ranks_of(job):
    """Process ids of the workers that a launch has started, by rank."""
    ranks = {}
    for child in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split():
        variables = dict(
            entry.partition(b"=")[::2] for entry in Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        )
        if b"RANK" in variables:
            ranks[int(variables[b"RANK"])] = int(child)
    return ranks


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def num_shards(folder, role="*"):
    return sum(len(list(folder.glob(f"tiny/cache/{place}{role}/train-*.parquet"))) for place in ("", ".new/"))


# Processes and kills


@pytest.mark.slow
def test_one_two_and_three_processes_and_a_restart_after_a_kill_write_the_same_bytes(tmp_path):
    recipe, runs = write_recipe(tmp_path, rows=600), tmp_path / "processes"
    for processes in (1, 2, 3):
        finish(launch(recipe, processes, f"--output_dir={runs / str(processes)}"))
    assert caches(runs / "1") == caches(runs / "2") == caches(runs / "3")
    job = launch(recipe, 3, f"--output_dir={runs / 'killed'}")
    wait_until(lambda: num_shards(runs / "killed") >= 20)
    os.kill(ranks_of(job)[1], signal.SIGKILL)
    said = job.communicate(timeout=300)[1]
    assert job.returncode != 0 and "SIGKILL" in said
    left = num_shards(runs / "killed", "train")
    assert 20 <= left < 150 and not list((runs / "killed").glob("tiny/cache/**/manifest.json"))
    finish(launch(recipe, 2, f"--output_dir={runs / 'killed'}"))
    assert caches(runs / "killed") == caches(runs / "1")


# One process's shards


def encode_same(row, index):
    assert row["number"] == index
    return {name: make_row(index)[name] for name in ("input_ids", "labels")}


def teacher_of(made=None):
    """Rows that look like a teacher's; the tokens of each shard's first row go to `made`."""

    def run_teacher(examples, progress):
        by_tokens = {tuple(row["input_ids"]): row for row in make_rows(60)}
        rows = [by_tokens[tuple(example["input_ids"])] for example in examples]
        if made is not None:
            made.append(tuple(rows[0]["input_ids"]))
        progress(sum(len(row["input_ids"]) for row in rows))
        return rows

    return run_teacher


def numbers(count):
    return datasets.Dataset.from_dict({"number": list(range(count))})


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stream_and_a_table_make_the_same_shards_under_any_number_of_processes(tmp_path, streaming):
    dataset = numbers(39).to_iterable_dataset() if streaming else numbers(39)
    for processes in (1, 3, 40):
        with small_job(tmp_path / str(processes)).hold() as writer:
            counts = [
                write_shards(writer, dataset, encode_same, teacher_of(), rank=rank, processes=processes)
                for rank in range(processes)
            ]
            assert set(counts) == {39}
            writer.finish(39)
    whole_job(tmp_path / "plain", tmp_path / "log", 39)
    assert all(contents(tmp_path / str(n)) == contents(tmp_path / "plain") for n in (1, 3, 40))


def test_missing_shards_are_dealt_out_evenly_after_a_restart_on_another_number_of_processes(tmp_path):
    with small_job(tmp_path / "cache").hold() as writer:
        for rank in (0, 2):  # of three processes the second did nothing
            write_shards(writer, numbers(60), encode_same, teacher_of(), rank=rank, processes=3)
        present, made = parquet_files(tmp_path / "cache"), [[], []]
        for rank in range(2):
            write_shards(
                writer, numbers(60), encode_same, teacher_of(made[rank]), present=present, rank=rank, processes=2
            )
        assert [len(rank) for rank in made] == [5, 5] and not set(made[0]) & set(made[1])
        assert writer.finish(60)["totals"]["rows"] == 60


def test_a_shard_of_rows_that_have_changed_is_made_again(tmp_path):
    with small_job(tmp_path / "cache").hold() as writer:
        write_shards(writer, numbers(10), encode_same, teacher_of())
        made = []
        write_shards(writer, numbers(10), encode_same, teacher_of(made))
        assert made == []
        shifted = datasets.Dataset.from_dict({"number": [0, 1, 2, 9]})

        def encode(row, index):
            return encode_same(row, row["number"])

        write_shards(writer, shifted, encode, teacher_of(made))
        assert made == [tuple(make_row(2)["input_ids"])]


def test_a_shard_is_written_while_the_teacher_runs_over_the_next(tmp_path, monkeypatch):
    with small_job(tmp_path / "cache").hold() as writer:
        write, next_is_running, runs = writer.write_shard, threading.Event(), count()

        def slow_write(index, rows):
            assert index == 2 or next_is_running.wait(30), "the teacher waited for the disk"
            write(index, rows)

        def run_teacher(examples, progress):
            if next(runs) > 0:
                next_is_running.set()
            return teacher_of()(examples, progress)

        monkeypatch.setattr(writer, "write_shard", slow_write)
        write_shards(writer, numbers(6), encode_same, run_teacher)
        writer.finish(6)


@pytest.mark.parametrize("failing", [0, 3, 4])
def test_a_shard_that_cannot_be_written_ends_the_run_with_its_error(tmp_path, monkeypatch, failing):
    made = []
    with small_job(tmp_path / "cache").hold() as writer:
        write = writer.write_shard

        def full_disk(index, rows):
            if index == failing:
                raise CacheError("No space left on device")
            write(index, rows)

        monkeypatch.setattr(writer, "write_shard", full_disk)
        with pytest.raises(CacheError, match="No space left"):
            write_shards(writer, numbers(10), encode_same, teacher_of(made))
        assert len(made) <= failing + 2  # the next was under way
        assert sorted(parquet_files(tmp_path / "cache")) == [shard_name(i) for i in range(failing)]


def test_an_interrupted_cache_outlives_an_upgrade_and_other_settings_of_speed(tmp_path, on_cpu, monkeypatch, capsys):
    recipe, folder = write_recipe(tmp_path), tmp_path / "runs" / "tiny"
    stage.main([str(recipe)])
    stage.main([str(recipe), "--cache.tokens_per_batch=64"])
    assert "cache: up to date, nothing to do" in capsys.readouterr().err
    for name in (".records/cache.json", "cache/train/manifest.json", "cache/train/train-000007.parquet"):
        (folder / name).unlink()
    before, versions = contents(folder / "cache" / "train"), library_versions()
    with monkeypatch.context() as patch:
        patch.setattr("first_trl.cache.identity.library_versions", lambda: {**versions, "transformers": "99.0.0"})
        with pytest.raises(SystemExit, match=f"transformers is '{versions['transformers']}', expected '99.0.0'"):
            stage.main([str(recipe)])
    assert contents(new_folder(folder / "cache" / "train")) == before
    made, teacher_rows = [], first_trl.scoring.teacher_rows

    def counted(model, examples, **options):
        made.append(options["tokens_per_batch"])
        return teacher_rows(model, examples, **options)

    monkeypatch.setattr("first_trl.scoring.teacher_rows", counted)
    stage.main([str(recipe), "--cache.tokens_per_batch=32"])
    assert made == [32], "the one shard that was missing"
    assert (
        before.items() <= contents(folder / "cache" / "train").items() and num_shards(tmp_path / "runs", "train") == 10
    )


def test_every_setting_of_the_cache_but_those_of_speed_is_among_what_it_is_made_from(tmp_path):
    path, server = write_recipe(tmp_path), ["--cache.backend=server", "--cache.server_url=http://127.0.0.1:1"]
    settings = Run(load_recipe(path)).inputs("cache")["settings"]["cache"]
    assert load_recipe(path).to_dict()["cache"].keys() - settings.keys() == {
        "tokens_per_batch",
        "server_requests",
        "teacher",
    }
    few, many = (load_recipe(path, [*server, f"--cache.server_requests={n}"]) for n in (1, 64))
    few, many, here = (Run(recipe).inputs("cache") for recipe in (few, many, load_recipe(path)))
    assert few == many != here


# What the stages after it refuse


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with its caches made by a folder of weights, and one whose teacher is an adapter."""
    from peft import LoraConfig, get_peft_model

    folders = {}
    for kind in ("plain", "adapter"):
        folder = tmp_path_factory.mktemp(kind)
        recipe = write_recipe(folder)
        if kind == "adapter":
            (folder / "teacher").rename(folder / "base")
            model = AutoModelForCausalLM.from_pretrained(folder / "base")
            config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
            get_peft_model(model, config).save_pretrained(folder / "teacher")
            build_tokenizer().save_pretrained(folder / "teacher")
            recipe.write_text(recipe.read_text().replace(f"_path: {folder / 'teacher'}", f"_path: {folder / 'base'}"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ACCELERATE_USE_CPU", "true")
            stage.main([str(recipe)])
        folders[kind] = folder
    return folders


def swap_ids(folder, name="teacher"):
    """Give two tokens of a tokenizer each other's ids."""
    file = folder / name / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    words["good"], words["bad"] = words["bad"], words["good"]
    file.write_text(json.dumps(content))


def add_template(folder):
    (folder / "teacher" / "chat_template.jinja").write_text("{{ messages[0].content }}")


def other_weights(folder, name="teacher"):
    build_model(27, seed=1).save_pretrained(folder / name)


def other_adapter(folder):
    file = folder / "teacher" / "adapter_model.safetensors"
    weights = {name: tensor + 1 for name, tensor in load_file(file).items()}
    save_file(weights, file)


def student(folder, vocab_size=27, **tokens):
    """A student's folder beside the teacher's."""
    shutil.copytree(folder / "teacher", folder / "student")
    build_model(vocab_size).save_pretrained(folder / "student")


def bigger_student(folder):
    student(folder, 28)
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["surprise"])
    tokenizer.save_pretrained(folder / "student")


def swapped_student(folder):
    student(folder)
    swap_ids(folder, "student")


def edit(file, old, new):
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))


def shards(folder, index, role="train"):
    return folder / "runs" / "tiny" / "cache" / role / shard_name(index)


def truncate(folder):
    shards(folder, 3).write_bytes(shards(folder, 3).read_bytes()[:-100])


STUDENT = ["--distill.model_name_or_path={folder}/student"]
HASHES = "'[0-9a-f]{64}'"
DIFFERS = f"is {HASHES}, expected {HASHES}"
# name -> (what happens to the run's folder, arguments of the command, both sides in the message)
MISMATCHES = {
    "the student's tokenizer with two ids swapped": (swapped_student, STUDENT, f"tokenizer_sha256 {DIFFERS}"),
    "a student with one more token": (bigger_student, STUDENT, f"tokenizer_sha256 {DIFFERS}"),
    "a student whose head is too small": (
        lambda folder: student(folder, 20),
        STUDENT,
        r"has token id 2\d .* the student's vocabulary has 20",
    ),
    "the teacher's tokenizer with two ids swapped": (swap_ids, [], f"tokenizer_sha256 {DIFFERS}"),
    "another chat template": (add_template, [], f"chat_template_sha256 is None, expected {HASHES}"),
    "another prompt": (
        None,
        ["--task.prompt=Film : {{text}}"],
        "task.prompt is 'Review : {text} Sentiment :', expected 'Film : {text}'",
    ),
    "another max_length": (None, ["--task.max_length=50"], "task.max_length is 60, expected 50"),
    "closed answers": (None, ["--task.choices", "good", "bad"], r"task.choices is None, expected \['good', 'bad'\]"),
    "another K": (None, ["--cache.top_k=4"], "top_k is 5, expected 4"),
    "another type": (None, ["--cache.dtype=float32"], "dtype is 'float16', expected 'float32'"),
    "another revision": (None, ["--cache.teacher_revision=v2"], "teacher.revision is 'main', expected 'v2'"),
    "another teacher": (
        lambda folder: shutil.copytree(folder / "teacher", folder / "professor"),
        ["--cache.teacher={folder}/professor"],
        "teacher.id is 'teacher', expected 'professor'",
    ),
    "a teacher of the Hub": (
        None,
        ["--cache.teacher=org/teacher-7b"],
        "teacher.id is 'teacher', expected 'org/teacher-7b'",
    ),
    "a teacher trained again": (other_weights, [], f"teacher.weights_sha256 {DIFFERS}"),
    "another adapter": (other_adapter, ["adapter"], f"teacher.weights_sha256 {DIFFERS}"),
    "an adapter on another base": (
        lambda folder: other_weights(folder, "base"),
        ["adapter"],
        f"teacher.base_sha256 {DIFFERS}",
    ),
    "a quantised teacher": (None, ["--cache.load_in_4bit=true"], "teacher.quantization is None, expected 'nf4'"),
    "a teacher of another type": (
        None,
        ["--cache.teacher_dtype=bfloat16"],
        "teacher.dtype is 'float32', expected 'bfloat16'",
    ),
    "other rows": (
        lambda folder: edit(folder / "train.jsonl", "good", "bad"),
        [],
        f"dataset.files_sha256 {DIFFERS}",
    ),
    "fewer rows": (None, ["--datasets.train.max_rows=9"], "dataset.max_rows is None, expected 9"),
    "a truncated file": (truncate, [], r"000003.parquet is damaged: its size in bytes is \d+, the manifest has \d+"),
    "an extra shard": (
        lambda folder: shutil.copy(shards(folder, 0), shards(folder, 10)),
        [],
        "has 11 Parquet files where its manifest lists 10; the others are train-000010.parquet",
    ),
    "no manifest": (
        lambda folder: shards(folder, 0).with_name("manifest.json").unlink(),
        [],
        "has no finished 'cache' yet|has no manifest.json: the cache was never finished",
    ),
}


def changed_copy(finished, tmp_path, name):
    """A copy of a finished run with what MISMATCHES says done to it: its recipe's file, arguments, the message."""
    change, arguments, message = MISMATCHES[name]
    original = finished["adapter" if "adapter" in arguments else "plain"]
    folder = shutil.copytree(original, tmp_path / "run")
    for file in (folder / "recipe.yaml", folder / "teacher" / "adapter_config.json"):
        if file.exists():
            file.write_text(file.read_text().replace(str(original), str(folder)))
    if change is not None:
        change(folder)
    return folder / "recipe.yaml", [each.format(folder=folder) for each in arguments if each != "adapter"], message


@pytest.mark.parametrize("name", [*list(MISMATCHES)[:4], "another prompt", "another adapter", *list(MISMATCHES)[-4:]])
def test_a_student_is_not_trained_on_a_cache_of_something_else(finished, tmp_path, on_cpu, name):
    path, arguments, message = changed_copy(finished, tmp_path, name)
    stale = "cache of .* is (damaged|not up to date): .* Run `first-trl cache RECIPE`"
    with pytest.raises(SystemExit, match=message if "student" in name or "extra" in name else stale):
        distill.main([str(path), *arguments])
    assert not list(tmp_path.glob("run/runs/tiny/students/*/*.safetensors"))


@pytest.mark.parametrize("name", [name for name in MISMATCHES if "student" not in name])
def test_a_cache_of_something_else_is_not_opened(finished, tmp_path, name):
    path, arguments, message = changed_copy(finished, tmp_path, name)
    recipe = load_recipe(path, arguments)
    with pytest.raises(ValueError, match=message) as raised:
        open_recipe_cache(recipe, "train", recipe.cache.teacher, teacher_section(recipe))
    assert str(raised.value).rstrip().endswith(".")  # the remedy is a sentence of its own


@pytest.mark.parametrize("kind", ["plain", "adapter"])
def test_a_cache_of_this_recipe_is_taken_wherever_the_run_lies_and_without_its_teacher(finished, tmp_path, kind):
    recipe = load_recipe(finished[kind] / "recipe.yaml")
    assert len(open_recipe_cache(recipe, "train", recipe.cache.teacher, teacher_section(recipe)).dataset) == 40
    gone = str(tmp_path / "elsewhere" / "teacher")
    assert len(open_recipe_cache(recipe, "validation", gone, teacher_section(recipe)).dataset) == 43


def test_a_teacher_of_the_hub_is_known_by_the_commit_that_was_downloaded(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--teacher"
    shutil.copytree(write_recipe(tmp_path / "job").parent / "teacher", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    section = {"model_revision": "main", "dtype": "float32", "load_in_4bit": False, "backend": "hf"}
    teacher = teacher_identity("org/teacher", section)
    assert (teacher["id"], teacher["revision"], teacher["commit"]) == ("org/teacher", "main", commit)
    assert teacher["weights_sha256"] is None


@pytest.mark.parametrize(
    ("how", "dtype", "quantization"),
    [
        ({}, "bfloat16", None),
        ({"load_in_4bit": True}, "bfloat16", "nf4"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bfloat16", "fp4"),
        ({"load_in_8bit": True}, "bfloat16", "int8"),
        ({"load_in_4bit": True, "backend": "server"}, None, None),
    ],
)
def test_a_manifest_says_how_the_teacher_was_quantized_and_nothing_of_a_servers(tmp_path, how, dtype, quantization):
    section = {"model_revision": "main", "dtype": "bfloat16", "load_in_4bit": False, "backend": "hf", **how}
    found = teacher_identity(str(write_recipe(tmp_path).parent / "teacher"), section)
    assert (found["dtype"], found["quantization"]) == (dtype, quantization)
