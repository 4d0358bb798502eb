"""One recipe under any number of processes: the same adapter, the same metrics, the same run after a kill.

Every test starts real processes with `accelerate launch`; on a machine without a GPU they join through gloo.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cache_recipe import write_recipe

ROOT = Path(__file__).parent.parent
# name -> (processes, per-device batch, accumulation): the same eight examples in every step
SPLITS = {"1x8": (1, 8, 1), "2x4": (2, 4, 1), "4x2": (4, 2, 1), "1x1x8": (1, 1, 8), "2x2x2": (2, 2, 2)}


def launch(processes: int, name: str, job: dict, *options: str) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", f"--num_processes={processes}", "--num_machines=1"]
    launcher += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    launcher += options or (["--multi_gpu"] if processes > 1 else [])  # accelerate's name for torchrun
    command = [*launcher, "-m", "tests.process_jobs", name, json.dumps(job)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment |= {"DS_ACCELERATOR": "cpu"} if options else {"ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)


def finish(processes: int, name: str, job: dict, *options: str) -> None:
    result = launch(processes, name, job, *options)
    assert result.returncode == 0, result.stderr[-3000:]


def relative_difference(ours: dict, theirs: dict) -> float:
    """Largest over the tensors of |ours - theirs| / |theirs|."""
    assert ours.keys() == theirs.keys() and len(ours) > 10
    return max(float((ours[name] - value).norm() / value.norm().clamp(min=1e-12)) for name, value in theirs.items())


def saved_weights(folder: Path) -> dict:
    return load_file(next((folder / "adapter").glob("*model.safetensors")))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folders of the same short run under every split; evaluated on 17 rows, which no split divides evenly."""
    folders = {}
    for name, (processes, batch, accumulation) in SPLITS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        job = {"folder": str(folders[name]), "batch": batch, "accumulation": accumulation, "eval_rows": 17}
        finish(processes, "train", job)
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_every_split_of_the_work_ends_with_the_same_adapter_and_metrics(split, trained):
    reference, ours = (saved_weights(trained[name]) for name in ("1x8", split))
    assert relative_difference(ours, reference) <= 1e-5
    moved = [float(value.norm()) for name, value in reference.items() if "lora_B" in name]
    assert len(moved) > 5 and min(moved) > 1e-3, "the steps changed nothing"

    ranks = [json.loads(file.read_text()) for file in sorted((trained[split] / "ranks").glob("*.json"))]
    assert len(ranks) == SPLITS[split][0]
    assert len({rank["total"] for rank in ranks}) == 1  # to the bit: gradients went through the wrapper
    writes = [path for rank in ranks for path in rank["writes"]]
    assert writes == [str(trained[split] / "adapter")] == ranks[0]["writes"]

    reference, ours = (json.loads((trained[name] / "metrics.json").read_text()) for name in ("1x8", split))
    for name in ("eval_kl", "eval_student_mass", "eval_teacher_mass", "eval_teacher_agreement"):
        assert ours["evaluated"][name] == pytest.approx(reference["evaluated"][name], rel=1e-5), name
    assert len(ours["trained"]) == 6
    for step, expected in zip(ours["trained"], reference["trained"], strict=True):
        assert step["kl"] == pytest.approx(expected["kl"], rel=1e-5)
        assert step["num_tokens"] == expected["num_tokens"]


# Sharded


def sharded_by(name: str, folder: Path) -> list[str]:
    """Options of `accelerate launch`: those of configs/, with ZeRO-3 told to leave no weight whole for being small."""
    if not name.startswith("zero"):
        settings = (ROOT / "configs" / "fsdp2.yaml").read_text()
        if name == "fsdp2-checkpoints-in-pieces":
            settings = settings.replace("FULL_STATE_DICT", "SHARDED_STATE_DICT")
        (folder / "fsdp2.yaml").write_text(settings)
        return ["--config_file", str(folder / "fsdp2.yaml")]
    pytest.importorskip("deepspeed", reason="ZeRO needs DeepSpeed, which the package does not")
    automatic = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    zero = {"stage": int(name[-1]), "stage3_param_persistence_threshold": 0}
    zero["stage3_gather_16bit_weights_on_model_save"] = True
    settings = {"zero_optimization": zero, "gradient_clipping": "auto", **dict.fromkeys(automatic, "auto")}
    (folder / "deepspeed.json").write_text(json.dumps(settings))
    return ["--use_deepspeed", "--deepspeed_config_file", str(folder / "deepspeed.json"), "--zero3_init_flag", "true"]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("name", ["fsdp2", "fsdp2-checkpoints-in-pieces", "zero2", "zero3"])
def test_two_processes_that_share_the_weights_take_the_steps_of_one_and_resume(name, adapter, tmp_path):
    """An adapter, or all weights and an untied head. Not 4-bit weights, whose sharded backward bitsandbytes gets wrong
    on CPUs (its forward is right).
    """
    job = {"adapter": adapter, "eval_rows": 17, "accumulation": 1}
    finish(1, "train", {**job, "folder": str(tmp_path / "one"), "batch": 8})
    options, saving = sharded_by(name, tmp_path), {"save_strategy": "steps", "save_steps": 3}
    job |= {"folder": str(tmp_path / "two"), "batch": 4, "settings": saving}
    finish(2, "train_sharded", job, *options)
    reference, ours = saved_weights(tmp_path / "one"), saved_weights(tmp_path / "two")
    digest = json.loads((tmp_path / "two" / "ranks" / "0.json").read_text())
    assert digest["in_pieces"] == (name != "zero2")
    evaluated = [json.loads((tmp_path / run / "metrics.json").read_text())["evaluated"] for run in ("one", "two")]
    assert evaluated[1]["eval_kl"] == pytest.approx(evaluated[0]["eval_kl"], rel=1e-5)
    resumed = {**job, "folder": str(tmp_path / "again"), "resume": str(tmp_path / "two" / "out" / "checkpoint-3")}
    finish(2, "train_sharded", resumed, *options)
    assert [path.name for path in (tmp_path / "again" / "out").glob("checkpoint-*")] == ["checkpoint-6"]
    differences = [relative_difference(weights, reference) for weights in (ours, saved_weights(tmp_path / "again"))]
    print(f"{name}, adapter {adapter}: relative differences {differences[0]:.1e}, resumed {differences[1]:.1e}")
    assert max(differences) <= 1e-5


# Killed and resumed


def distill_recipe(folder, runs):
    settings = {"model_name_or_path": str(folder / "teacher"), "dtype": "float32", "bf16": False, "use_cpu": True}
    settings |= {"use_peft": True, "lora_r": 4, "lora_dropout": 0.1, "lora_target_modules": "all-linear"}
    settings |= {"gradient_checkpointing": False, "learning_rate": 1e-2, "num_train_epochs": 2, "disable_tqdm": True}
    settings |= {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 4}
    return write_recipe(folder, rows=48, output_dir=str(runs), distill=settings)


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_an_epoch_ends_as_if_it_had_not_been(tmp_path):
    from first_trl.stages import cache

    weights, orders = {}, {}
    for name in ("undisturbed", "killed"):
        folder = tmp_path / name
        recipe = distill_recipe(tmp_path / "data", folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ACCELERATE_USE_CPU", "true")
            cache.main([str(recipe)])
        job = {"recipe": str(recipe), "folder": str(folder)}
        if name == "killed":
            # 6 steps an epoch on two processes; the second dies in step 7 of 12, after the checkpoint of step 4
            result = launch(2, "distill", {**job, "kill_rank": 1, "kill_step": 6})
            assert result.returncode != 0 and "SIGKILL" in result.stderr
            kept = (folder / "tiny/students/.new/first").glob("checkpoint-*")
            assert [path.name for path in kept] == ["checkpoint-4"]
            before = [order_of(folder, rank) for rank in range(2)]
            [(folder / f"order-{rank}.txt").unlink() for rank in range(2)]
        finish(2, "distill", job)
        weights[name] = load_file(folder / "tiny/students/first/adapter_model.safetensors")
        orders[name] = [order_of(folder, rank) for rank in range(2)]
    for rank in range(2):
        assert [step for step, _ in orders["undisturbed"][rank]] == list(range(12))
        assert orders["killed"][rank] == orders["undisturbed"][rank][4:], "another order of the rows"
        assert before[rank][:6] == orders["undisturbed"][rank][:6]
    same = all(torch.equal(value, weights["undisturbed"][name]) for name, value in weights["killed"].items())
    print(f"largest relative difference {relative_difference(weights['killed'], weights['undisturbed']):.1e}")
    assert same, "gloo on CPUs is deterministic: not a bit may differ"


def order_of(folder: Path, rank: int) -> list[tuple[int, str]]:
    lines = (folder / f"order-{rank}.txt").read_text().splitlines()
    return [(int(line.partition(" ")[0]), line.partition(" ")[2]) for line in lines]


# Nodes


@pytest.mark.slow
def test_four_processes_on_two_nodes_write_the_bytes_of_one(tmp_path):
    import socket

    from tests.cache_samples import contents

    recipe = write_recipe(tmp_path, rows=200)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision=no", "--dynamo_backend=no"]
    stage = ["-m", "first_trl.stages.cache", str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen(
            [
                *common,
                *("--multi_gpu", "--num_machines=2", "--num_processes=4", f"--machine_rank={rank}"),
                *("--main_process_ip=127.0.0.1", f"--main_process_port={port}", "--rdzv_backend=static"),
                *stage,
                f"--output_dir={tmp_path / 'nodes'}",
            ],
            cwd=ROOT,
            env={
                **environment,
                "HF_DATASETS_CACHE": str(tmp_path / f"node-{rank}"),
            },  # nodes share the run folder alone
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for node in nodes:
        _, said = node.communicate(timeout=300)
        assert node.returncode == 0, said[-3000:]
    one = [*common, "--num_processes=1", "--num_machines=1", *stage, f"--output_dir={tmp_path / 'one'}"]
    subprocess.run(one, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300)
    for role in ("train", "validation"):
        folders = [tmp_path / kind / "tiny" / "cache" / role for kind in ("nodes", "one")]
        assert contents(folders[0]) == contents(folders[1])
        assert len(list(folders[0].glob("*.parquet"))) >= 50


@pytest.mark.slow
@pytest.mark.parametrize("choices", [None, ["good", "bad"]])
def test_processes_share_the_rows_of_a_set_and_write_the_answers_of_one(tmp_path, choices):
    import pyarrow.parquet as pq

    task = {"prompt": "Review : {text} Sentiment :", "completion": " {label}", "choices": choices, "max_length": 60}
    recipe = write_recipe(tmp_path / "data", rows=6, task=task)
    for processes in (1, 3):  # the test set has 2 rows: one process has none
        finish(processes, "answer", {"recipe": str(recipe), "folder": str(tmp_path / str(processes))})
    for name in ("validation", "test"):
        one, three = (pq.read_table(tmp_path / count / f"{name}.parquet").to_pydict() for count in ("1", "3"))
        assert one.keys() == three.keys() and ("example" in one) == (choices is None)
        for column in ("label_id", "target", *(["example"] if choices is None else [])):
            assert one[column] == three[column]
        assert one["label_log_prob"] == pytest.approx(three["label_log_prob"], abs=1e-5)
    assert not [file.name for file in tmp_path.glob("*/.*.parquet")]
