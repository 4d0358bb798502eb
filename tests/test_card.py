import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from first_trl.errors import FirstTrlError
from first_trl.hub.card import (
    _fields,
    build_card,
    check_license,
    check_weights,
    collect_facts,
    escape_markdown,
    prepare_upload_folder,
    usage_code,
)
from first_trl.redaction import refuse_leaks, without_local_paths
from tests.finished_run import CALIBRATION, CLOSING, MANIFEST, PROMPT, SENTENCES, TABLE, make_base, make_run, measured
from tests.tiny import build_tokenizer

SOURCE = {"hub_id": "google/boolq", "config": None, "split": "validation", "revision": None, "out_of_domain": True}
FACTS = {
    "title": "tiny-student",
    "repo_id": "me/tiny-student",
    "arm": "first",
    "student": "first",
    "seeds": None,
    "base_model": "Qwen/Qwen3-0.6B",
    "base_is_local": False,
    "is_adapter": True,
    "loader": "AutoModelForCausalLM",
    "license": "apache-2.0",
    "figures": {"boolq": measured(0.79, 0.042)},
    "test_sets": {"boolq": SOURCE},
    "hub_datasets": ["google/boolq"],
    "table": TABLE,
    "sentences": SENTENCES,
    "diagrams": ["reliability_boolq.png"],
    "described": {"loading": {"dtype": "float32"}, "thresholds": []},
    "closing": CLOSING,
    "calibration": CALIBRATION,
    "cache": MANIFEST,
    "recipe": {"name": "tiny", "task": {"prompt": PROMPT, "choices": ["good", "bad"]}, "evaluate": {"num_bins": 10}},
    "fields": {"prompt": "Review: ... Sentiment :", "row": {"text": "..."}},
    "method": "temperature",
    "value": None,
}


def facts(**changes):
    assert changes.keys() <= FACTS.keys()
    return FACTS | changes


def test_the_metadata_is_what_the_hub_reads():
    data = ModelCard(build_card(facts())).data.to_dict()
    assert data["library_name"] == "peft" and data["base_model_relation"] == "adapter"
    assert data["base_model"] == "Qwen/Qwen3-0.6B" and data["datasets"] == ["google/boolq"]
    assert {"trl", "first-trl"} <= set(data["tags"])
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"]["type"] == "google/boolq" and result["dataset"]["split"] == "validation"
    assert {m["type"]: m["value"] for m in result["metrics"]} == {"accuracy": 0.79, "ece": 0.042, "trust_score": 0.748}


def test_the_card_repeats_the_reports_table_and_verdict_with_the_pushed_arm_in_bold():
    card = build_card(facts())
    assert "| **`first`** | 4.2 % |" in card and "| `first_post_hoc` | 2.2 % |" in card and "| `teacher` |" in card
    assert "- Against `fine_tuned_post_hoc`: accuracy 1.0 points higher." in card
    assert "closing temperature is 1.3" in card and "95 % interval 1.1 to 1.6" in card
    assert "closing temperature" not in build_card(facts(closing=None)).partition("## Recalibration")[2]


def test_the_licence_is_in_the_metadata_or_asked_for_and_derivatives_of_llama_are_called_so():
    assert ModelCard(build_card(facts())).data.license == "apache-2.0"
    with pytest.raises(FirstTrlError, match="push.license is missing.*Qwen/Qwen3-0.6B"):
        check_license(facts(license=None))
    llama = facts(license="llama3.2", title="csqa-first", repo_id="me/csqa-first")
    with pytest.raises(FirstTrlError, match="me/Llama-csqa-first"):
        check_license(llama)
    check_license(facts(license="llama3.2", title="Llama-csqa-first"))
    assert "Built with Llama." in build_card(llama) and "Built with Llama" not in build_card(facts())


def test_recalibration_provenance_recipe_and_citation_are_told():
    card = build_card(facts())
    for words in (
        "recalibrated by temperature, value 1.7 (95 % interval 1.5 to 1.9)",
        "from 12.0 % to 2.0 %",
        MANIFEST["manifest_sha256"],
        "prompt: 'Review: {text} Sentiment :'",
        "title     = {{FIRST}: Teach A Reliable",
        "![Reliability diagram: accuracy against confidence](reliability_boolq.png)",
    ):
        assert words in card
    for method, words in ((None, "trained on the labels, as a control"), ("none", "used as they are")):
        assert words in build_card(facts(method=method))


def test_a_local_base_is_named_and_said_to_be_local_and_is_no_hub_id():
    card = build_card(facts(base_model="small-llama", base_is_local=True))
    data = ModelCard(card).data.to_dict()
    assert "base_model" not in data and "base_model_relation" not in data
    assert "The base model is a local folder named small-llama" in card


@pytest.mark.parametrize(
    ("loading", "arguments", "lines"),
    [
        ({"dtype": "float32"}, 'dtype="float32")', 7),
        ({"dtype": "auto"}, '"me/tiny-student")', 7),
        (
            {"dtype": "bfloat16", "load_in_4bit": True},
            'bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")',
            8,
        ),
        ({"load_in_8bit": True}, "load_in_8bit=True)", 8),
    ],
)
def test_the_usage_is_python_that_loads_the_base_as_it_was_measured(loading, arguments, lines):
    code = usage_code(facts(described={"loading": loading, "thresholds": []}))
    compile(code, "usage", "exec")
    assert arguments in code and len(code.partition("\n\n")[2].splitlines()) == lines
    assert "temperature, choices = 1.3, [11, 12]" in code and "/ temperature" in code
    assert '"Review: ... Sentiment :"' in code and '"me/tiny-student"' in code
    assert "temperature" not in usage_code(facts(closing=None))


def test_the_usage_of_an_adapter_of_a_model_that_sees_images_gives_its_answers(tmp_path, capsys):
    """Llava has no text class of its own: AutoPeftModelForCausalLM cannot load it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from first_trl.modeling import class_of, load_model

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = LlamaConfig(**size, vocab_size=27, initializer_range=0.3)
    config = LlavaConfig(vision_config=CLIPVisionConfig(**size), text_config=text)
    base, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(base)
    model = LlavaForConditionalGeneration.from_pretrained(base)
    lora = LoraConfig(target_modules=r".*language_model.*q_proj", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(adapter)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(adapter)
    usage = usage_code(facts(loader=class_of(config).__name__, base_model=base, repo_id=adapter))
    assert "AutoPeft" not in usage
    exec(usage, {})
    with torch.no_grad():
        logits = load_model(adapter)(**tokenizer("Review: ... Sentiment :", return_tensors="pt")).logits[0, -1]
    shares = (logits[[11, 12]] / 1.3).softmax(-1)
    assert capsys.readouterr().out.strip().endswith(f"{shares.max():.1%}")


@pytest.mark.parametrize(("prompt", "row"), [(PROMPT, "{'text': '...'}"), (None, "'messages': [{'role': 'user'")])
def test_a_student_of_whole_answers_is_used_through_predict(prompt, row):
    closing = CLOSING | {"choice_token_ids": None}
    fields = {"prompt": None, "row": _fields(prompt)["row"]}
    changed = facts(closing=closing, fields=fields, recipe={"task": {"choices": ["very good", "bad"]}})
    code, card = usage_code(changed), build_card(changed)
    compile(code, "usage", "exec")
    assert code.startswith("from first_trl import predict") and row in code and "logits" not in code
    assert "most probable whole answer" in card and "temperature 1.3" in card and "first token" not in card


def test_a_student_without_its_closing_file_is_published_as_trained(tmp_path):
    run, recipe = make_run(tmp_path / "work", make_base(tmp_path / "tiny-base"))
    file = run / "report" / "metrics.json"
    metrics = json.loads(file.read_text())
    metrics["arms"]["first_post_hoc"] = {name: measured(0.79, 0.011) for name in metrics["arms"]["first"]}
    file.write_text(json.dumps(metrics))
    assert collect_facts(run, "first", recipe, {})["figures"]["reviews"]["ece"] == 0.011
    (run / "students" / "first" / "calibration.json").unlink()
    known = collect_facts(run, "first", recipe, {})
    assert known["figures"]["reviews"]["ece"] == 0.042
    assert "as shipped, under its closing temperature" not in build_card(known)


def test_an_arms_own_recalibration_is_what_its_card_says(tmp_path):
    arms = {"first": {"recalibration_value": 2.5}}
    run, recipe = make_run(tmp_path / "work", make_base(tmp_path / "tiny-base"), arms=arms)
    card = build_card(collect_facts(run, "first", recipe, {}))
    assert "recalibrated by temperature, value 2.5, which the recipe sets" in card
    assert "of the validation split. There" not in card


def test_the_usage_of_a_chat_student_goes_through_its_chat_template():
    task = {"chat_template_kwargs": {"enable_thinking": False}}
    code = usage_code(facts(fields=_fields(None), recipe={"task": task}))
    compile(code, "usage", "exec")
    assert "apply_chat_template" in code and "enable_thinking=False" in code


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_escaped_text_has_no_live_markup(text):
    escaped = escape_markdown(text)
    assert "\n" not in escaped and "<" not in escaped
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*_\[\]|~$!#]", escaped)


# The folder to upload


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secret-home")
    return make_run(folder / "work", make_base(folder / "models" / "tiny-base"))


EXPECTED = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "calibration.json", "metrics.json",
    "predict.json",
    "recipe.resolved.yaml", "reliability_reviews.png", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


def test_the_folder_holds_the_adapter_its_card_and_its_measurements_and_nothing_else(finished, tmp_path):
    run, recipe = finished
    folder = prepare_upload_folder(run, "first", recipe, tmp_path / "push")
    assert {file.name for file in folder.rglob("*")} == EXPECTED
    assert folder == tmp_path / "push" and [path.name for path in tmp_path.iterdir()] == ["push"]
    student = run / "students" / "first" / "adapter_model.safetensors"
    assert (folder / "adapter_model.safetensors").read_bytes() == student.read_bytes()


def test_no_file_of_the_folder_names_a_place_of_this_machine(finished, tmp_path):
    run, recipe = finished
    assert "secret-home" in (run / "students" / "first" / "adapter_config.json").read_text()
    assert "secret-home" in (run / "report" / "metrics.json").read_text()
    folder = prepare_upload_folder(run, "first", recipe, tmp_path / "push")
    for file in folder.iterdir():
        content = file.read_bytes().decode("utf-8", "replace")
        assert "secret-home" not in content and "pytest-of" not in content, file.name
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny-base"
    resolved = yaml.safe_load((folder / "recipe.resolved.yaml").read_text())
    assert resolved["datasets"]["train"]["data_files"] == "train.jsonl" and resolved["output_dir"] == "runs"
    assert resolved["task"]["prompt"] == PROMPT
    assert "local folder named tiny-base" in (folder / "README.md").read_text()


def test_preparing_again_replaces_the_folder_but_never_somebody_elses(finished, tmp_path):
    run, recipe = finished
    folder = prepare_upload_folder(run, "first", recipe, tmp_path / "push")
    (folder / "stale.txt").write_text("old")
    assert not (prepare_upload_folder(run, "first", recipe, folder) / "stale.txt").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("the only copy")
    with pytest.raises(ValueError, match="no prepared upload"):
        prepare_upload_folder(run, "first", recipe, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").exists()


def test_a_secret_in_a_file_stops_everything_and_is_not_repeated(finished, tmp_path, monkeypatch):
    run, recipe = finished
    monkeypatch.setenv("MY_API_KEY", "correct-horse-battery")
    leaking = recipe.model_copy(deep=True)
    leaking.task.prompt = "correct-horse-battery {text}"
    with pytest.raises(ValueError, match="MY_API_KEY") as refusal:
        prepare_upload_folder(run, "first", leaking, tmp_path / "push")
    assert "correct-horse" not in str(refusal.value) and list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="access token"):
        refuse_leaks("a.md", "hf_" + "a" * 34)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("students/first/adapter_config.json", "run the distill stage first"),
        ("report/metrics.json", "run the evaluate stage first"),
        ("calibration.json", "run the calibrate stage first"),
    ],
)
def test_an_unfinished_run_is_refused_with_the_stage_to_run(finished, tmp_path, missing, message):
    run, recipe = finished
    (run / missing).rename(tmp_path / "kept")
    try:
        with pytest.raises(ValueError, match=message):
            prepare_upload_folder(run, "first", recipe, tmp_path / "push")
    finally:
        (tmp_path / "kept").rename(run / missing)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "adapter_model.safetensors is damaged"), (b"\2\0\0\0\0\0\0\0{}", "holds no weights")],
)
def test_weights_that_cannot_be_read_are_refused(tmp_path, content, message):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(FirstTrlError, match=f"{message}.*run the distill stage again"):
        check_weights(tmp_path)


def test_an_arm_outside_the_report_and_a_link_out_of_the_folder_are_refused(finished, tmp_path):
    run, recipe = finished
    with pytest.raises(ValueError, match="no finished student"):
        prepare_upload_folder(run, "distilled", recipe, tmp_path / "push")
    (tmp_path / "outside.json").write_text("{}")
    link = run / "students" / "first" / "special_tokens_map.json"
    link.symlink_to(tmp_path / "outside.json")
    try:
        with pytest.raises(ValueError, match="link out of the run folder"):
            prepare_upload_folder(run, "first", recipe, tmp_path / "push")
    finally:
        link.unlink()


def test_paths_are_reduced_where_they_are_paths_and_left_alone_where_they_are_words():
    value = {
        "path": "/data/me/train.jsonl",
        "data_files": ["~/a.csv", "../b.csv", "C:\\Users\\me\\c.csv"],
        "model_name_or_path": "Qwen/Qwen3-8B",
        "task": {"prompt": "/think {text}", "choices": ["/", "~"]},
    }
    assert without_local_paths(value) == {
        "path": "train.jsonl",
        "data_files": ["a.csv", "b.csv", "c.csv"],
        "model_name_or_path": "Qwen/Qwen3-8B",
        "task": {"prompt": "/think {text}", "choices": ["/", "~"]},
    }
    tokens = {"added_tokens": [{"content": "/s"}], "_name_or_path": "/home/me/model"}
    assert without_local_paths(tokens, frozenset({"_name_or_path"})) == {**tokens, "_name_or_path": "model"}
