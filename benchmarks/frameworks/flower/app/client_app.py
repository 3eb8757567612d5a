from datasets import load_dataset
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from trl import SFTConfig, SFTTrainer

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    base, data, out = (str(context.run_config[key]) for key in ("base", "data", "out"))
    name = context.node_config["partition-id"]
    rows = load_dataset("json", data_files=f"{data}/site-{name}.jsonl", split="train")
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(
            output_dir=f"{out}/site-{name}",
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            seed=0,
            use_cpu=True,
        ),
        train_dataset=rows,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    set_peft_model_state_dict(trainer.model, message.content["arrays"].to_torch_state_dict())
    trainer.train()
    state = {name: tensor.cpu() for name, tensor in get_peft_model_state_dict(trainer.model).items()}
    metrics = MetricRecord({"num-examples": len(rows)})
    return Message(content=RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=message)
