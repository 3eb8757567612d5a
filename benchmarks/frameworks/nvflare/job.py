import sys

import torch
from model import Adapter
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.client.config import ExchangeFormat
from nvflare.recipe import SimEnv, set_per_site_config

base, data, out = sys.argv[1:]
sites = [f"site-{number}" for number in range(3)]
recipe = FedAvgRecipe(
    name="lora",
    model={"class_path": "model.Adapter", "args": {"base": base}},
    min_clients=len(sites),
    num_rounds=2,
    train_script="train.py",
    launch_external_process=True,
    server_expected_format=ExchangeFormat.PYTORCH,
    key_metric="",
)
set_per_site_config(recipe, {name: {"train_args": f"{base} {data}/{name}.jsonl {out}/{name}"} for name in sites})
recipe.add_client_file("model.py")
run = recipe.execute(SimEnv(clients=sites, num_threads=len(sites), workspace_root=f"{out}/workspace"))
print(run.get_status(), run.get_result())
model = Adapter(base)
saved = torch.load(f"{run.get_result()}/server/simulate_job/app_server/FL_global_model.pt", weights_only=True)
model.load_state_dict(saved["model"])
model.model.save_pretrained(out)
