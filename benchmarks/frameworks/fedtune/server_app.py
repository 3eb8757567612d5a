from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from fedtune.flower import FLoRA

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    base, out = str(context.run_config["base"]), str(context.run_config["out"])
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    strategy = FLoRA(alpha=16, fraction_evaluate=0.0)
    strategy.start(grid=grid, initial_arrays=ArrayRecord(get_peft_model_state_dict(model)), num_rounds=2)
    strategy.save(out)
