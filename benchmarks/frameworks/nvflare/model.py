import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM


class Adapter(torch.nn.Module):
    def __init__(self, base: str):
        super().__init__()
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        self.model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)

    def state_dict(self, *args, **kwargs):
        return get_peft_model_state_dict(self.model)

    def load_state_dict(self, state_dict, strict=True, assign=False):
        return set_peft_model_state_dict(self.model, state_dict)
