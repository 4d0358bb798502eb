"""The trainer joins the parts in the right order: teacher = student gives zero, and scaling keeps the gradient."""

import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from first_trl.first_config import FIRSTConfig
from first_trl.losses import partition_divergence
from first_trl.scoring import teacher_rows
from first_trl.trainer import FIRSTTrainer
from first_trl.training import adapters_to_float32
from tests.cache_recipe import write_recipe
from tests.tiny import build_model, build_tokenizer

LAYOUTS = {
    "padded": {},
    "padding_free": {"padding_free": True},
    "packed": {"packing": True, "max_length": 24},
}


def random_examples(num: int, vocab_size: int, seed: int = 0, completion: tuple[int, int] = (1, 4)) -> list[dict]:
    """Tokenised examples of many lengths, 1 to 3 supervised tokens each, as `first_trl.data.encoding` writes them."""
    generator = np.random.default_rng(seed)
    examples = []
    for _ in range(num):
        prompt, answer = int(generator.integers(2, 9)), int(generator.integers(*completion))
        ids = generator.integers(3, vocab_size, prompt + answer).tolist()
        examples.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return examples


def cache_of(model, examples, top_k=5, dtype=np.float32) -> Dataset:
    """The columns of a cache, straight from the teacher, stored as `dtype`."""
    rows = teacher_rows(model.eval(), examples, top_k=top_k, tokens_per_batch=64)
    for row in rows:
        row["teacher_log_probs"] = row["teacher_log_probs"].astype(dtype)
        row["teacher_tail_log_prob"] = row["teacher_tail_log_prob"].astype(np.float32)
    return Dataset.from_list([{key: np.asarray(value).tolist() for key, value in row.items()} for row in rows])


def trainer_for(model, dataset, tokenizer, tmp_path, peft_config=None, **settings):
    defaults = {"report_to": "none", "use_cpu": True, "gradient_checkpointing": False, "bf16": False}
    args = FIRSTConfig(output_dir=str(tmp_path), **defaults | {"logging_steps": 1} | settings)
    return FIRSTTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def tiny_trainer(folder, rows=8, student=1, top_k=5, dtype=np.float32, **settings):
    """A student of seed `student` and the cache of a teacher of seed 0."""
    tokenizer = build_tokenizer()
    dataset = cache_of(build_model(len(tokenizer)), random_examples(rows, len(tokenizer)), top_k, dtype)
    return trainer_for(build_model(len(tokenizer), seed=student), dataset, tokenizer, folder, **settings)


@pytest.mark.parametrize(
    ("layout", "dtype", "bound"),
    [*((layout, np.float32, 1e-6) for layout in LAYOUTS), ("padded", np.float16, 1e-3)],
)
def test_a_student_equal_to_its_teacher_has_no_loss(layout, dtype, bound, tmp_path):
    settings = LAYOUTS[layout] | {"per_device_eval_batch_size": 4}
    metrics = tiny_trainer(tmp_path, 17, student=0, dtype=dtype, **settings).evaluate()
    assert abs(metrics["eval_loss"]) <= bound and abs(metrics["eval_kl"]) <= bound
    assert metrics["eval_teacher_agreement"] == 1.0
    assert metrics["eval_student_mass"] == pytest.approx(metrics["eval_teacher_mass"], abs=1e-3)


def test_a_different_student_has_the_same_loss_in_every_layout(tmp_path):
    trainers = {name: tiny_trainer(tmp_path, 17, per_device_eval_batch_size=32, **LAYOUTS[name]) for name in LAYOUTS}
    losses = [trainer.evaluate()["eval_kl"] for trainer in trainers.values()]
    assert losses[0] > 0.1 and losses == pytest.approx([losses[0]] * 3, rel=1e-4)


def test_batch_accumulation_and_processes_give_the_same_gradient(tmp_path):
    from tests.process_jobs import one_step

    splits = {"batch": (8, 1), "accumulated": (1, 8), "two_processes": (4, 1)}
    jobs = {
        name: {"out": str(tmp_path / f"{name}.json"), "batch": batch, "accumulation": accumulation}
        for name, (batch, accumulation) in splits.items()
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "tests.process_jobs", "one_step", json.dumps(jobs["two_processes"])]
    ranks = [
        subprocess.Popen(
            command, cwd=Path(__file__).parent.parent, env=os.environ | address | {"RANK": rank, "LOCAL_RANK": rank}
        )
        for rank in "01"
    ]
    one_step(jobs["batch"])
    one_step(jobs["accumulated"])
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    reference, *others = (json.loads(Path(job["out"]).read_text()) for job in jobs.values())
    assert max(np.abs(value).max() for value in reference.values()) > 1e-3
    for gradient in others:
        for name, expected in reference.items():
            error = np.linalg.norm(np.subtract(gradient[name], expected))
            assert error <= 1e-5 * max(np.linalg.norm(expected), 1e-12), name


def test_the_gradient_is_that_of_the_eager_divergence_through_the_whole_model(tmp_path):
    trainer = tiny_trainer(tmp_path, 6)
    student, batch = trainer.model, trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    student.train()
    trainer.compute_loss(student, dict(batch)).backward()
    ours = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()

    logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    log_probs_NV = logits[batch["labels"][:, 1:] != -100].log_softmax(-1)
    kept_NK = log_probs_NV.gather(1, batch["teacher_ids"])
    others_NV = log_probs_NV.scatter(1, batch["teacher_ids"], -torch.inf)
    rows_NK1 = torch.cat([kept_NK, others_NV.logsumexp(1, keepdim=True)], dim=1)
    partition_divergence(rows_NK1, batch["teacher_log_probs"]).mean().backward()
    for name, parameter in student.named_parameters():
        error = (ours[name] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-12)
        assert error <= 1e-5, (name, float(error))


def test_accumulation_ending_in_a_short_batch_trains(tmp_path):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "num_train_epochs": 2}
    trainer = tiny_trainer(tmp_path, 7, **settings)
    trainer.train()
    assert trainer.state.global_step == 4
    logged = {"kl", "teacher_mass", "student_mass", "teacher_agreement", "num_tokens"}
    assert logged <= set(trainer.state.log_history[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True},
        {"tail": "renormalize"},
        {"mass_fraction": 0.5},
        {"ce_weight": 0.5},
        {"divergence": "jsd"},
        {"divergence": "reverse_kl", "recalibration_method": "temperature", "recalibration_value": 2.0},
        {"recalibration_method": "probability", "recalibration_value": 0.3},
    ],
    ids=str,
)
def test_every_loss_setting_lowers_its_loss(settings, tmp_path):
    training = {"learning_rate": 3e-3, "per_device_train_batch_size": 8, "num_train_epochs": 6, "save_strategy": "no"}
    trainer = tiny_trainer(tmp_path, **training, **settings)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * before


def test_renormalize_warns_when_the_student_leaves_the_teachers_tokens(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, top_k=1, tail="renormalize", num_train_epochs=3)
    warnings = []
    monkeypatch.setattr("first_trl.trainer.logger.warning", warnings.append)
    trainer.train()
    assert len(warnings) == 1 and "tail='bucket'" in warnings[0]


def test_rows_that_are_no_cache_of_this_student_are_refused(make_model, tokenizer, tmp_path):
    plain = Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]]})
    beyond = cache_of(make_model(vocab_size=60), random_examples(8, len(tokenizer)))
    for dataset, told in ((plain, "lacks teacher_ids"), (beyond, "vocabulary")):
        with pytest.raises(ValueError, match=told):
            trainer_for(make_model(vocab_size=len(tokenizer)), dataset, tokenizer, tmp_path)
    with pytest.raises(TypeError, match="not on a NoneType"):
        trainer_for(make_model(vocab_size=len(tokenizer)), None, tokenizer, tmp_path)
    trainer = tiny_trainer(tmp_path, 2)
    row = trainer.train_dataset[0]
    for change, told in (
        ({"labels": [-100] * len(row["labels"])}, "no supervised position.*leave it out"),
        ({"teacher_ids": [[4, 4, 5, 6, 7]] * len(row["teacher_ids"])}, "a teacher token twice"),
        ({name: row[name] * 2 for name in row if name.startswith("teacher")}, "Pass the cache itself"),
    ):
        with pytest.raises(ValueError, match=told):
            trainer.data_collator([row, row | change])


@pytest.mark.parametrize("layout", ["padded", "padding_free"])
def test_rows_repeated_to_fill_the_last_evaluation_batch_are_not_counted(layout, tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, 4, per_device_eval_batch_size=4, **LAYOUTS[layout])
    trainer.model.eval()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    for rank, remainder, genuine in ((0, 6, 4), (1, 6, 2), (1, 3, 0), (1, 0, 4)):  # two processes, four rows each
        state = SimpleNamespace(end_of_dataloader=True, remainder=remainder)
        monkeypatch.setattr(trainer, "accelerator", SimpleNamespace(gradient_state=state, process_index=rank))
        kept = trainer._without_repeated_rows(batch)
        positions = sum(len(row["teacher_ids"]) for row in trainer.train_dataset.select(range(genuine)))
        for name in ("teacher_ids", "teacher_log_probs", "places"):
            assert torch.equal(kept[name], batch[name][:positions])
        state.end_of_dataloader = False
        assert trainer._without_repeated_rows(batch) is batch


def test_a_rank_without_evaluation_rows_takes_part_in_the_same_reductions(tmp_path, monkeypatch):
    trainer, shapes = tiny_trainer(tmp_path, 4), []
    reduce = trainer.accelerator.reduce
    noted = lambda sums, how: (shapes.append(sums.shape), reduce(sums, how))[1]  # noqa: E731
    monkeypatch.setattr(trainer.accelerator, "reduce", noted)
    trainer.model.eval()
    trainer.log({"eval_loss": 1.0})  # as on a rank whose batches held repeated rows alone
    without_rows, logged = list(shapes), dict(trainer.state.log_history[-1])
    trainer.evaluate()
    assert without_rows == shapes[1:] and len(without_rows) == 1
    assert "eval_kl" not in logged and trainer.state.log_history[-1]["eval_kl"] > 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"eval_packing": True}, "eval_packing.*documents.*packing: true"),
        ({"packing": True, "packing_strategy": "wrapped"}, "packing_strategy='wrapped'.*write packing_strategy: bfd"),
        ({"trust_remote_code": True}, "trust_remote_code=True"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1: .*smooths the teacher"),
        ({"ce_weight": 1.5}, "ce_weight=1.5"),
        ({"mass_fraction": 0.0}, "mass_fraction=0.0"),
        ({"tail": "drop"}, "tail='drop': choose one of bucket, renormalize"),
        ({"recalibration_method": "temperature"}, "recalibration_value is missing"),
        ({"recalibration_method": "none", "recalibration_value": 2.0}, "recalibration_value=2.0.*none"),
        ({"calibration": "nowhere.json"}, "nowhere.json.*first-trl calibrate"),
        (
            {"divergence": "reverse_kl", "recalibration_method": "probability", "recalibration_value": 0.3},
            "every loss would be infinite.*forward_kl or jsd",
        ),
    ],
    ids=str,
)
def test_settings_that_cannot_be_honoured_are_refused_with_the_remedy(settings, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        FIRSTConfig(output_dir=str(tmp_path), bf16=False, **settings)


def test_a_value_alone_is_a_temperature_and_a_calibration_file_gives_method_and_value(tmp_path):
    families = {"temperature": {"value": 2.5}, "label_smoothing": {"value": 0.1}}
    (tmp_path / "calibration.json").write_text(json.dumps({"method": "temperature", "families": families}))

    def recalibration(**settings):
        args = FIRSTConfig(output_dir=str(tmp_path), bf16=False, **settings)
        return args.recalibration_method, args.recalibration_value

    file = str(tmp_path / "calibration.json")
    assert recalibration(recalibration_value=2.4) == ("temperature", 2.4) and recalibration() == ("none", None)
    assert recalibration(calibration=file) == ("temperature", 2.5)
    assert recalibration(calibration=file, recalibration_method="label_smoothing") == ("label_smoothing", 0.1)
    with pytest.raises(ValueError, match="recalibration_value is 3.0, and .* says 2.5"):
        recalibration(calibration=file, recalibration_value=3.0)


def test_a_loss_that_is_not_finite_ends_training_with_the_step_and_a_remedy(tmp_path):
    trainer = tiny_trainer(tmp_path, learning_rate=1e30, max_steps=6, lr_scheduler_type="constant")
    with pytest.raises(ValueError, match="loss is .* at step .: training has diverged. Lower learning_rate"):
        trainer.train()


def test_only_adapters_are_held_in_float32(make_model):
    adapter = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    model = get_peft_model(make_model(tie_word_embeddings=False).to(torch.bfloat16), adapter).to(torch.bfloat16)
    adapters_to_float32(SimpleNamespace(model=model, args=SimpleNamespace(bf16=False, fp16=False)))
    trained = {name: weight.dtype for name, weight in model.named_parameters() if weight.requires_grad}
    assert {dtype for name, dtype in trained.items() if "lora" in name} == {torch.float32}
    assert {dtype for name, dtype in trained.items() if "lora" not in name} == {torch.bfloat16}
    model(input_ids=torch.arange(4)[None]).logits.sum().backward()


def test_a_student_whose_template_makes_other_prompts_is_refused_with_both_shown(make_model, tmp_path):
    from tokenizers import normalizers

    from first_trl.cache.reader import open_cache
    from first_trl.stages import cache

    cache.main([str(write_recipe(tmp_path, rows=8))])
    written = open_cache(tmp_path / "runs" / "tiny" / "cache" / "train")
    student = make_model(vocab_size=len(build_tokenizer()))
    trainer_for(student, written, build_tokenizer(), tmp_path / "same")
    other = build_tokenizer()
    other.backend_tokenizer.normalizer = normalizers.Replace("Review", "the")
    with pytest.raises(ValueError, match="another prompt than the teacher saw.*Review.*the"):
        trainer_for(student, written, other, tmp_path / "other")


def test_a_step_does_not_wait_for_the_device(tmp_path):
    """Operators whose result's shape or value the host must know; on a GPU each waits for all that was launched."""

    class CountWaits(TorchDispatchMode):
        found: Counter = Counter()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.__name__.split(".")[0]
            by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
            if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"):
                self.found[name] += 1
            return func(*args, **(kwargs or {}))

    settings = {"recalibration_method": "temperature", "recalibration_value": 2.0, "ce_weight": 0.5}
    trainer = tiny_trainer(tmp_path, **settings)
    batch = trainer.data_collator(trainer.train_dataset.__getitems__(list(range(8))))
    trainer.model.train()
    with CountWaits() as waits:
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(10)).backward()
    assert sum(waits.found.values()) <= 2, waits.found


def test_a_batch_where_all_is_learned_is_made_in_two_milliseconds(make_model, tokenizer, tmp_path):
    """8 rows of 1,024 tokens with 900 supervised; numpy formatting took 59 ms. A lenient bound, for a busy machine."""
    rng, rows, learned = np.random.default_rng(0), 16, 900
    ids = rng.integers(3, len(tokenizer), (rows, 1024))
    columns = {
        "input_ids": ids,
        "labels": np.where(np.arange(1024) < 1024 - learned, -100, ids),
        "teacher_ids": np.argsort(rng.random((rows, learned, len(tokenizer))), axis=2)[:, :, :5],
        "teacher_log_probs": np.full((rows, learned, 5), np.log(0.19), np.float32),
        "teacher_tail_log_prob": np.full((rows, learned), np.log(0.05), np.float32),
    }
    dataset = Dataset.from_dict({name: values.tolist() for name, values in columns.items()})
    trainer = trainer_for(make_model(vocab_size=len(tokenizer)), dataset, tokenizer, tmp_path)
    times = []
    for _ in range(20):
        start = time.process_time()
        batch = trainer.data_collator(trainer.train_dataset.__getitems__(list(range(8))))
        times.append(time.process_time() - start)
    assert batch["teacher_log_probs"].shape == (7200, 6) and min(times) < 4e-3, min(times)
    print(f"{1e3 * min(times):.2f} ms")
