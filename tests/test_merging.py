"""A merged student stands alone, answers as its adapter did, and says by how much it does not."""

import json

import numpy as np
import pytest

from first_trl.merging import compared, divide_logits, main, merge, table
from tests.finished_run import make_run
from tests.tiny import WORDS, build_model, build_tokenizer

ROWS = [{"text": " ".join(WORDS.split()[i : i + 5]), "label": ("good", "bad")[i % 2]} for i in range(20)]


def finished(folder, four_bit=False):
    base = folder / "base"
    build_model(hidden_size=64, intermediate_size=128).save_pretrained(base)  # NF4 rounds blocks of 64
    build_tokenizer().save_pretrained(base)
    settings = {"model_name_or_path": str(base), "use_peft": True, "lora_r": 4, "dtype": "float32"}
    run, recipe = make_run(folder / "work", base, distill=settings | {"load_in_4bit": four_bit})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return run, recipe, folder / "work" / "recipe.yaml"


@pytest.mark.parametrize("four_bit", [False, True], ids=["float32", "4-bit"])
def test_a_merged_student_answers_as_its_adapter_and_needs_neither_peft_nor_bitsandbytes(tmp_path, capsys, four_bit):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, _, recipe = finished(tmp_path, four_bit)
    assert main([str(recipe), "--data", str(tmp_path / "rows.jsonl")]) == 0
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
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = AutoModelForCausalLM.from_pretrained(folder)
    if four_bit:
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        for name, module in AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4).named_modules():
            if type(module).__name__ == "Linear4bit":
                base.get_submodule(name).weight.data = dequantize_4bit(module.weight.data, module.weight.quant_state)
    return base


def test_a_calibrated_student_says_without_us_what_predict_says(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from first_trl.prediction import Predictor

    run, _, recipe = finished(tmp_path)
    output = tmp_path / "calibrated"
    data = str(tmp_path / "rows.jsonl")
    assert main([str(recipe), "--data", data, "--calibrated", "--output", str(output)]) == 0
    before, after = Predictor(run / "students" / "first"), Predictor(output)
    assert (before.student.temperature, after.student.temperature) == (1.3, pytest.approx(1.3 / 1.1))
    for ours, theirs in zip(before.predict(ROWS, 0.8), after.predict(ROWS, 0.8), strict=True):
        assert theirs == ours | {"confidence": pytest.approx(ours["confidence"], abs=1e-5)}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    choices = tokenizer.convert_tokens_to_ids(["good", "bad"])
    with torch.no_grad():
        logits = model(**tokenizer(f"Review: {ROWS[0]['text']} Sentiment :", return_tensors="pt")).logits[0, -1]
    assert float((logits[choices] / (1.3 / 1.1)).softmax(-1).max()) == pytest.approx(
        after.predict(ROWS[:1], 0.8)[0]["confidence"], abs=1e-5
    )


@pytest.mark.parametrize(
    ("changed", "told"),
    [({"vocabulary": None}, "no temperature over the vocabulary"), ({"choice_token_ids": None}, "several tokens")],
)
def test_logits_are_divided_by_nothing_but_what_was_fitted_for_them(tmp_path, capsys, changed, told):
    run, _, recipe = finished(tmp_path)
    file = run / "students" / "first" / "calibration.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    assert main([str(recipe), "--data", str(tmp_path / "rows.jsonl"), "--calibrated"]) == 1
    assert told in capsys.readouterr().err and not (run / "merged" / "first").exists()


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma", "GPT2", "Gemma2", "Phi"])
def test_logits_are_divided_exactly_or_the_model_is_refused(family):
    import torch
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    if family == "GPT2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2}
    elif family != "Phi":
        sizes |= {"num_key_value_heads": 2, "head_dim": 16}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(vocab_size=60, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model = model.float().eval()
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


def test_a_folder_that_is_there_is_never_overwritten(tmp_path, capsys):
    run, _, recipe = finished(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("the only copy")
    assert main([str(recipe), "--data", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "mine")]) == 1
    assert "is there already; remove it, or give another folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_what_cannot_be_merged_is_refused_with_the_remedy(tmp_path, capsys):
    run, _, recipe = finished(tmp_path)
    (tmp_path / "bare").mkdir()
    for arguments, told in (
        ([str(tmp_path / "nowhere")], "there is no folder"),
        ([str(run / "students" / "first")], "--data is missing"),
        ([str(tmp_path / "bare"), "--data", "x.jsonl"], "there is no predict.json"),
        ([str(recipe), "--arm", "frist"], "There is no arm 'frist'"),
        ([str(recipe), "--arm", "fine_tuned"], "holds no adapter"),
        ([str(recipe), "--data", "nothing.jsonl"], "nothing.jsonl"),
    ):
        assert main(arguments) == 1
        assert told in capsys.readouterr().err


def test_a_failed_measurement_leaves_nothing_behind(tmp_path, monkeypatch):
    from first_trl.settings import DatasetConfig

    run, recipe, _ = finished(tmp_path)

    def fail(*arguments):
        raise ValueError("cannot be compared; try again")

    monkeypatch.setattr("first_trl.merging.compared", fail)
    tests = {"data": (DatasetConfig(path=str(tmp_path / "rows.jsonl"), split="train"), recipe.task)}
    with pytest.raises(ValueError, match="cannot be compared"):
        merge(run / "students" / "first", recipe.arm_section("first"), tests, tmp_path / "out" / "merged")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_moved_is_told():
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
    """Merging into a tied embedding changed the head as well: of 81.7 % right answers 38.3 were left."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from first_trl.merging import merged_model
    from first_trl.modeling import load_model

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


def test_nothing_is_written_where_answers_move_by_more_than_rounding(tmp_path, capsys, monkeypatch):
    from first_trl import merging

    run, _, recipe = finished(tmp_path)
    right = merging.merged_model

    def wrong(*arguments):
        model = right(*arguments)
        model.get_input_embeddings().weight.data.mul_(3)
        return model

    monkeypatch.setattr(merging, "merged_model", wrong)
    assert main([str(recipe), "--data", str(tmp_path / "rows.jsonl")]) == 1
    assert "points on average" in capsys.readouterr().err and not (run / "merged" / "first").exists()


def test_a_base_that_is_away_is_one_line(tmp_path, capsys):
    run, _, recipe = finished(tmp_path)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    assert main([str(recipe), "--data", str(tmp_path / "rows.jsonl")]) == 1
    told = capsys.readouterr().err
    assert "there is no such folder" in told and "Traceback" not in told
