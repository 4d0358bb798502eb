"""One loader: what was trained is what is measured, and nothing that comes with a model runs but its weights."""

import io
import json
from contextlib import nullcontext

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

from first_trl import modeling, predict
from first_trl.errors import FirstTrlError
from first_trl.modeling import check_head, innermost, load_model, load_tokenizer
from first_trl.stages import cache, calibrate, distill, evaluate, sft
from first_trl.stages.merge import main as merge
from tests.cache_recipe import write_recipe
from tests.test_architectures import ARCHITECTURES
from tests.tiny import build_model, build_tokenizer, byte_level_tokenizer

PAYLOAD = """
from pathlib import Path
Path("ran").touch()
from transformers import LlamaConfig, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "custom"
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def student(tmp_path):
    """A folder with an adapter that does something, beside its base."""
    build_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data)
    model.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def with_code(folder, file, place):
    (folder / "payload.py").write_text(PAYLOAD)
    content = json.loads((folder / file).read_text())
    content |= place
    (folder / file).write_text(json.dumps(content))


def test_code_that_comes_with_a_model_never_runs_whatever_stands_in_stdin(tmp_path, monkeypatch, student):
    build_tokenizer().save_pretrained(student.parent / "base")
    base = student.parent / "base"
    auto = {"AutoConfig": "payload.Config", "AutoTokenizer": ["payload.Tokenizer", "payload.Tokenizer"]}
    with_code(base, "config.json", {"auto_map": auto, "model_type": "custom"})
    with_code(base, "tokenizer_config.json", {"auto_map": auto, "tokenizer_class": "Tokenizer"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", questions := io.StringIO("y\ny\ny\n"))
    for load in (load_tokenizer, load_model):
        with pytest.raises(FirstTrlError, match="code of its own, which first-trl never runs"):
            load(base)
    with pytest.raises(FirstTrlError, match="code of its own"):
        load_model(student)
    assert not (tmp_path / "ran").exists() and questions.tell() == 0


@pytest.mark.parametrize(
    "options", [{"trust_remote_code": True}, {"use_kernels": True}, {"attn_implementation": "someone/kernels"}]
)
def test_an_option_that_would_run_code_is_refused(student, options):
    with pytest.raises(FirstTrlError, match="code"):
        load_model(student, **options)


def test_an_adapter_whose_weights_do_not_fit_is_refused_and_never_dropped(student):
    weights = load_file(student / "adapter_model.safetensors")
    name = next(iter(weights))
    broken = {
        "have no counterpart": {key.replace("q_proj", "elsewhere"): value for key, value in weights.items()},
        "1 weights": {key: value for key, value in weights.items() if key != name},
        "does not fit": weights | {name: torch.zeros(3, 3)},
        "computes NaN": {key: value * float("nan") for key, value in weights.items()},
    }
    for told, content in broken.items():
        save_file(content, student / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(FirstTrlError, match=told):
            load_model(student)
    save_file(weights, student / "adapter_model.safetensors", metadata={"format": "pt"})
    load_model(student)


def test_a_token_may_be_forbidden_but_no_logit_may_overflow():
    model = build_model(tie_word_embeddings=False)
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(len(head.weight)))
    for value, refused in (
        (-torch.inf, nullcontext()),
        (torch.inf, pytest.raises(FirstTrlError, match="computes NaN")),
    ):
        head.bias.data[3] = value
        with refused:
            check_head(model)


def test_the_base_of_an_adapter_is_loaded_at_the_revision_that_it_names(student, monkeypatch):
    config = json.loads((student / "adapter_config.json").read_text())
    asked, load = [], modeling._load_base
    monkeypatch.setattr(
        modeling, "_load_base", lambda path, revision, options: asked.append(revision) or load(path, None, options)
    )
    for pinned, given in (("abc123", "main"), (None, "v2")):
        (student / "adapter_config.json").write_text(json.dumps(config | {"revision": pinned}))
        load_model(student, revision=given)
    assert asked == ["abc123", "v2"]


def test_a_four_bit_model_on_a_cpu_has_its_gradients_after_an_evaluation(student):
    """bitsandbytes repacked the weights where the CPU has AVX512-BF16, and lower layers then had no gradient."""
    build_model(hidden_size=64, intermediate_size=128).save_pretrained(student.parent / "wide")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = load_model(student.parent / "wide", quantization_config=nf4)
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(model, adapter)

    def gradients():
        model.train().zero_grad()
        model(input_ids=torch.arange(8)[None]).logits.square().sum().backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}

    before = gradients()
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(8)[None])
    after = gradients()
    assert all(torch.allclose(after[name], before[name], rtol=1e-4) for name in before)


def test_a_checkpoint_that_sees_images_goes_through_every_stage_as_one_and_the_same_model(tmp_path, monkeypatch):
    """Teacher and student are one checkpoint as published, image tower and all; the adapters are what is measured."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    tokenizer = byte_level_tokenizer()
    config = CONFIG_MAPPING["qwen3_5"](**ARCHITECTURES["qwen3_5"])
    config.text_config.vocab_size = len(tokenizer)
    config.text_config.initializer_range = 0.3
    torch.manual_seed(0)
    path = write_recipe(tmp_path, rows=24)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    recipe = yaml.safe_load(path.read_text())
    training = recipe["distill"] | {
        "model_name_or_path": str(tmp_path / "base"),
        **{"use_peft": True, "lora_target_modules": "all-linear", "learning_rate": 0.05, "max_steps": 3},
    }
    recipe["task"] |= {"max_length": 300, "choices": ["good", "bad"], "append_eos": False}
    recipe |= {"sft": training, "distill": training, "arms": {"distilled": {"recalibration_method": "none"}}}
    recipe["evaluate"] = recipe["calibrate"] = {"bootstrap": 10}
    recipe["cache"].pop("teacher")
    path.write_text(yaml.safe_dump(recipe))
    for stage in (sft, cache, calibrate, distill, evaluate):
        stage.main([str(path)])
    run = tmp_path / "runs" / "tiny"
    for adapter in (run / "teacher", run / "students" / "distilled"):
        names = list(load_file(adapter / "adapter_model.safetensors"))
        assert names and not [name for name in names if "vis" in name or "projector" in name]
        assert innermost(load_model(adapter)).__class__ is innermost(load_model(tmp_path / "base")).__class__
    arms = json.loads((run / "report" / "metrics.json").read_text())["arms"]
    assert arms["distilled"]["test"]["nll"] != arms["base"]["test"]["nll"], "the adapter was dropped"
    assert arms["teacher"]["test"]["nll"] != arms["base"]["test"]["nll"], "the teacher's adapter was dropped"
    assert predict(run / "students" / "distilled", [{"text": "a fine film"}])[0]["answer"] in ("good", "bad")
    assert merge([str(path), "--arm", "distilled"]) == 0
    moved = json.loads((run / "merged" / "distilled" / "merge.json").read_text())["test"]["confidence_moved"]
    assert moved["max"] < 1e-3  # a float32 sum, taken in another order
