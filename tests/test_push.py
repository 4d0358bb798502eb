import json
import os
import re
import subprocess
import sys

import pytest

from first_trl.errors import FirstTrlError
from first_trl.hub.card import prepare_upload_folder
from first_trl.hub.upload import PushError, push_folder
from first_trl.stages import push
from tests.finished_run import make_base, make_run, record_run
from tests.loopback_hub import TOKEN

REPO = "me/tiny-student"


@pytest.fixture
def folder(tmp_path):
    """A folder as it would be uploaded; small text files and two that go through LFS."""
    folder = tmp_path / "push"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n\n# card\n")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 400)
    (folder / "reliability.png").write_bytes(b"\x89PNG" * 100)
    return folder


def contents(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_folder_arrives_whole_in_one_commit_and_a_second_push_uploads_nothing_twice(hub, folder):
    before = contents(folder)
    (folder / ".lock").write_text("hidden")
    url = push_folder(folder, REPO, commit_message="first student")
    assert url.startswith(f"{hub.url}/{REPO}/commit/") and hub.files(REPO) == before
    assert hub.repos[REPO].commits == [("main", "first student")] and not hub.repos[REPO].private
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n\n# better card\n")
    push_folder(folder, REPO)
    assert hub.files(REPO) != before and len(hub.repos[REPO].commits) == 2
    assert {count for request, count in hub.requests.items() if request.startswith("PUT /lfs/")} == {1}


def test_private_revision_and_pull_request_do_what_they_say(hub, folder):
    push_folder(folder, REPO, private=True, revision="v2")
    assert hub.repos[REPO].private and hub.files(REPO) == {} and hub.files(REPO, "v2") == contents(folder)
    url = push_folder(folder, REPO, create_pr=True)
    assert re.fullmatch(rf"{hub.url}/{REPO}/discussions/\d+", url)
    assert hub.files(REPO) == {} and hub.files(REPO, "refs/pr/2") == contents(folder)
    with pytest.raises(ValueError, match="exclude each other"):
        push_folder(folder, REPO, create_pr=True, revision="v2")


def test_an_empty_folder_is_refused_before_anything_is_made(hub, tmp_path):
    with pytest.raises(ValueError, match="nothing to upload"):
        push_folder(tmp_path / "absent", REPO)
    assert hub.repos == {} and not hub.requests


COMMIT, BATCH, UPLOAD, CREATE = r"/commit/main$", r"/objects/batch$", r"^/lfs/", r"/api/repos/create$"


@pytest.mark.parametrize(
    ("planted", "message"),
    [
        (("POST", CREATE, 401, 1, "Invalid credentials in Authorization header"), "Invalid credentials"),
        (("POST", CREATE, 403, 1, "You don't have the rights"), "You don't have the rights"),
        (("POST", COMMIT, 409, 1, "The repository has been updated"), "The repository has been updated"),
        (("POST", COMMIT, 500, 1, "Internal Error"), "500"),
        (("POST", BATCH, 502, 99, ""), "502"),
        (("PUT", UPLOAD, 403, 1, "Signature expired"), "403"),
        (("POST", CREATE, None, 1), ""),
        (("PUT", UPLOAD, None, 99), ""),
        (("POST", COMMIT, None, 1), ""),
    ],
)
def test_a_failed_upload_says_why_loses_nothing_and_a_second_try_completes(hub, folder, planted, message):
    before = contents(folder)
    hub.fail(*planted)
    with pytest.raises(PushError) as failure:
        push_folder(folder, REPO)
    text = str(failure.value)
    assert re.match(rf"The upload to {REPO} did not happen: .{{8,}}\. Nothing is lost: {folder} is whole", text)
    assert message in text and f"hf upload {REPO} {folder} ." in text and TOKEN not in text
    assert contents(folder) == before
    assert REPO not in hub.repos or hub.files(REPO) == {}
    hub.planted.clear()
    push_folder(folder, REPO)
    assert hub.files(REPO) == before and len(hub.repos[REPO].commits) == 1


@pytest.mark.parametrize("planted", [("PUT", UPLOAD, None, 1), ("PUT", UPLOAD, 503, 2), ("POST", BATCH, 500, 1)])
def test_a_passing_fault_in_an_upload_is_retried_silently(hub, folder, planted):
    hub.fail(*planted)
    push_folder(folder, REPO)
    assert hub.files(REPO) == contents(folder)


def test_offline_or_with_a_bad_name_the_message_says_so(hub, folder, monkeypatch):
    with pytest.raises(PushError, match="Repo id must be"):
        push_folder(folder, "me/not/a/name")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    set_client_factory(default_client_factory)
    with pytest.raises(PushError, match="HF_HUB_OFFLINE"):
        push_folder(folder, REPO)


PROMPTS = ["Review: a good film Sentiment :", "Review: the plot is dull Sentiment :", "Review: ... Sentiment :"]
ANSWER = """
import json, sys, torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
model, tokenizer = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
with torch.no_grad():
    inputs = [tokenizer(prompt, return_tensors="pt") for prompt in json.loads(sys.argv[2])]
    rows = [model(**prompt).logits[0, -1].softmax(-1) for prompt in inputs]
print(json.dumps([[float(row.max()), tokenizer.decode(row.argmax())] for row in rows]))
"""


def run_elsewhere(code, *arguments, cwd, hub):
    """Run Python as somebody else would: another folder, an empty cache, no first_trl, the hub as HF_ENDPOINT."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(cwd / "cache"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    settings |= {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": "", "TRANSFORMERS_VERBOSITY": "error"}
    cwd.mkdir(exist_ok=True)
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=cwd, env=os.environ | settings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()


def test_a_pushed_student_downloaded_with_peft_alone_gives_the_same_answers_and_the_card_runs(hub, tmp_path):
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    base = make_base(tmp_path / "tiny-base")
    push_folder(base, "me/tiny-base")
    run, recipe = make_run(tmp_path / "work", base, base_name="me/tiny-base")
    folder = prepare_upload_folder(run, "first", recipe, run / "push")
    push_folder(folder, REPO)

    usage = re.search(r"```python\n(.*?)\n```", hub.files(REPO)["README.md"].decode(), flags=re.DOTALL)[1]
    *_, measured, printed = run_elsewhere(ANSWER + usage, REPO, json.dumps(PROMPTS), cwd=tmp_path / "reader", hub=hub)
    config = run / "students" / "first" / "adapter_config.json"
    config.write_text(config.read_text().replace("me/tiny-base", str(base)))
    model = AutoPeftModelForCausalLM.from_pretrained(run / "students" / "first")
    tokenizer = AutoTokenizer.from_pretrained(base)
    for prompt, (confidence, answer) in zip(PROMPTS, json.loads(measured), strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
        assert tokenizer.decode(logits.argmax()) == answer
        assert abs(float(logits.softmax(-1).max()) - confidence) < 1e-6
    choices = tokenizer.convert_tokens_to_ids(["good", "bad"])
    shares = (logits[choices] / 1.3).softmax(-1)  # as shipped: among the choices, under the closing temperature
    assert printed == f"{['good', 'bad'][shares.argmax()]} {float(shares.max()):.1%}"


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A run whose records say that it is finished, for the command: its folder and the recipe's file."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run, recipe = make_run(tmp_path / "work", make_base(tmp_path / "tiny-base"))
    record_run(recipe)
    return run, str(tmp_path / "work" / "recipe.yaml")


def test_the_command_rehearses_pushes_to_a_branch_and_opens_a_pull_request(hub, finished, capsys):
    run, recipe = finished
    push.main([recipe, "--revision", "v2", "--dry_run"])
    assert not hub.repos and "next: the same command without --dry_run" in capsys.readouterr().err
    rehearsed = contents(run / "push")
    push.main([recipe, "--revision", "v2"])
    assert hub.files(REPO, "v2") == rehearsed and hub.files(REPO) == {}
    push.main([recipe, "--create_pr", "--arm", "best"])
    said = capsys.readouterr().err
    assert "uploaded to " in said and "push.arm: best is first" in said
    assert hub.files(REPO, "refs/pr/2") == contents(run / "push")


def test_an_unknown_licence_is_warned_of_and_refused_before_an_upload(hub, finished, capsys):
    recipe = finished[1]
    push.main([recipe, "--license", "null", "--dry_run"])
    assert "WARNING: push.license is missing" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="push.license is missing"):
        push.main([recipe, "--license", "null"])
    with pytest.raises(SystemExit, match="push.hub_model_id is missing"):
        push.main([recipe, "--hub_model_id", "null"])
    assert not hub.repos


def test_best_needs_a_student_with_an_nll(tmp_path):
    run, recipe = make_run(tmp_path / "work", make_base(tmp_path / "tiny-base"), push={"arm": "best"})
    (run / "report" / "metrics.json").write_text(json.dumps({"selection": {"best": None}}))
    with pytest.raises(FirstTrlError, match="push.arm: best needs"):
        push.chosen_arm(recipe)


def test_a_refused_push_is_one_line_and_no_token_is_in_any_file_of_the_run(hub, finished, monkeypatch, capsys):
    secret = "hf_" + "sEcReT42" * 4
    monkeypatch.setenv("HF_TOKEN", secret)
    run, recipe = finished
    with pytest.raises(SystemExit) as stop:
        push.main([recipe])
    assert stop.value.code.startswith("[first-trl] push failed: The upload to me/tiny-student did not happen: ")
    assert "Invalid credentials" in stop.value.code and "\n" not in stop.value.code.strip()
    assert "Traceback" in (run / "log.txt").read_text()
    files = [file for file in run.rglob("*") if file.is_file()]
    assert len(files) > 10 and not [file for file in files if secret.encode() in file.read_bytes()]
    assert secret not in stop.value.code and secret not in "".join(capsys.readouterr())
