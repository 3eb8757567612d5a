"""A training script as a user has it, and the lines with which it takes part in a federation; see `test_patch`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import fedtune

base, site, out = sys.argv[1:4]
tokenizer = AutoTokenizer.from_pretrained(base)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
texts = [f"Once upon a time there was a number {number}." for number in range(12)]
trainer = Trainer(
    model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
    args=TrainingArguments(
        out, per_device_train_batch_size=2, learning_rate=5e-3, report_to="none", use_cpu=True, save_strategy="no"
    ),
    train_dataset=Dataset.from_dict(dict(tokenizer(texts))),
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    processing_class=tokenizer,
)
fedtune.patch(trainer, site=site)
trainer.train()
if trainer.is_world_process_zero():
    trainer.save_model(str(Path(out) / "final"))
