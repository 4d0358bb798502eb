"""One SGD step of rate 1 under whatever launched this; writes every trained weight's change. Used by test_trainer."""

import json
import sys
import tempfile

import torch


def main() -> None:
    from tests.test_trainer import cache_of, random_examples, trainer_for
    from tests.tiny import build_model, build_tokenizer

    job = json.loads(sys.argv[1])
    tokenizer = build_tokenizer()
    dataset = cache_of(build_model(len(tokenizer), seed=0), random_examples(8, len(tokenizer)))
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_for(
            build_model(len(tokenizer), seed=1),
            dataset,
            tokenizer,
            folder,
            per_device_train_batch_size=job["batch"],
            gradient_accumulation_steps=job["accumulation"],
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            max_steps=1,
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
        )
        before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        trainer.train()
    change = {
        name: (value.detach() - before[name]).flatten().tolist() for name, value in trainer.model.named_parameters()
    }
    if trainer.is_world_process_zero():
        with open(job["out"], "w") as file:
            json.dump(change, file)


if __name__ == "__main__":
    main()
