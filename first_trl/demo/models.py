"""The demo's tokenizer and its two base models: tiny Llama-style models, pre-trained in place on unlabelled tickets.

They stand where downloaded base models stand in a real recipe. Pre-training is plain next-token prediction on texts
that are in no other split, each followed by the form of an answer with a team drawn at random: the models learn the
language of tickets and that one of four words ends them, and nothing about which team a ticket belongs to.
"""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from .task import STYLES, TEAMS, tickets

EOS, PAD = "<|endoftext|>", "<|pad|>"
PROMPT = "Ticket: {text}\nTeam:"  # the recipe's `task.prompt`
LAYERS = {"teacher": 3, "student": 2}
HIDDEN_SIZE = 128  # a multiple of 64, the block of NF4
STEPS, BATCH_SIZE, LEARNING_RATE = 300, 32, 3e-3


def write_models(folder: Path, seed: int, seen: set[str], steps: int = STEPS) -> None:
    """Pre-trains the models of `LAYERS` and saves each with the shared tokenizer to `folder`/name.

    `seen`: texts of the other splits, which pre-training leaves out. The same seed gives the same weights on the same
    machine and number of threads.
    """
    texts = unlabelled_texts(12_000, seed, seen)
    tokenizer = build_tokenizer(texts)
    documents = tokenizer(texts)["input_ids"]
    for name, layers in LAYERS.items():
        model = build_model(layers, tokenizer, seed)
        pretrain(model, documents, seed, steps)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def unlabelled_texts(count: int, seed: int, seen: set[str]) -> list[str]:
    """Documents for pre-training, of every style in equal shares; their tickets are not in `seen`, and are added."""
    rng = random.Random(f"pre-training {seed}")
    found = [ticket["text"] for style in STYLES for ticket in tickets(rng, count // len(STYLES), style, seen)]
    rng.shuffle(found)
    return [f"{PROMPT.format(text=text)} {rng.choice(TEAMS)}{EOS}" for text in found]


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: a word of the tickets becomes one token, and any other text can be written too."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=[EOS, PAD], initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def build_model(layers: int, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """An untrained model."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=layers,
        num_attention_heads=HIDDEN_SIZE // 32,
        num_key_value_heads=HIDDEN_SIZE // 32,
        max_position_embeddings=256,
        initializer_range=HIDDEN_SIZE**-0.5,  # so narrow a model learns slowly from the usual 0.02
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def pretrain(model: LlamaForCausalLM, documents: list[list[int]], seed: int, steps: int = STEPS) -> float:
    """Next-token training, in place; returns the loss of the last batch in nats per token."""
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.1)
    pad = model.config.pad_token_id
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(documents), (BATCH_SIZE,), generator=order).tolist()
        batch = [torch.tensor(documents[row]) for row in rows]
        input_ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=pad)
        # The padding is on the right and attention looks left, so keeping it out of the loss is enough.
        loss = model(input_ids=input_ids, labels=input_ids.masked_fill(input_ids == pad, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return loss.item()
