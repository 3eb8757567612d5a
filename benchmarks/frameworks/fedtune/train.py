"""The script of trl/ as a site of a federation. python train.py BASE ROWS.jsonl OUT, beside site.toml."""

import sys

from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import fedtune

base, rows, out = sys.argv[1:]
trainer = SFTTrainer(
    model=base,
    args=SFTConfig(
        output_dir=out, max_steps=4, per_device_train_batch_size=4, learning_rate=1e-3, seed=0, use_cpu=True
    ),
    train_dataset=load_dataset("json", data_files=rows, split="train"),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
)
fedtune.patch(trainer, site="site.toml")
trainer.train()
trainer.save_model(out)
