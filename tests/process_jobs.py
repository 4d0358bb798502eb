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

    Every rank writes `ranks/RANK.json`: a digest of the weights that it holds, which of them it shares with others,
    and how often it wrote an adapter.
    """
    import peft
    from peft import LoraConfig
    from torch.distributed.tensor import DTensor

    from first_trl.training import save_whole
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
    student = build_model(len(tokenizer), seed=1, tie_word_embeddings=job.get("adapter", True))
    trainer = trainer_for(
        student,
        dataset,
        tokenizer,
        folder / "out",
        peft_config=adapter if job.get("adapter", True) else None,
        **settings,
    )
    trainer.eval_dataset = trainer.eval_dataset.select(range(job.get("eval_rows", 32)))
    trainer.train(resume_from_checkpoint=job.get("resume"))
    metrics = trainer.evaluate()
    save_whole(trainer, folder / "adapter")
    weights = {name: value.detach() for name, value in trainer.model.named_parameters() if value.requires_grad}
    rank = trainer.accelerator.process_index
    (folder / "ranks").mkdir(exist_ok=True, parents=True)
    digest = {
        "total": sum(value.double().sum().item() for value in weights.values()),
        "in_pieces": all(isinstance(value, DTensor) or value.numel() == 0 for value in weights.values()),
        "writes": writes,
    }
    (folder / "ranks" / f"{rank}.json").write_text(json.dumps(digest))
    if trainer.is_world_process_zero():
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


def one_step(job: dict) -> None:
    """One SGD step of rate 1 on 8 examples; writes every weight's change, which is the gradient."""
    from tests.test_trainer import tiny_trainer

    sgd = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 1}
    sizes = {"per_device_train_batch_size": job["batch"], "gradient_accumulation_steps": job["accumulation"]}
    out, use_cpu = Path(job["out"]), not torch.cuda.is_available()
    trainer = tiny_trainer(out.with_suffix(""), save_strategy="no", use_cpu=use_cpu, **sgd, **sizes)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    if trainer.is_world_process_zero():
        after = trainer.model.named_parameters()
        out.write_text(json.dumps({name: (value.detach() - before[name]).flatten().tolist() for name, value in after}))


def train_sharded(job: dict) -> None:
    """`train` under FSDP2 or DeepSpeed on a CPU: accelerate shards on accelerators alone, so gloo passes for one."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    train({**job, "settings": {**job.get("settings", {}), "use_cpu": False}})


def answer(job: dict) -> None:
    """The teacher's answers to validation and the test set, into the job's folder."""
    from first_trl.evaluation import answer_sets
    from first_trl.recipe import load_recipe
    from first_trl.run import init_distributed
    from first_trl.stages.evaluate import measured_sets

    init_distributed()
    recipe = load_recipe(job["recipe"])
    answer_sets(recipe.cache.teacher, {}, measured_sets(recipe), Path(job["folder"]), recipe)


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](json.loads(sys.argv[2]))
