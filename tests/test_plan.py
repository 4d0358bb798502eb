"""The costs of a recipe: figures are held to real runs within 30 %, and what cannot be known is left out."""

import json
from pathlib import Path

import pytest
import torch

from first_trl import __main__ as command
from first_trl import plan
from first_trl.checks import check_recipe
from first_trl.plan import Machine, block_elements, build_on_meta, head_flops, read_machine, size_of, training_steps
from first_trl.recipe import load_recipe
from tests.cache_recipe import write_recipe
from tests.tiny import build_model

ROOT = Path(__file__).parent.parent
WITHIN = 0.3


def planned(recipe, *overrides, machine=None):
    report = check_recipe(load_recipe(recipe, list(overrides)), machine=machine, here=False)
    return report, {cost.name: cost for cost in report.costs}


# Against real runs


def test_rows_positions_and_bytes_of_a_cache_are_those_of_the_real_one(tmp_path, monkeypatch):
    from first_trl.stages import cache

    recipe = write_recipe(tmp_path, rows=700, rows_per_shard=300)
    found = planned(recipe)[1]["cache"]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    cache.main([str(recipe)])
    files = [tmp_path / f"runs/tiny/cache/{role}/manifest.json" for role in ("train", "validation")]
    manifests = [json.loads(file.read_text()) for file in files]
    rows, positions = (sum(made["totals"][count] for made in manifests) for count in ("rows", "supervised_positions"))
    assert found.rows == rows == 1403 and found.supervised == positions
    assert found.disk == pytest.approx(sum(s["bytes"] for made in manifests for s in made["shards"]), rel=WITHIN)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("batch", "accumulation", "epochs"), [(8, 1, 3), (4, 3, 2), (3, 4, 1.5), (64, 1, 2)])
def test_steps_are_those_that_the_trainer_takes(batch, accumulation, epochs, processes, tmp_path):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", num_train_epochs=epochs, **settings)
    trainer = Trainer(build_model(), args, train_dataset=Dataset.from_dict({"input_ids": [[1]] * 41}))
    batches = -(-len(trainer.get_train_dataloader()) // processes)
    assert training_steps(args, 41, processes) == trainer.set_initial_training_values(args, [None] * batches)[-1]
    args.max_steps = 17
    assert training_steps(args, 41, processes) == 17


@pytest.mark.parametrize("shape", [{}, {"hidden_size": 96, "intermediate_size": 128}, {"num_key_value_heads": 1}])
def test_what_a_step_keeps_for_its_backward_is_what_the_formula_says(shape):
    model = build_model(**{"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6, **shape})
    weights, kept = {weight.untyped_storage().data_ptr() for weight in model.parameters()}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(torch.zeros(4, 32, dtype=torch.long), use_cache=False)
    assert 4 * 4 * 32 * 6 * block_elements(model.config) == pytest.approx(sum(kept.values()), rel=WITHIN)


def test_multiplications_are_two_per_active_weight_and_token_forward():
    from torch.utils.flop_counter import FlopCounterMode

    model = build_model(hidden_size=128, intermediate_size=384, num_hidden_layers=4)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 40, dtype=torch.long))
    predicted = 2 * 80 * size_of(model).active + head_flops(model.config, 80, backward=False)
    assert predicted == pytest.approx(counter.get_total_flops(), rel=WITHIN)


def test_experts_that_a_token_does_not_pass_are_not_counted_and_none_is_quantised():
    from transformers import Qwen3MoeConfig

    sizes = {"hidden_size": 32, "moe_intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 40}
    config = Qwen3MoeConfig(num_experts=16, num_experts_per_tok=2, num_attention_heads=2, head_dim=16, **sizes)
    model = build_on_meta(config, "bfloat16").requires_grad_(False)
    experts = sum(weight.numel() for name, weight in model.named_parameters() if ".experts." in name)
    assert size_of(model).active < sum(weight.numel() for weight in model.parameters()) - 0.8 * experts
    assert 2 * experts < size_of(model, bits=4).frozen_bytes < size_of(model).frozen_bytes


def test_four_bit_weights_are_counted_as_bitsandbytes_stores_them(tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    build_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    real = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantised, dtype="float32")
    stored = sum(weight.nbytes for weight in real.parameters())
    stored += sum(weight.quant_state.absmax.nbytes for weight in real.parameters() if hasattr(weight, "quant_state"))
    model = build_on_meta(real.config, "float32").requires_grad_(False)
    assert size_of(model, bits=4).frozen_bytes == pytest.approx(stored, rel=0.01)


# What the command says


def test_no_weights_are_needed(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    (tmp_path / "teacher" / "model.safetensors").write_bytes(b"")
    assert command.main(["plan", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "distill.first" in out and "No problems found." in out


def test_a_recipe_of_the_hub_is_planned_offline_as_far_as_it_goes(capsys):
    recipe = ROOT / "recipes/commonsense_qa/qwen3-8b_to_qwen3-0.6b.yaml"
    assert command.main(["plan", str(recipe), "--config_file", str(ROOT / "configs/fsdp2.yaml")]) == 0
    out = capsys.readouterr().out
    for missing in ("sft.model_name_or_path: Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B", "tau/commonsense_qa"):
        assert missing in out.partition("Could not be looked up:")[2]
    assert "No problems found in what could be looked at." in out


def test_local_rows_are_planned_where_only_the_models_are_out_of_reach(tmp_path):
    recipe = write_recipe(tmp_path)
    recipe.write_text(recipe.read_text().replace(str(tmp_path / "teacher"), "owner/absent"))
    report, found = planned(recipe, "--distill.max_steps=-1", "--distill.num_train_epochs=1")
    assert found["distill.first"].rows == 40 and found["distill.first"].steps == 5
    _, found = planned(recipe, "--distill.max_steps=50", "--distill.rounds=2")
    assert found["distill.first"].steps == 55
    assert found["cache"].rows == 83 and found["cache"].tokens is None
    assert any("owner/absent" in line for line in report.unknown) and not report.problems


# Machines


@pytest.mark.parametrize(
    ("name", "processes", "weights", "gradients"),
    [("cpu", 1, 1, 1), ("multi_gpu", 8, 1, 1), ("fsdp2", 8, 8, 8), ("zero2", 8, 1, 8), ("zero3", 8, 8, 8)],
)
def test_an_accelerate_configuration_says_what_is_shared_out(name, processes, weights, gradients):
    machine = read_machine(str(ROOT / "configs" / f"{name}.yaml"))
    assert (machine.processes, machine.shards(), machine.shards(gradients=True)) == (processes, weights, gradients)


def test_sharding_lowers_weights_and_optimizer_and_keeps_activations(tmp_path):
    recipe = write_recipe(tmp_path, model={"num_hidden_layers": 16})
    machines = (Machine(), Machine(8, "FSDP"))
    one, sharded = (planned(recipe, machine=machine)[1]["distill.first"].memory for machine in machines)
    assert sharded["optimizer"] == one["optimizer"] // 8 and one["optimizer"] == 2 * one["gradients"]
    # and embeddings, head and two blocks are gathered to compute
    assert one["weights"] / 8 < sharded["weights"] < one["weights"] / 2
    assert sharded["activations"] == one["activations"]


def test_hours_are_operations_over_peak_utilisation_and_devices():
    machine = Machine(processes=4, utilisation=0.5)
    assert machine.hours(989e12 * 0.5 * 4 * 3600, "bfloat16") == pytest.approx(1)
    assert machine.hours(67e12 * 0.5 * 4 * 3600, "float32") == pytest.approx(1)
    assert Machine(accelerator="t4").hours(1e18, "bfloat16") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--accelerator", "abacus"], "choose from"),
        (["--utilisation", "30"], "above 0 and at most 1"),
        (["--config_file", "absent.yaml"], "There is no absent.yaml"),
    ],
)
def test_a_wrong_option_is_refused_with_its_remedy(options, message, tmp_path, capsys):
    try:
        assert command.main(["plan", str(write_recipe(tmp_path)), *options]) == 2
    except SystemExit as stop:
        assert stop.code == 2
    assert message in capsys.readouterr().err


def test_memory_and_types_that_an_accelerator_lacks_are_problems(tmp_path, capsys, monkeypatch):
    recipe = write_recipe(tmp_path)
    assert command.main(["plan", str(recipe), "--accelerator", "t4", "--distill.dtype=bfloat16"]) == 2
    assert "no bfloat16" in capsys.readouterr().out
    monkeypatch.setitem(plan.ACCELERATORS, "l4", ("tiny", 1, 1, 1e-6))
    assert command.main(["plan", str(recipe), "--accelerator", "l4"]) == 2
    assert capsys.readouterr().out.count("more than tiny has") == 3
