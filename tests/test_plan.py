"""A plan says what a run will take: its figures are held to real runs, and what it cannot know it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from first_trl import __main__ as command
from first_trl.plan.estimate import make_plan
from first_trl.plan.footprint import (
    attention_flops,
    build_on_meta,
    count_step,
    head_chunk_bytes,
    head_flops,
    optimizer_bytes,
    weights_of,
)
from first_trl.plan.machine import Machine, read_machine
from first_trl.recipe.loading import load_recipe
from tests.cache_recipe import write_recipe
from tests.tiny import build_model, build_tokenizer

ROOT = Path(__file__).parent.parent


def planned(recipe, *overrides, machine=None):
    plan = make_plan(load_recipe(recipe, list(overrides)), machine or Machine())
    return plan, {work.name: work for work in plan.works}


# Against real runs


def test_bytes_rows_and_positions_of_a_cache_are_those_of_the_real_one(tmp_path, monkeypatch):
    import datasets

    from first_trl.stages import cache

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    recipe = write_recipe(tmp_path, rows=700, rows_per_shard=300)
    _, works = planned(recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        cache.main([str(recipe)])
    manifests = [
        json.loads((tmp_path / f"runs/tiny/cache/{role}/manifest.json").read_text())
        for role in ("train", "validation")
    ]
    assert works["cache"].rows == sum(manifest["totals"]["rows"] for manifest in manifests) == 1403
    positions = sum(manifest["totals"]["supervised_positions"] for manifest in manifests)
    assert works["cache"].supervised == positions
    real = sum(shard["bytes"] for manifest in manifests for shard in manifest["shards"])
    assert works["cache"].cache_bytes == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("batch", "accumulation", "epochs"), [(8, 1, 3), (4, 3, 2), (3, 4, 1.5), (64, 1, 2)])
def test_steps_are_those_that_the_trainer_takes(batch, accumulation, epochs, processes, tmp_path):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    recipe = write_recipe(tmp_path, rows=41)
    settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    settings |= {"num_train_epochs": epochs, "max_steps": -1}
    _, works = planned(
        recipe, *(f"--distill.{key}={value}" for key, value in settings.items()), machine=Machine(processes=processes)
    )
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **settings)
    trainer = Trainer(build_model(), args, train_dataset=Dataset.from_dict({"input_ids": [[1]] * 41}))
    batches = -(-len(trainer.get_train_dataloader()) // processes)
    fake = [None] * batches
    expected = trainer.set_initial_training_values(args, fake)[-1]
    assert works["distill.first"].steps == expected


def test_a_step_limit_is_the_number_of_steps(tmp_path):
    _, works = planned(write_recipe(tmp_path), "--distill.max_steps=17")
    assert works["distill.first"].steps == 17


def test_multiplications_are_two_per_weight_and_token_and_three_times_that_with_a_backward():
    config = build_model().config
    model = build_on_meta(config, dtype="float32", attn_implementation=None)
    weights = sum(weight.numel() for weight in model.model.layers.parameters() if weight.ndim == 2)
    forward = count_step(model, 2, 10, backward=False)
    both = count_step(model, 2, 10, backward=True)
    assert forward.flops == 2 * 20 * weights
    assert both.flops == 3 * forward.flops
    assert attention_flops(config, 2, 10, backward=False) == 4 * 2 * 10**2 * 32 * 2
    assert head_flops(config, 7, backward=True) == 2 * head_flops(config, 7, backward=False) == 4 * 7 * 27 * 32


def test_a_frozen_base_needs_two_multiplications_back_not_four():
    from peft import LoraConfig

    adapter = LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM")
    model = build_on_meta(build_model().config, dtype="float32", attn_implementation=None, peft_config=adapter)
    forward, both = count_step(model, 2, 10, backward=False), count_step(model, 2, 10, backward=True)
    assert 1.9 < both.flops / forward.flops < 2.2


def test_gradient_checkpointing_trades_multiplications_for_memory():
    config = build_model(num_hidden_layers=12).config
    plain, checkpointed = (
        count_step(
            build_on_meta(config, dtype="float32", attn_implementation=None),
            4,
            64,
            backward=True,
            checkpointing=checkpointing,
        )
        for checkpointing in (False, True)
    )
    assert checkpointed.peak_bytes < plain.peak_bytes / 3
    assert plain.flops < checkpointed.flops <= plain.flops * 4 / 3


def test_eager_attention_is_counted_with_its_square_of_tokens():
    config = build_model(max_position_embeddings=2048).config
    fused, eager = (
        count_step(build_on_meta(config, dtype="float32", attn_implementation=name), 1, 1024, backward=True)
        for name in ("sdpa", "eager")
    )
    square = 4 * 1024**2 * 2 * 2  # float32, two heads, two layers
    assert eager.peak_bytes - fused.peak_bytes > square


def test_four_bit_weights_are_counted_as_bitsandbytes_stores_them(tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    build_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    real = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), dtype="float32"
    )
    stored = sum(weight.nbytes for weight in real.parameters())
    scales = [weight.quant_state for weight in real.parameters() if hasattr(weight, "quant_state")]
    stored += sum(state.absmax.nbytes for state in scales)
    model = build_on_meta(real.config, dtype="float32", attn_implementation=None).requires_grad_(False)
    assert len(scales) == 14
    assert weights_of(model, bits=4).frozen == pytest.approx(stored, rel=0.01)


def test_the_memory_of_a_step_is_that_of_a_real_one():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak memory of a process is read from Linux's /proc")
    result = subprocess.run([sys.executable, "-m", "tests.test_plan"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    for name, (predicted, measured) in json.loads(result.stdout.splitlines()[-1]).items():
        assert predicted == pytest.approx(measured, rel=0.25), name
        assert measured > 30e6


def test_optimizers_keep_what_their_names_say():
    assert optimizer_bytes("adamw_torch_fused", 10, 40) == 80
    assert optimizer_bytes("paged_adamw_8bit", 10, 40) == 20
    assert optimizer_bytes("sgd", 10, 40) == 0


# What a plan reads, and what it says


def test_no_weights_are_needed(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    (tmp_path / "teacher" / "model.safetensors").unlink()
    assert command.main(["plan", str(recipe)]) == 0
    said = capsys.readouterr().out
    assert "distill.first" in said and "No problems found." in said


def test_a_recipe_of_the_hub_is_planned_offline_as_far_as_it_goes(capsys):
    recipe = ROOT / "recipes/commonsense_qa/qwen3-8b_to_qwen3-0.6b.yaml"
    assert command.main(["plan", str(recipe), "--config_file", str(ROOT / "configs/fsdp2.yaml")]) == 0
    said = capsys.readouterr().out
    for missing in ("tokenizer of Qwen/Qwen3-8B", "configuration of Qwen/Qwen3-0.6B", "tau/commonsense_qa"):
        assert missing in said.partition("Could not be looked up:")[2]
    assert "No problems found in what could be looked at." in said


def test_local_rows_are_planned_where_only_the_models_are_out_of_reach(tmp_path):
    recipe = write_recipe(tmp_path)
    recipe.write_text(recipe.read_text().replace(str(tmp_path / "teacher"), "owner/absent"))
    plan, works = planned(recipe, "--distill.max_steps=-1", "--distill.num_train_epochs=1")
    assert works["distill.first"].rows == 40 and works["distill.first"].steps == 5
    assert works["cache"].rows == 83 and works["cache"].tokens is None
    assert any("owner/absent" in line for line in plan.unknown) and not plan.problems


def test_every_problem_of_a_recipe_file_is_listed(tmp_path, capsys):
    recipe = write_recipe(tmp_path, cache={"top_k": 0}, calibrate={"method": "tempature"}, surprise={})
    assert command.main(["plan", str(recipe)]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in ("top_k", "tempature", "surprise"))


def test_problems_of_rows_and_models_are_all_listed(tmp_path, capsys):
    recipe = write_recipe(tmp_path, cache={"teacher": str(tmp_path / "teacher")})
    tokenizer = build_tokenizer()
    build_model(40, max_position_embeddings=8).save_pretrained(tmp_path / "student")
    tokenizer.add_tokens(["surprise"])
    tokenizer.save_pretrained(tmp_path / "student")
    rows = (tmp_path / "train.jsonl").read_text().splitlines()
    (tmp_path / "test.jsonl").write_text("\n".join(rows[:3]) + "\n")
    (tmp_path / "validation.jsonl").write_text(rows[0] + '\n{"text": "a film", "label": null}\n')
    status = command.main(["plan", str(recipe), f"--distill.model_name_or_path={tmp_path / 'student'}"])
    said = capsys.readouterr().out.partition("Problems:")[2]
    assert status == 2
    for problem in (
        "the student's tokenizer is not the teacher's",
        "datasets.validation: row 1",
        "datasets.test.test: 3 of its prompts are in datasets.train",
        "the student was made for 8",
    ):
        assert problem in said


def test_a_student_in_four_bits_that_cannot_be_sharded_is_a_problem_of_sharded_plans_alone(tmp_path):
    recipe = write_recipe(tmp_path)
    four_bits = ["--distill.load_in_4bit=true", "--distill.use_peft=true", "--distill.lora_target_modules=all-linear"]
    sharded = read_machine(str(ROOT / "configs/fsdp2.yaml"), "h100", 0.3)
    assert planned(recipe, *four_bits)[0].problems == []
    (problem,) = planned(recipe, *four_bits, machine=sharded)[0].problems
    assert "bnb_4bit_quant_storage: float32" in problem
    assert planned(recipe, *four_bits, "--distill.bnb_4bit_quant_storage=float32", machine=sharded)[0].problems == []


def test_memory_and_types_that_an_accelerator_lacks_are_problems(tmp_path):
    recipe = write_recipe(tmp_path)
    plan, works = planned(
        recipe, "--distill.bf16=true", "--distill.dtype=bfloat16", machine=read_machine(None, "t4", 0.3)
    )
    assert ["no bfloat16" in problem for problem in plan.problems] == [True]
    assert works["distill.first"].hours is None and works["cache"].hours > 0
    small = Machine(accelerator=Machine().accelerator._replace(memory_gb=1e-6))
    problems = planned(recipe, machine=small)[0].problems
    assert len(problems) == 3 and all("needs" in problem for problem in problems)


# Machines


@pytest.mark.parametrize(
    ("name", "processes", "weights", "gradients"),
    [
        ("cpu", 1, 1, 1),
        ("single_gpu", 1, 1, 1),
        ("multi_gpu", 8, 1, 1),
        ("fsdp2", 8, 8, 8),
        ("zero2", 8, 1, 8),
        ("zero3", 8, 8, 8),
        ("multi_node", 16, 1, 1),
    ],
)
def test_an_accelerate_configuration_says_what_is_shared_out(name, processes, weights, gradients):
    machine = read_machine(str(ROOT / "configs" / f"{name}.yaml"), "h100", 0.3)
    assert (machine.processes, machine.shards, machine.gradient_shards) == (processes, weights, gradients)


def test_sharding_lowers_weights_and_optimizer_and_keeps_activations(tmp_path):
    recipe = write_recipe(tmp_path, model={"num_hidden_layers": 16})
    one, sharded = (
        planned(recipe, machine=machine)[1]["distill.first"].memory for machine in (Machine(), Machine(8, 1, "FSDP"))
    )
    assert sharded.optimizer == one.optimizer // 8
    assert sharded.weights < one.weights / 3
    assert sharded.activations == one.activations


def test_hours_are_operations_over_peak_utilisation_and_devices():
    machine = Machine(processes=4, utilisation=0.5)
    assert machine.hours(989e12 * 0.5 * 4 * 3600, "bfloat16") == pytest.approx(1)
    assert machine.hours(67e12 * 0.5 * 4 * 3600, "float32") == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--accelerator", "abacus"], "choose one of h100"),
        (["--utilisation", "30"], "above 0 and at most 1"),
        (["--config_file", "absent.yaml"], "there is no such file"),
    ],
)
def test_a_wrong_option_is_refused_with_its_remedy(options, message, tmp_path, capsys):
    assert command.main(["plan", str(write_recipe(tmp_path)), *options]) == 2
    assert message in capsys.readouterr().err


def test_the_head_is_planned_by_the_tile_not_by_the_vocabulary():
    config = build_model(vocab_size=151_936).config
    assert head_chunk_bytes(config, 16_384, 2, backward=True) < 16_384 * 151_936 * 4 / 100


def main() -> None:
    """The predicted and the measured peak of a distillation step, above what is held before it; printed as JSON."""
    import ctypes
    import tempfile

    from peft import LoraConfig

    from tests.test_step_memory import peak_bytes
    from tests.test_trainer import cache_of, random_examples, trainer_for

    ctypes.CDLL(None).mallopt(-3, 2**16)  # see tests.test_step_memory
    tokenizer, results = build_tokenizer(), {}
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
    dataset = cache_of(build_model(len(tokenizer)), random_examples(16, len(tokenizer), completion=(100, 112)))
    longest = max(len(row["input_ids"]) for row in dataset)
    for name, settings in {"plain": {}, "checkpointed": {"gradient_checkpointing": True}}.items():
        model, adapter = build_model(len(tokenizer), **sizes), None
        if name == "plain":
            adapter = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.05)
        counted = build_on_meta(model.config, dtype="float32", attn_implementation=None, peft_config=adapter)
        rows = 64 if name == "checkpointed" else 16
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_for(
                model,
                dataset.select([i % 16 for i in range(rows)]),
                tokenizer,
                folder,
                per_device_train_batch_size=rows,
                max_steps=1,
                save_strategy="no",
                disable_tqdm=True,
                peft_config=adapter,
                **settings,
            )
            trainer.train()  # loads what any step loads
            measured = peak_bytes(trainer.train)
        step = count_step(counted, rows, longest, backward=True, checkpointing=bool(settings))
        weights = weights_of(counted)
        head = head_chunk_bytes(model.config, rows * 106, 4, backward=True)
        predicted = max(step.peak_bytes, step.saved_bytes + head) + 3 * weights.trained
        results[name] = [predicted, measured]
    print(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
