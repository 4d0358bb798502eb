"""What users get wrong, one row each: what they are told, word for word, and what to do about it.

The actions go through the code that the commands go through; the message is what the command prints. Names of folders
that change from run to run are replaced. Broken recipes are in test_recipe.py.
"""

import errno
import json
import re

import pytest

from first_trl import failures
from first_trl.recipe import load_recipe
from first_trl.settings import DatasetConfig, TaskConfig
from tests.test_recipe import RECIPE
from tests.tiny import build_model, build_tokenizer

ROW = {"text": "a good film", "label": "good"}
TASK = {"prompt": "Review : {text} Sentiment :", "completion": " {label}", "max_length": 16}


# --- what is done wrong


def command(*arguments):
    """A command line that is refused before any work; what it prints is raised."""

    def act(folder, capsys):
        from first_trl import __main__

        (folder / "recipe.yaml").write_text(RECIPE)
        try:
            assert __main__.main(list(arguments)) == 2
        except SystemExit as stop:
            assert stop.code == 2
        raise ValueError(capsys.readouterr().err.strip().splitlines()[-1])

    return act


def stage(name, *arguments):
    """A stage of a recipe that has not come so far."""

    def act(folder, capsys):
        import importlib

        (folder / "recipe.yaml").write_text(RECIPE)
        try:
            importlib.import_module(f"first_trl.stages.{name}").main(["recipe.yaml", *arguments])
        except SystemExit as stop:
            told = capsys.readouterr().err.strip().splitlines()[-1] if stop.code == 2 else stop.code  # 2: argparse's
            raise ValueError(told.removeprefix(f"[first-trl] {name} failed: ")) from None

    return act


def data(*lines, tokenizer=None, source=None, **task):
    """Load and encode data/rows.jsonl, which has these lines (rows, or text as it is)."""

    def act(folder):
        from first_trl.data.loading import load_split
        from first_trl.data.rows import tokenize_dataset

        text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
        (folder / "data" / "rows.jsonl").write_text(text)
        rows = load_split(
            DatasetConfig(**({"path": "json", "data_files": "data/rows.jsonl"} | (source or {}))), "train"
        )
        tokenize_dataset(rows, TaskConfig(**TASK | task), (tokenizer or build_tokenizer)(), place="datasets.train")

    return act


def choices(*words, completion=" {label}", tokenizer=None):
    """Look for the tokens of the choices, as a cache of `support: choices` does."""

    def act(folder):
        from first_trl.data.choices import single_token_ids

        task = TaskConfig(**TASK | {"choices": list(words), "completion": completion})
        single_token_ids(task, (tokenizer or build_tokenizer)(), ROW)

    return act


def refused_by_the_hub(error):
    """A data set of the Hub that `datasets` does not get."""

    def act(folder, monkeypatch):
        import datasets

        from first_trl.data.loading import load_split

        def refuse(*args, **kwargs):
            raise error

        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets, "load_dataset", refuse)
        load_split(DatasetConfig(path="owner/rows"), "train")

    return act


def model(change=lambda folder: None, path="models/mine"):
    """Load a model and its tokenizer, after a change to its folder."""

    def act(folder):
        from transformers import AutoTokenizer

        from first_trl.modeling import load_model

        build_model().save_pretrained(folder / "models" / "mine")
        build_tokenizer().save_pretrained(folder / "models" / "mine")
        change(folder / "models" / "mine")
        load_model(path)
        AutoTokenizer.from_pretrained(path)

    return act


def model_of_the_hub(name, **fault):
    def act(folder, hub):
        from transformers import AutoConfig

        if fault:
            for method in ("GET", "HEAD"):
                hub.fail(method, name, times=99, **fault)
        AutoConfig.from_pretrained(name)

    return act


def without(*names):
    def change(folder):
        for name in names:
            next(folder.glob(name)).unlink()

    return change


def damaged(name, content):
    return lambda folder: next(folder.glob(name)).write_bytes(content)


def no_repository(folder):
    from types import SimpleNamespace

    from first_trl.stages.push import push

    push(SimpleNamespace(push=SimpleNamespace(hub_model_id=None)), dry_run=False)


def cache(change=lambda folder: None, **expected):
    """Open a small cache after a change, and ask that it fits."""

    def act(folder):
        from first_trl.cache.reader import check_cache, open_cache
        from tests.cache_samples import make_rows, write_cache

        write_cache(folder / "cache", make_rows(6))
        change(folder / "cache")
        check_cache(open_cache(folder / "cache"), **expected)

    return act


def other_tokenizer(folder):
    """Train a student whose tokenizer is not the teacher's."""
    cache(tokenizer=build_tokenizer())(folder)


def small_student(folder):
    """Train a student whose vocabulary ends before the teacher's."""
    from first_trl.cache.reader import check_vocabulary, open_cache

    cache()(folder)
    check_vocabulary(open_cache(folder / "cache"), vocab_size=20)


def same_rows_in_train_and_test(folder):
    from first_trl.stages.evaluate import refuse_overlap

    for name, texts in (("train", ("a film", "good film")), ("validation", ("a book",)), ("test", ("dull", "a film"))):
        rows = [ROW | {"text": text} for text in texts]
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_tokenizer().save_pretrained(folder / "models" / "teacher")
    (folder / "recipe.yaml").write_text(RECIPE.replace("Review: {text}\\nS", "Review : {text} S"))
    refuse_overlap(load_recipe("recipe.yaml", ["--cache.teacher", "models/teacher"]))


def raises(error):
    def act(folder):
        raise error

    return act


def no_tracker(folder):
    from transformers.integrations import WandbCallback

    WandbCallback()


def push(revision=None, create_pr=False, repo="me/student", fault=None):
    def act(folder, hub):
        from first_trl.hub.upload import push_folder

        (folder / "push").mkdir()
        (folder / "push" / "README.md").write_text("# card\n")
        if fault:
            hub.fail(*fault)
        push_folder(folder / "push", repo, revision=revision, create_pr=create_pr)

    return act


def no_end_token():
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


def one_case():
    """A tokenizer that does not tell capitals from small letters."""
    from tokenizers import normalizers

    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def chat():
    from tests.test_data import CHAT_TEMPLATE, byte_level_tokenizer

    return byte_level_tokenizer(bos=True, chat_template=CHAT_TEMPLATE)


def pieces():
    """A tokenizer of bytes, where words are several tokens and spaces melt into them."""
    from tests.test_data import byte_level_tokenizer

    return byte_level_tokenizer()


# --- the table: where it shows, what is done wrong, what is told

MISTAKES = [
    ("run", "no such stage", command("run", "recipe.yaml", "--stages", "cache,distil"),
     "Unknown stage 'distil' in --stages; choose from sft, cache, calibrate, distill, evaluate, push."),
    ("run", "no such configuration", command("cache", "recipe.yaml", "--config_file", "configs/gpu8.yaml"),
     "There is no configs/gpu8.yaml; give an accelerate configuration, such as configs/cpu.yaml."),
    ("distill", "no such arm", stage("distill", "--arm", "frist"),
     "first-trl distill: error: unknown arm 'frist'; the recipe has fine_tuned, distilled, first"),
    ("distill", "a stage too early", stage("distill", "--arm", "distilled"),
     "runs/tiny has no finished 'cache' yet. Run `first-trl cache RECIPE`, or `first-trl run RECIPE` "
     "for everything."),
    ("calibrate", "calibration before the cache", stage("calibrate"),
     "runs/tiny has no finished 'cache' yet. Run `first-trl cache RECIPE`, or `first-trl run RECIPE` "
     "for everything."),
    ("sft", "a corrupt line of JSON", data(ROW, '{"text": "a film", "label": \n', ROW),
     "datasets.train: 'json' cannot be loaded: data/rows.jsonl, line 2 is not valid JSON (Expecting "
     "value: line 2 column 1 (char 29)): '{\"text\": \"a film\", \"label\":'; correct or delete that line"),
    ("sft", "a line that is no row", data(ROW, "[1, 2]\n"),
     "datasets.train: 'json' cannot be loaded: data/rows.jsonl, line 2 is not a JSON object: '[1, "
     "2]'; write one {...} per line"),
    ("sft", "an empty file", data(),
     "datasets.train: 'json' cannot be loaded: the file data/rows.jsonl is empty; write the data again"),
    ("sft", "a split that is not", data(ROW, source={"split": "trian"}),
     "datasets.train: 'json' cannot be loaded: it has no split 'trian'. Should be one of ['train']. Set "
     "`split`"),
    ("sft", "a column renamed that is not", data(ROW, source={"columns": {"text": "review"}}),
     "datasets.train.columns: 'json' has no column 'review'; choose among text, label"),
    ("sft", "a column that is not", data(ROW, prompt="Review : {review}"),
     "datasets.train, row 0: template 'Review : {review}' reads the column 'review', which the dataset "
     "does not have; its columns are text, label. Correct the template, or name the column under "
     "`columns`"),
    ("sft", "an index that is not", data(ROW | {"text": ["a"]}, prompt="{text[3]}"),
     "datasets.train, row 0: template '{text[3]}': {text[3]}: index 3 is past the end of a list of 1; "
     "correct it or drop the row"),
    ("sft", "a list as text", data(ROW | {"text": ["a", "b"]}),
     "datasets.train, row 0: template 'Review : {text} Sentiment :': {text} is a list, not text or a "
     "number; index into it, as in {text[0]}, or store it as text"),
    ("sft", "a missing label", data(ROW, ROW | {"label": None}),
     "datasets.train, row 1: template ' {label}': {label} is missing (None) in this row; fill it or "
     "drop the row from the dataset"),
    ("sft", "a label that is no choice", data(ROW, ROW | {"label": "Good"}, choices=["good", "bad"]),
     "datasets.train, row 1: the column 'label' holds 'Good', which is not one of task.choices ['good', "
     "'bad']; add it to the choices or drop the row"),
    ("sft", "a label with a space", data(ROW | {"label": "good "}, choices=["good", "bad"]),
     "datasets.train, row 0: the column 'label' holds 'good ', which is not one of task.choices "
     "['good', 'bad']; remove the spaces around it"),
    ("sft", "an empty completion", data(ROW | {"label": ""}),
     "datasets.train, row 0: the completion ' {label}' is empty in this row; fill its answer or drop it"),
    ("sft", "a prompt longer than max_length", data(ROW | {"text": "good " * 20}),
     "datasets.train, row 0: the prompt is 24 tokens and the whole example 26, so that task.max_length "
     "= 16 leaves nothing to learn or to answer; raise task.max_length, shorten the "
     "prompt, or set task.too_long: drop or cut"),
    ("sft", "a prompt that ends in a space",
     data(ROW, prompt="Review: {text}\nSentiment: ", completion="{label}", tokenizer=pieces),
     "datasets.train, row 0: the prompt ends in the tokens ['Ġ'], which become ['Ġgood'] once the "
     "completion follows, so that the model would be trained on tokens it never sees at inference; move "
     "the space from the end of the prompt to the start of the completion (with a chat template, set "
     "what it adds to prompts in task.chat_template_kwargs)"),
    ("sft", "conversations without a chat template",
     data({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, prompt=None,
          completion=None),
     "datasets.train, row 0: the rows are conversations and the tokenizer '' has no chat template; "
     "start from the chat version of the model, or write task.prompt and task.completion over columns"),
    ("sft", "a conversation without an answer",
     data({"messages": [{"role": "user", "content": "a"}]}, prompt=None, completion=None, tokenizer=chat),
     "datasets.train, row 0: the last message is not the assistant's, so there is nothing to learn; add "
     "the answer"),
    ("sft", "no templates and no columns for them", data(ROW, prompt=None, completion=None),
     "datasets.train, row 0: task.prompt and task.completion are not set, and the dataset has neither "
     "`messages` nor `prompt`: its columns are text, label. Write both templates, or map the columns "
     "with `columns`"),
    ("sft", "a tokenizer without an end", data(ROW, tokenizer=no_end_token),
     "datasets.train, row 0: task.append_eos is true and the tokenizer has no end-of-sequence token; "
     "set its eos_token, or task.append_eos: false"),
    ("evaluate", "the same rows in train and test", same_rows_in_train_and_test,
     "Test sets share rows with what models were fitted on: 1 of reviews are in train, e.g. row 1. "
     "Remove them from the test set, or set evaluate.allow_overlap: true if that is meant."),
    ("sft", "a gated data set", refused_by_the_hub(ConnectionError("gated dataset")),
     "datasets.train: 'owner/rows' cannot be loaded: it is gated; accept its terms at "
     "https://huggingface.co/datasets/owner/rows, then run `hf auth login` with an account that may "
     "read it"),
    ("sft", "a data set out of reach", refused_by_the_hub(ConnectionError("no route")),
     "datasets.train: 'owner/rows' cannot be loaded: the Hub cannot be reached (no route); check the "
     "network, or HF_ENDPOINT if it is set. If 'owner/rows' is meant as a local folder or file, it does "
     "not exist (paths start where you run this)"),
    ("sft", "no space for a data set", refused_by_the_hub(OSError(errno.ENOSPC, "No space left on device")),
     "datasets.train: 'owner/rows' cannot be loaded: no space left on the disk while preparing it "
     "([Errno 28] No space left on device); free some, or point HF_HOME at another disk"),
    ("evaluate", "a choice without a token", choices("good", "awful"),
     "task.choices: the tokenizer has no token for 'awful' (it reads ['<unk>']); choose another word"),
    ("cache", "a choice of several tokens where the cache keeps choices",
     choices("good", "unbelievable", tokenizer=pieces),
     "task.choices: 'unbelievable' is 14 tokens after the prompt (['Ġ', 'u', 'n', 'b', 'e', 'l', 'i', "
     "'e', 'v', 'a', 'b', 'l', 'e', '</s>']), and cache.support: choices keeps one token for each. "
     "Choose answers of one token, such as letters, or set cache.support: top_k"),
    ("evaluate", "two choices with one token", choices("good", "Good", tokenizer=one_case),
     "task.choices: 'good' and 'Good' are the same token 'good'; choose answers that differ for this "
     "tokenizer"),
    ("evaluate", "text after the answer", choices("g", "b", completion=" {label}ood", tokenizer=pieces),
     "task.choices: 'g' melts into the text after it (['Ġ', ':', 'Ġgood']); end the completion template "
     "with the answer"),
    ("cache", "a model that is not on the Hub", model_of_the_hub("nobody/none"),
     "there is no folder nobody/none here and no model nobody/none on the Hub; check the spelling and "
     "where you run this from, and run `hf auth login` if the model is private"),
    ("cache", "a gated model", model_of_the_hub("gated/model", status=403, code="GatedRepo", message="restricted"),
     "the model is gated; accept its terms at https://huggingface.co/gated/model, run `hf auth login`, "
     "then run the same command again: finished work is kept"),
    ("cache", "a Hub id without a network", model(path="nobody/none"),
     "a model is not on this machine and the Hub cannot be reached; unset HF_HUB_OFFLINE if it is set, "
     "check the network, or give the path of a folder"),
    ("cache", "a folder without a model", model(without("config.json")),
     "this is not a model's folder (Unrecognized model in models/mine. Should have a `model_type` key "
     "in its config.json.); give the folder that holds config.json and the weights"),
    ("cache", "a folder without weights", model(without("model.safetensors")),
     "this is not a model's folder (Error no file named model.safetensors, or pytorch_model.bin, found "
     "in directory models/mine.); give the folder that holds config.json and the weights"),
    ("cache", "weights cut short", model(damaged("model.safetensors", b"x" * 9)),
     "a model's weights are damaged (Error while deserializing header: header too large); fetch or save "
     "that model again"),
    ("cache", "a damaged config", model(damaged("config.json", b"{")),
     "a model's folder is damaged (It looks like the config file at 'models/mine/config.json' is not a "
     "valid JSON file.); fetch or save that model again"),
    ("cache", "a folder without a tokenizer", model(without("tokenizer.json", "tokenizer_config.json")),
     "a model's folder holds no tokenizer; save its tokenizer beside it, with tokenizer.save_pretrained"),
    ("distill", "another tokenizer than the teacher's", other_tokenizer,
     "The cache FOLDER/cache does not fit: tokenizer_sha256 is "
     "'bc33e5a27f0a631dc109a6f5c2690c31ceba3e41fd9e42e861aaf023a3be734a', expected "
     "'e1650878806d0276a742f5a07e2be75fdc4ebf5cc4a98d197cad9910c53975dd'. To fix it, train a student "
     "with the teacher's tokenizer, or make the cache with a teacher that has the student's."),
    ("distill", "a vocabulary too small", small_student,
     "teacher_ids of row 0 of the cache FOLDER/cache has token id 39 (a token without a name), but the "
     "student's vocabulary has 20 entries. Take a student with the teacher's vocabulary, or make the "
     "cache with a teacher that has the student's."),
    ("distill", "another top_k than the cache's", cache(top_k=8),
     "The cache FOLDER/cache does not fit: top_k is 5, expected 8. To fix it, set cache.top_k to what "
     "the cache holds, or make the cache again."),
    ("distill", "an unfinished cache", cache(without("manifest.json")),
     "FOLDER/cache has no manifest.json: the cache was never finished. Run the cache stage again with "
     "the same settings: it keeps the finished shards and makes the others."),
    ("distill", "a damaged shard", cache(damaged("train-00000*.parquet", b"PAR1")),
     "FOLDER/cache/train-000000.parquet is damaged: its size in bytes is 4, the manifest has 3760. "
     "Delete this file and run the cache stage again with the same settings, or fetch a whole copy."),
    ("distill", "a missing shard", cache(without("train-00000*.parquet")),
     "The cache FOLDER/cache should have 2 shards and lacks 1: train-000000.parquet. Run the cache "
     "stage again with the same settings to make them, or fetch a whole copy."),
    ("distill", "a manifest by hand", cache(damaged("manifest.json", b"{}")),
     "FOLDER/cache/manifest.json was changed after it was written: its manifest_sha256 does not fit. "
     "Delete the "
     "folder and make the cache again, or fetch a whole copy of it."),
    ("sft", "out of GPU memory", raises(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")),
     "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB); halve "
     "sft.per_device_train_batch_size and double sft.gradient_accumulation_steps, which gives the same "
     "gradient; or set sft.gradient_checkpointing: true, or sft.load_in_4bit: true with sft.use_peft: "
     "true; or lower task.max_length; then run the same command again: finished work is kept"),
    ("sft", "a tracker that is not installed", no_tracker,
     "the tracker wandb is not installed; run `pip install wandb`, or set report_to: none"),
    ("sft", "bf16 on a CPU", raises(ValueError("Your setup doesn't support bf16/gpu. You need to assign use_cpu")),
     "the recipe trains in bf16, and this machine has no GPU for it; on a CPU write dtype: float32 and bf16: "
     "false in sft and distill, as recipes/reviews.yaml does"),
    ("cache", "out of memory", raises(MemoryError("8 GiB")),
     "out of memory (8 GiB); halve cache.tokens_per_batch; or use a GPU with more memory, or a "
     "configuration such as cache.load_in_4bit: true; then run the same command again: finished work is "
     "kept"),
    ("distill", "a full disk", raises(OSError(errno.ENOSPC, "No space left on device", "model.safetensors")),
     "no space is left on the disk ([Errno 28] No space left on device: 'model.safetensors'); free "
     "some, or set output_dir to another disk, then run the same command again: finished work is kept"),
    ("push", "an expired token", push(fault=("POST", "/api/repos/create$", 401, 1, "Invalid credentials")),
     "The upload to me/student did not happen: the Hub does not know you (401, saying 'Invalid "
     "credentials'); your token is missing or has expired, run `hf auth login`. Nothing is lost: "
     "FOLDER/push is whole, with its 1 files. To try again, run the same command, or: hf upload "
     "me/student FOLDER/push ."),
    ("push", "somebody else's repository", push(repo="stranger/student"),
     "The upload to stranger/student did not happen: the Hub refuses (403, saying \"You don't have the "
     'rights to create a model under this namespace: stranger/student"); use a token with write access '
     "to 'stranger' (`hf auth login`), or name a repository of yours (push.hub_model_id), or set "
     "push.create_pr. Nothing is lost: FOLDER/push is whole, with its 1 files. To try again, run the "
     "same command, or: hf upload stranger/student FOLDER/push ."),
    ("push", "a branch and a pull request", push(revision="v2", create_pr=True),
     "push.revision = 'v2' and push.create_pr exclude each other: a pull request goes to the main "
     "branch; remove one of them"),
    ("push", "no repository", no_repository,
     "push.hub_model_id is missing; set it to 'your-name/your-model', or rehearse with --dry_run."),
    ("push", "no repository's name", push(repo="student of mine"),
     "'student of mine' is not the id of a repository (Repo id must use alphanumeric chars, '-', '_' or "
     "'.'. The name cannot start or end with '-' or '.' and the maximum length is 96: 'student of "
     "mine'.); write owner/name"),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A project with the files that the recipe names, as the current directory."""
    for name in ("train", "validation", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.jsonl").write_text(json.dumps(ROW | {"text": name}) + "\n")
    for name in ("teacher", "student"):
        (tmp_path / "models" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return tmp_path


def told(stage, action, folder, request):
    """What the command prints for a mistake, without what changes from run to run."""
    wanted = action.__code__.co_varnames[: action.__code__.co_argcount]
    with pytest.raises(Exception) as error:
        action(**{name: folder if name == "folder" else request.getfixturevalue(name) for name in wanted})
    message = failures.explain(error.value, stage) or (str(error.value) if "act" in error.traceback[-1].name else None)
    assert message is not None, repr(error.value)
    if hasattr(error.value, "problems"):
        (message,) = error.value.problems
    return message.replace(str(folder), "FOLDER").replace(folder.name, "FOLDER")


@pytest.mark.parametrize(("stage", "mistake", "action", "message"), MISTAKES, ids=[case[1] for case in MISTAKES])
def test_a_mistake_is_told_in_words_that_help(stage, mistake, action, message, folder, request):
    assert told(stage, action, folder, request) == message


REMEDIES = (
    "give|write|did you mean|belongs in|choose|remove|quote|put it in|list|set|run|fill|drop|mend|add|raise|move|"
    "start|unset|fetch|make|take|end|halve|free|use|save|delete|look at|accept|correct|check|index into|the recipe has"
)


def test_the_table_is_long_and_every_message_says_what_to_do():
    assert len(MISTAKES) >= 50 and len({mistake for _, mistake, _, _ in MISTAKES}) == len(MISTAKES)
    assert [mistake for _, mistake, _, told in MISTAKES if not re.search(rf"\b({REMEDIES})\b", told, re.I)] == []
