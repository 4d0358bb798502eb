"""An upload to a hub on 127.0.0.1: it arrives whole and works, or fails in plain words and can be repeated."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from first_trl.hub.card import prepare_upload_folder
from first_trl.hub.upload import PushError, push_folder
from tests.finished_run import make_base, make_run, record_run
from tests.loopback_hub import ROUTES as loopback_routes
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


def test_a_folder_arrives_whole_in_one_commit(hub, folder):
    url = push_folder(folder, REPO, commit_message="first student")
    assert url.startswith(f"{hub.url}/{REPO}/commit/")
    assert hub.files(REPO) == contents(folder)
    assert hub.repos[REPO].commits == [("main", "first student")] and not hub.repos[REPO].private


def test_pushing_again_adds_what_changed_and_uploads_nothing_twice(hub, folder):
    push_folder(folder, REPO)
    uploads = hub.requests["PUT /lfs/" + next(iter(hub.lfs))]
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n\n# better card\n")
    push_folder(folder, REPO)
    assert hub.files(REPO) == contents(folder) and len(hub.repos[REPO].commits) == 2
    assert hub.requests["PUT /lfs/" + next(iter(hub.lfs))] == uploads == 1


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
FAULTS = {
    "expired token": (("POST", CREATE, 401, 1, "Invalid credentials in Authorization header"), "run `hf auth login`"),
    "no right to the namespace": (("POST", CREATE, 403, 1, "You don't have the rights"), "write access to 'me'"),
    "no right to commit": (("POST", COMMIT, 403, 1, "Forbidden"), "(403, saying 'Forbidden')"),
    "somebody else committed": (
        ("POST", COMMIT, 409, 1, "The repository has been updated"),
        "changed by someone else",
    ),
    "out of order at creation": (("POST", CREATE, 503, 1, ""), "out of order or busy"),
    "out of order at the commit": (("POST", COMMIT, 500, 1, "Internal Error"), "(500"),
    "out of order for long": (("POST", BATCH, 502, 99, ""), "(502"),
    "upload refused": (("PUT", UPLOAD, 403, 1, "Signature expired"), "403"),
    "connection cut at creation": (("POST", CREATE, None, 1), "the connection failed"),
    "connection cut in an upload, again and again": (("PUT", UPLOAD, None, 99), "the connection failed"),
    "connection cut in the commit": (("POST", COMMIT, None, 1), "the connection failed"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_upload_says_why_loses_nothing_and_a_second_try_completes(hub, folder, fault):
    planted, message = FAULTS[fault]
    before = contents(folder)
    hub.fail(*planted)
    with pytest.raises(PushError) as failure:
        push_folder(folder, REPO)
    text = str(failure.value)
    assert message in text and f"Nothing is lost: {folder} is whole" in text
    assert f"hf upload {REPO} {folder} ." in text and TOKEN not in text
    assert contents(folder) == before
    assert REPO not in hub.repos or hub.files(REPO) == {}
    hub.planted.clear()
    push_folder(folder, REPO)
    assert hub.files(REPO) == before and len(hub.repos[REPO].commits) == 1


@pytest.mark.parametrize("planted", [("PUT", UPLOAD, None, 1), ("PUT", UPLOAD, 503, 2), ("POST", BATCH, 500, 1)])
def test_a_passing_fault_in_an_upload_is_retried_without_a_word(hub, folder, planted):
    hub.fail(*planted)
    push_folder(folder, REPO)
    assert hub.files(REPO) == contents(folder)


def test_a_proxy_that_answers_with_a_page_is_told_from_the_hub(hub, folder, monkeypatch):
    page = ("POST", r"/api/validate-yaml", lambda handler: handler.answer(b"<html>Bad gateway", 502))
    monkeypatch.setattr("tests.loopback_hub.ROUTES", [page, *loopback_routes])
    with pytest.raises(PushError, match="something that is not from the Hub"):
        push_folder(folder, REPO)


def test_without_a_token_offline_or_with_a_bad_name_the_message_says_so(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "expired")
    with pytest.raises(PushError, match="does not know you"):
        push_folder(folder, REPO)
    with pytest.raises(PushError, match="write owner/name"):
        push_folder(folder, "me/not/a/name")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(PushError, match=r"write access to 'stranger'.* push.create_pr"):
        push_folder(folder, "stranger/model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    set_client_factory(default_client_factory)
    with pytest.raises(PushError, match="HF_HUB_OFFLINE is set; unset it"):
        push_folder(folder, REPO)


def test_a_hub_that_is_not_there_is_told_as_such(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PushError, match="the connection failed .* check the network"):
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
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cwd / "cache"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    environment = {**os.environ, **settings, "PYTHONPATH": "", "HF_TOKEN": TOKEN, "TRANSFORMERS_VERBOSITY": "error"}
    cwd.mkdir(exist_ok=True)
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
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
    answers = json.loads(measured)
    config = run / "students" / "first" / "adapter_config.json"
    config.write_text(config.read_text().replace("me/tiny-base", str(base)))
    model = AutoPeftModelForCausalLM.from_pretrained(run / "students" / "first")
    tokenizer = AutoTokenizer.from_pretrained(base)
    for prompt, (confidence, answer) in zip(PROMPTS, answers, strict=True):
        with torch.no_grad():
            row = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].softmax(-1)
        assert tokenizer.decode(row.argmax()) == answer
        assert abs(float(row.max()) - confidence) < 1e-6
    with torch.no_grad():
        logits = model(**tokenizer(PROMPTS[-1], return_tensors="pt")).logits[0, -1]
    choices = tokenizer.convert_tokens_to_ids(["good", "bad"])
    shares = (logits[choices] / 1.3).softmax(-1)  # as shipped: among the choices, under the closing temperature
    assert printed == f"{['good', 'bad'][shares.argmax()]} {float(shares.max()):.1%}"


def test_the_push_stage_rehearses_without_a_network_and_then_pushes(hub, tmp_path, monkeypatch):
    from first_trl.stages.push import push

    run, recipe = make_run(tmp_path / "work", make_base(tmp_path / "tiny-base"))
    push(recipe, dry_run=True)
    assert (run / "push" / "README.md").is_file() and not hub.requests
    push(recipe, dry_run=False)
    assert hub.files(REPO) == contents(Path(run / "push"))


def finished_command(tmp_path):
    """A run whose records say that it is finished, for the command; returns its folder and the recipe's file."""
    run, recipe = make_run(tmp_path / "work", make_base(tmp_path / "tiny-base"))
    record_run(recipe)
    return run, str(tmp_path / "work" / "recipe.yaml")


def test_the_command_rehearses_pushes_to_a_branch_and_opens_a_pull_request(hub, tmp_path, monkeypatch, capsys):
    from first_trl.stages import push

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run, recipe = finished_command(tmp_path)
    push.main([recipe, "--revision", "v2", "--dry_run"])
    assert not hub.repos and "next: the same command without --dry_run" in capsys.readouterr().err
    rehearsed = contents(run / "push")
    push.main([recipe, "--revision", "v2"])
    assert hub.files(REPO, "v2") == rehearsed and hub.files(REPO) == {}
    push.main([recipe, "--create_pr"])
    assert "uploaded to " in capsys.readouterr().err and hub.files(REPO, "refs/pr/2") == contents(run / "push")


def test_a_refused_push_is_one_line_and_no_token_is_in_any_file_of_the_run(hub, tmp_path, monkeypatch, capsys):
    from first_trl.stages import push

    secret = "hf_" + "sEcReT42" * 4
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("HF_TOKEN", secret)
    run, recipe = finished_command(tmp_path)
    with pytest.raises(SystemExit) as stop:
        push.main([recipe])
    assert stop.value.code.startswith("[first-trl] push failed: The upload to me/tiny-student did not happen: the Hub")
    assert "run `hf auth login`" in stop.value.code and "Traceback" in (run / "log.txt").read_text()
    assert secret not in stop.value.code and secret not in "".join(capsys.readouterr())
    looked = [file for file in run.rglob("*") if file.is_file() and secret.encode() not in file.read_bytes()]
    assert len(looked) == len([file for file in run.rglob("*") if file.is_file()]) > 10
