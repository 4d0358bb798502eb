"""A merged student stands alone, answers as its adapter did, and says by how much it does not."""

import json

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from first_trl import merging
from first_trl.merging import compared, divide_logits, merged_model, table
from first_trl.modeling import load_model
from first_trl.prediction import Predictor
from first_trl.stages.merge import main
from tests.finished_run import make_run, record_run
from tests.tiny import WORDS, build_model, build_tokenizer

ROWS = [{"text": " ".join(WORDS.split()[i : i + 5]), "label": ("good", "bad")[i % 2]} for i in range(20)]


def finished(folder, four_bit=False, rows=ROWS):
    """(run folder, path of its recipe, labelled rows as --data)."""
    base, data = folder / "base", folder / "rows.jsonl"
    build_model(hidden_size=64, intermediate_size=128).save_pretrained(base)  # NF4 rounds blocks of 64
    build_tokenizer().save_pretrained(base)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"model_name_or_path": str(base), "use_peft": True, "lora_r": 4, "dtype": "float32"}
    sources = {name: {"path": "json", "data_files": f"{folder}/runs/{name}.jsonl"} for name in ("train", "validation")}
    sources["test"] = {"mine": {"path": str(data), "split": "train", "bad_rows": "drop", "overlap": "drop"}}
    distill = settings | {"load_in_4bit": four_bit}
    run, recipe = make_run(folder / "runs", base, distill=distill, datasets=sources)
    build_tokenizer().save_pretrained(run / "teacher")
    record_run(recipe)
    return run, str(folder / "runs" / "recipe.yaml"), ["--data", str(data)]


@pytest.mark.parametrize("four_bit", [False, True], ids=["float32", "4-bit"])
def test_a_merged_student_answers_as_its_adapter_and_needs_neither_peft_nor_bitsandbytes(tmp_path, capsys, four_bit):
    run, recipe, data = finished(tmp_path, four_bit)
    assert main([recipe, *data]) == 0
    output = run / "merged" / "first"
    result = json.loads((output / "merge.json").read_text())["data"]
    # a CPU multiplies 4-bit weights in bfloat16, which moves the confidences of the adapter, not of the merged model
    assert result["confidence_moved"]["max"] < (0.1 if four_bit else 1e-5)
    assert result["num_examples"] == 20 and result["same_answer"] >= (0.9 if four_bit else 1.0)
    assert "| data | merged |" in capsys.readouterr().out
    config = json.loads((output / "config.json").read_text())
    assert "quantization_config" not in config and not list(output.glob("adapter*"))

    merged, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    exact = PeftModel.from_pretrained(rounded_base(tmp_path / "base", four_bit), run / "students" / "first")
    prompt = tokenizer("Review: the film is Sentiment :", return_tensors="pt")
    with torch.no_grad():
        ours, theirs = (model(**prompt).logits[0, -1].softmax(-1) for model in (merged, exact))
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert all(parameter.dtype == torch.float32 for parameter in merged.parameters())


def rounded_base(folder, four_bit):
    """The base in float32, each weight rounded to what NF4 makes of it, if so asked."""
    from bitsandbytes.functional import dequantize_4bit

    base = AutoModelForCausalLM.from_pretrained(folder)
    if four_bit:
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        for name, module in AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4).named_modules():
            if type(module).__name__ == "Linear4bit":
                base.get_submodule(name).weight.data = dequantize_4bit(module.weight.data, module.weight.quant_state)
    return base


def test_a_student_of_a_recipe_is_measured_on_the_rows_of_evaluate_and_must_be_current(tmp_path, capsys):
    shared = {"text": "the film train is good", "label": "good"}  # as in the recipe's train split
    run, recipe, _ = finished(tmp_path, rows=[*ROWS, {"text": "the film", "label": None}, shared])
    assert main([recipe]) == 0
    assert json.loads((run / "merged" / "first" / "merge.json").read_text())["mine"]["num_examples"] == 20
    content = (tmp_path / "runs" / "recipe.yaml").read_text()
    (tmp_path / "runs" / "recipe.yaml").write_text(content.replace("lora_r: 4", "lora_r: 8"))
    assert main([recipe, "--output", str(tmp_path / "other")]) == 1
    assert "distill.first" in (told := capsys.readouterr().err) and "lora_r is 8, and was 4" in told


def test_a_calibrated_student_says_without_us_what_predict_says(tmp_path):
    run, recipe, data = finished(tmp_path)
    output = tmp_path / "calibrated"
    assert main([recipe, *data, "--calibrated", "--output", str(output)]) == 0
    before, after = Predictor(run / "students" / "first"), Predictor(output)
    assert (before.student.temperature, after.student.temperature) == (1.3, pytest.approx(1.3 / 1.1))
    for ours, theirs in zip(before.predict(ROWS, 0.8), after.predict(ROWS, 0.8), strict=True):
        assert theirs == ours | {"confidence": pytest.approx(ours["confidence"], abs=1e-5)}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    choices = tokenizer.convert_tokens_to_ids(["good", "bad"])
    with torch.no_grad():
        logits = model(**tokenizer(f"Review: {ROWS[0]['text']} Sentiment :", return_tensors="pt")).logits[0, -1]
    confidence = after.predict(ROWS[:1], 0.8)[0]["confidence"]
    assert float((logits[choices] / (1.3 / 1.1)).softmax(-1).max()) == pytest.approx(confidence, abs=1e-5)


@pytest.mark.parametrize(
    ("changed", "told"),
    [({"vocabulary": None}, "no temperature over the vocabulary"), ({"choice_token_ids": None}, "several tokens")],
)
def test_logits_are_divided_by_nothing_but_what_was_fitted_for_them(tmp_path, capsys, changed, told):
    run, _, data = finished(tmp_path)
    student = run / "students" / "first"
    file = student / "calibration.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    assert main([str(student), *data, "--calibrated"]) == 1
    assert told in capsys.readouterr().err and not student.with_name("first-merged").exists()


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma", "GPT2", "Gemma2", "Phi"])
def test_logits_are_divided_exactly_or_the_model_is_refused(family):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    if family == "GPT2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2}
    elif family != "Phi":
        sizes |= {"num_key_value_heads": 2, "head_dim": 16}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(vocab_size=60, **sizes)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        ids = torch.randint(60, (2, 9))
        before = model(input_ids=ids).logits
        if family in ("Gemma2", "Phi"):  # a cap, a bias
            with pytest.raises(ValueError, match="cannot divide the logits"):
                divide_logits(model, 1.7)
            return
        divide_logits(model, 1.7)
        assert torch.allclose(model(input_ids=ids).logits, before / 1.7, atol=1e-5)


def test_what_cannot_be_merged_is_refused_with_the_remedy_and_nothing_is_written(tmp_path, capsys, monkeypatch):
    run, recipe, data = finished(tmp_path)
    (tmp_path / "bare").mkdir()
    build_tokenizer().save_pretrained(run / "students" / "fine_tuned")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("the only copy")
    right = merging.merged_model

    def wrong(*arguments):
        model = right(*arguments)
        model.get_input_embeddings().weight.data.mul_(3)
        return model

    monkeypatch.setattr(merging, "merged_model", wrong)
    for arguments, told in (
        ([str(tmp_path / "nowhere")], "there is no folder"),
        ([str(run / "students" / "first")], "--data is missing"),
        ([str(tmp_path / "bare"), *data], "there is no predict.json"),
        ([recipe, "--arm", "frist"], "There is no arm 'frist'"),
        ([recipe, "--arm", "fine_tuned", *data], "holds no adapter"),
        ([recipe, "--data", "nothing.jsonl"], "nothing.jsonl"),
        ([recipe, *data, "--output", str(tmp_path / "mine")], "is there already; remove it"),
        ([recipe, *data], "on average"),
    ):
        assert main(arguments) == 1
        err = capsys.readouterr().err
        assert told in err and "Traceback" not in err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert list((run / "merged").iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr("first_trl.stages.push.chosen_arm", lambda recipe: "fine_tuned")
        assert main([recipe, *data]) == 1 and "holds no adapter" in capsys.readouterr().err  # what `push` takes
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    assert main([str(run / "students" / "first"), *data]) == 1
    assert "cannot be loaded" in capsys.readouterr().err


def test_what_moved_is_reported():
    before = {
        "confidence": np.array([0.9, 0.8, 0.6, 0.7]),
        "correct": np.array([1, 1, 0, 1]),
        "label_log_prob": np.log([0.9, 0.8, 0.3, 0.7]),
        "answer": np.array([3, 4, 3, 4]),
    }
    after = before | {"confidence": np.array([0.9, 0.8, 0.6, 0.5]), "answer": np.array([3, 4, 3, 3])}
    result = compared(before, after)
    assert result["same_answer"] == 0.75
    assert result["confidence_moved"] == {"mean": pytest.approx(0.05), "max": pytest.approx(0.2)}
    assert "| x | merged | 75.00 |" in table({"x": result}) and "5.000, 20.000" in table({"x": result})


def test_a_tied_head_stays_as_it_was_where_the_adapter_changed_the_embeddings(tmp_path):
    build_model().save_pretrained(tmp_path / "base")
    adapter = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter)
    for name, weight in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(weight.data, std=0.3)
    model.save_pretrained(tmp_path / "student", save_embedding_layers=False)
    arguments = {"revision": None, "dtype": "float32", "attn_implementation": None, "quantization_config": None}
    merged_model(tmp_path / "student", arguments).save_pretrained(tmp_path / "merged")
    tokens = torch.arange(3, 13)[None]
    ours, theirs = (load_model(tmp_path / name)(input_ids=tokens).logits for name in ("merged", "student"))
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert not torch.allclose(load_model(tmp_path / "base")(input_ids=tokens).logits, theirs, atol=1e-1)
