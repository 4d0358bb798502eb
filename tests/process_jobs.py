"""Jobs that tests start in several processes: a short training run, and a stage whose processes can be killed.

accelerate launch ... -m tests.process_jobs NAME JOB     JOB: the job's settings as JSON
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch


def train(job: dict) -> None:
    """A few AdamW steps of an adapter on 32 examples; the main process writes the adapter and what was evaluated.

    Every rank writes `ranks/RANK.json`: a digest of its weights, and how often it wrote an adapter.
    """
    import peft
    from peft import LoraConfig
    from safetensors.torch import save_file

    from tests.test_trainer import cache_of, random_examples, trainer_for
    from tests.tiny import build_model, build_tokenizer

    folder, writes, save = Path(job["folder"]), [], peft.PeftModel.save_pretrained

    def counted(model, path, *args, **kwargs):
        writes.append(str(path))
        return save(model, path, *args, **kwargs)

    peft.PeftModel.save_pretrained = counted
    tokenizer = build_tokenizer()
    dataset = cache_of(build_model(len(tokenizer), seed=0), random_examples(32, len(tokenizer)))
    settings = {
        "per_device_train_batch_size": job["batch"],
        "gradient_accumulation_steps": job["accumulation"],
        "learning_rate": 1e-3,
        "max_steps": job.get("steps", 6),
        "save_strategy": "no",
        "per_device_eval_batch_size": 3,
        "disable_tqdm": True,
        **job.get("settings", {}),
    }
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=True, task_type="CAUSAL_LM")
    trainer = trainer_for(
        build_model(len(tokenizer), seed=1), dataset, tokenizer, folder / "out", peft_config=adapter, **settings
    )
    trainer.eval_dataset = trainer.eval_dataset.select(range(job.get("eval_rows", 32)))
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(folder / "adapter")
    weights = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    weights = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in weights.items()
    }
    weights = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    rank = trainer.accelerator.process_index
    (folder / "ranks").mkdir(exist_ok=True, parents=True)
    total = sum(value.double().sum().item() for value in weights.values())
    (folder / "ranks" / f"{rank}.json").write_text(json.dumps({"total": total, "writes": writes}))
    if trainer.is_world_process_zero():
        save_file(weights, folder / "weights.safetensors")
        history = [entry for entry in trainer.state.log_history if "kl" in entry]
        (folder / "metrics.json").write_text(json.dumps({"evaluated": metrics, "trained": history}))


def distill(job: dict) -> None:
    """The distill stage; process `kill_rank` kills itself before step `kill_step` (counted from 0).

    Every rank appends the rows of its batches to `order-RANK.txt`, one line per batch: step, and the rows' tokens.
    """
    from transformers import TrainerCallback

    from first_trl.stages import distill as stage
    from first_trl.trainer import FIRSTTrainer

    rank = int(os.environ.get("RANK", 0))

    class Killer(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if rank == job.get("kill_rank") and state.global_step == job["kill_step"]:
                os.kill(os.getpid(), signal.SIGKILL)

    init, compute_loss = FIRSTTrainer.__init__, FIRSTTrainer.compute_loss

    def with_killer(self, *args, **kwargs):
        init(self, *args, callbacks=[Killer()], **kwargs)

    def noted(self, model, inputs, *args, **kwargs):
        with open(Path(job["folder"]) / f"order-{rank}.txt", "a") as file:
            file.write(f"{self.state.global_step} {json.dumps(inputs['input_ids'].tolist())}\n")
        return compute_loss(self, model, inputs, *args, **kwargs)

    FIRSTTrainer.__init__, FIRSTTrainer.compute_loss = with_killer, noted
    stage.main([job["recipe"], *job.get("overrides", [])])


def fsdp2(job: dict) -> None:
    """Three AdamW steps of whole weights or of an adapter, sharded by torch's FSDP2 and not; writes the difference.

    accelerate shards on accelerators alone, so on a CPU torch's own `fully_shard` does what it would do there.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plain, sharded = (shard_and_step(job["adapter"], chosen) for chosen in (None, mesh))
    assert plain.keys() == sharded.keys()
    difference = max(float((sharded[name] - plain[name]).norm() / plain[name].norm()) for name in plain)
    if dist.get_rank() == 0:
        Path(job["out"]).write_text(json.dumps({"difference": difference, "tensors": len(plain)}))
    dist.destroy_process_group()


def shard_and_step(adapter: bool, mesh) -> dict[str, torch.Tensor]:
    """The trained weights, whole, after three steps on four rows: all four here, or shared out over `mesh`."""
    from peft import LoraConfig, get_peft_model
    from torch.distributed.fsdp import fully_shard

    from first_trl.modeling import add_partition_head
    from tests.tiny import build_model

    model = build_model(seed=1, tie_word_embeddings=False)
    if adapter:
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    base = model.get_base_model() if adapter else model
    add_partition_head(base)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, 27, (4, 7), generator=generator)
    labels = input_ids.masked_fill(torch.arange(7) < 4, -100)
    scale = 1
    if mesh is not None:
        for block in base.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        own, scale = torch.arange(4).chunk(mesh.size())[mesh.get_rank()], mesh.size()
        input_ids, labels = input_ids[own], labels[own]
    ids_NK = torch.arange(5).expand(3 * len(labels), 5)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for _ in range(3):
        output = model(input_ids=input_ids, labels=labels, partition_ids=ids_NK)
        (-output.log_probs.sum() / 12 * scale).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert mesh is None or all(hasattr(weight, "full_tensor") for weight in trained.values())
    return {
        name: (weight.detach().full_tensor() if mesh is not None else weight.detach())
        for name, weight in trained.items()
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"train": train, "distill": distill, "fsdp2": fsdp2}[sys.argv[1]](json.loads(sys.argv[2]))
