"""The keys of FederatedScope-LLM and what each is here: the table that `fedtune import-fs` converts by.

Names and defaults after arXiv 2309.00363 and github.com/alibaba/FederatedScope, branches llm and master.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class FsKey:
    """What one key of FederatedScope is in a recipe."""

    ours: tuple[str, ...]
    """Keys of a recipe that it may set; none: it has no counterpart."""
    note: str = ""
    """How values differ; of a key without a counterpart, why it has none."""


def same(*ours: str, note: str = "") -> FsKey:
    return FsKey(ours, note)


def none(why: str) -> FsKey:
    return FsKey((), why)


RUN: Mapping[str, FsKey] = {
    "backend": none("torch is the only one"),
    "use_gpu": same("model.device"),
    "device": same("model.device", note="the number of the GPU; -1 is auto"),
    "seed": same("seed"),
    "expname": same("name"),
    "expname_tag": same("name", note="after a dash"),
    "outdir": none("a run is written to runs/NAME, or to --out DIR"),
    "cfg_file": none("the recipe is that file"),
    "verbose": none("--quiet leaves out progress"),
    "print_decimal_digits": none("numbers are printed as their size asks; --json has all digits"),
    "federate.client_num": same("data.split.clients"),
    "federate.sample_client_num": same("rounds.cohort", note="-1 is all"),
    "federate.sample_client_rate": same("rounds.cohort", note="of client_num, rounded down, as a number"),
    "federate.unseen_clients_rate": none("name the clients that take part in data.split.only"),
    "federate.total_round_num": same("rounds.count"),
    "federate.mode": none("fedtune simulate runs all clients here; fedtune serve and join run the same recipe apart"),
    "federate.method": same(
        "method.name",
        "personal.kind",
        "data.split.kind",
        "data.split.clients",
        note="FedAvg is fedit, global one client with all rows, Ditto, pFedMe, FedRep and FedBN tables [personal]",
    ),
    "federate.freeze_A": same("method.name", note="true is ffa"),
    "federate.ignore_weight": same("method.weights", note="true is uniform"),
    "federate.data_weighted_aggr": same("method.weights", note="true is examples"),
    "federate.share_local_model": none("one base is always shared by all clients of a process"),
    "federate.online_aggr": none("updates are always added as they come"),
    "federate.use_diff": none("the loss on held-out rows is always measured before and after training"),
    "federate.make_global_eval": none("the global test set is scored, and each client's held-out rows"),
    "federate.merge_test_data": none("the global test set is one; see evaluate.examples"),
    "federate.merge_val_data": none("the global test set is one; see evaluate.examples"),
    "federate.use_ss": none("there are no secure sums yet"),
    "federate.restore_from": none("a pickled checkpoint is not read; adapter.start continues a PEFT adapter or a run"),
    "federate.save_to": none("the adapter is written after every round, in PEFT's format"),
    "federate.save_freq": none("the adapter is written after every round"),
    "federate.save_client_model": none("updates are in the run's blobs; personal models stay with their clients"),
    "federate.join_in_info": none("what a client says of itself is fixed; see the site file"),
    "federate.sampler": none("clients are drawn uniformly; without replacement, from the seed"),
    "federate.resource_info_file": none("see [fleet] and [[device]] for simulated devices"),
    "federate.process_num": same("engine.name", "engine.workers", note="above 1 the engine processes"),
    "federate.master_addr": none("the engine's processes share no network"),
    "federate.master_port": none("the engine's processes share no network"),
    "federate.atc_vanilla": none("not a feature of its language models"),
    "federate.atc_load_from": none("not a feature of its language models"),
}
DATA: Mapping[str, FsKey] = {
    "data.type": same(
        "data.preset",
        "data.source",
        "data.template",
        note="NAME@llm; a data set with a name, or a file below data.root",
    ),
    "data.root": same("data.source", note="folder of a file; named data sets come from the hub or --data FILE"),
    "data.splitter": same("data.split.kind", "data.split.by", note="lda is dirichlet"),
    "data.splitter_args.alpha": same("data.split.alpha"),
    "data.splitter_args.min_size": same("data.split.min_examples"),
    "data.splits": same("data.held_out", note="the shares behind the first one together, of each client's own rows"),
    "data.consistent_label_distribution": none(
        "each client's held-out rows are drawn from its own, so its mix is kept"
    ),
    "data.subsample": none("set data.limit to a number of rows"),
    "data.server_holds_all": none('federate.method = "global" is one client with all rows'),
    "data.save_data": none("the partition is always written, to partition.jsonl"),
    "data.batch_size": same("client.batch", note="the old name of dataloader.batch_size"),
    "dataloader.batch_size": same("client.batch"),
    "data.shuffle": none("training rows are always shuffled, from the seed"),
    "dataloader.shuffle": none("training rows are always shuffled, from the seed"),
    "data.drop_last": none("the last batch of a pass is filled from the next pass"),
    "dataloader.drop_last": none("the last batch of a pass is filled from the next pass"),
    "dataloader.num_workers": none("rows are tokenized once, before the run"),
    "data.num_workers": none("rows are tokenized once, before the run"),
    "dataloader.pin_memory": none("rows are small and stay in main memory"),
    "dataloader.type": none("one loader for language models"),
    "data.loader": none("one loader for language models"),
    "llm.tok_len": same("data.max_tokens"),
}
MODEL: Mapping[str, FsKey] = {
    "model.type": same("model.base", note="NAME@huggingface_llm"),
    "model.model_num_per_trainer": none("every client holds one base"),
    "model.dropout": none("of its graph models; that of an adapter is llm.adapter.args' lora_dropout"),
    "model.num_labels": none("classes are counted in the data"),
    "train.is_enable_half": same(
        "model.dtype", note="true is bfloat16 for the base alone: adapter and optimiser stay in float32"
    ),
    "llm.adapter.use": none("an adapter is always trained; without one, all weights would be, which is not offered"),
    "llm.adapter.mv_to_cpu": none("adapters that are not trained take no accelerator memory"),
    "llm.adapter.args.adapter_package": none("peft's formats; AdapterHub is left out"),
    "llm.adapter.args.adapter_method": same("adapter.kind", "adapter.send", note="p-tuning sends its encoder"),
    "llm.adapter.args.r": same("adapter.rank"),
    "llm.adapter.args.lora_alpha": same("adapter.alpha"),
    "llm.adapter.args.lora_dropout": same("client.dropout"),
    "llm.adapter.args.target_modules": same("adapter.targets", note="without it, peft's own choice for the family"),
    "llm.adapter.args.modules_to_save": same("adapter.modules_to_save"),
    "llm.adapter.args.use_rslora": same("adapter.rslora"),
    "llm.adapter.args.num_virtual_tokens": same("adapter.tokens"),
    "llm.adapter.args.encoder_hidden_size": same("adapter.hidden"),
    "llm.adapter.args.prompt_tuning_init_text": same("adapter.init_text"),
    "llm.adapter.args.bias": none("biases are never trained"),
    "llm.adapter.args.task_type": none("follows from model.task"),
    "llm.adapter.args.inference_mode": none("adapters are trained"),
    "llm.adapter.args.fan_in_fan_out": none("follows from the layer"),
    "llm.accelerator.use": none("model.device and model.processes"),
    "llm.chat.max_history_len": none("an option of the program that chats: fedtune chat"),
    "llm.chat.max_len": none("an option of the program that chats: fedtune chat"),
    "llm.offsite_tuning.use": same("model.base", "adapter.layers", note="the emulator is a base, which export writes"),
    "llm.offsite_tuning.strategy": none("fedtune export --form emulator --kind drop, prune or quantise"),
    "llm.offsite_tuning.kwargs.drop_ratio": same("adapter.layers", note="fedtune export --form emulator --drop"),
    "llm.offsite_tuning.emu_l": same("adapter.layers", note="fedtune export --form emulator --front"),
    "llm.offsite_tuning.emu_r": same(
        "adapter.layers", note="fedtune export --form emulator --back, counted from there"
    ),
    "llm.offsite_tuning.eval_type": none("fedtune export --plug-back prints both scores side by side"),
    "llm.offsite_tuning.save_full_model": none("fedtune export --plug-back writes an adapter of the true base"),
}
ALIGN: Mapping[str, FsKey] = {
    f"llm.offsite_tuning.emu_align.{name}": none(f"an option of fedtune export --form emulator: {option}")
    for name, option in {
        "use": "--distill",
        "initial_only": "--distill, once before the run",
        "data.root": "--distill FILE",
        "data.type": "--distill FILE",
        "data.splits": "--distill FILE, of which all rows are read",
        "train.local_update_steps": "its steps",
        "train.initial_update_rounds": "its steps",
        "train.batch_or_epoch": "its steps",
        "train.lm_loss_weight": "its weight of the text's loss",
        "train.kd_loss_weight": "its weight of the middle's output",
        "train.optimizer.type": "AdamW alone",
        "train.optimizer.lr": "its learning rate",
        "restore_from": "an emulator that is there is a base: name its folder in model.base",
        "save_to": "--out",
        "exit_after_align": "it only writes the emulator",
        "sim_loss": "mean square over the true one's size alone",
        "layerwise_distill": "the middle's last output alone",
        "kl_divergence": "no divergence of logits",
        "init_enable_ground_truth": "its weight of the text's loss",
        "train.enable_ground_truth": "its weight of the text's loss",
    }.items()
}
TRAINING: Mapping[str, FsKey] = {
    "train.local_update_steps": same("client.steps", "client.epochs", note="batches over grad.grad_accum_count"),
    "train.batch_or_epoch": same("client.steps", "client.epochs"),
    "train.optimizer.type": same("client.optimizer", note="SGD unless it is said; Adam is adamw"),
    "train.optimizer.lr": same("client.learning_rate"),
    "train.optimizer.weight_decay": same("client.weight_decay"),
    "train.optimizer.momentum": same("client.momentum"),
    "train.optimizer.betas": none("0.9 and 0.999"),
    "train.scheduler.type": none(
        "client.schedule falls within a round, rounds.schedule over the run; constant is kept"
    ),
    "train.scheduler.warmup_ratio": none("client.warmup is of one round, rounds.warmup of the run"),
    "train.data_para_dids": none("model.processes divides a client's steps; nn.DataParallel is not used"),
    "train.train_strategy": none("adapter.layers, or the planner's key top, trains some layers alone"),
    "grad.grad_clip": same("client.clip_norm", note="below 0 is none"),
    "grad.grad_accum_count": same("client.accumulation"),
    "criterion.type": none("cross-entropy over the answer's tokens is the loss"),
    "trainer.type": none("one trainer for language models; zeroth-order training is method = fedkseed"),
    "early_stop.patience": same("rounds.patience", note="0 is none; 5 unless it is said"),
    "early_stop.delta": none("any gain counts"),
    "early_stop.improve_indicator_mode": none("rounds are compared with the best one"),
    "early_stop.the_smaller_the_better": none("follows from rounds.metric"),
    "eval.freq": same("evaluate.every"),
    "eval.metrics": none("the loss always; evaluate.generate for Rouge-L, fedtune evaluate --tasks for benchmarks"),
    "eval.split": none("the global test set and each client's held-out rows"),
    "eval.report": none("all, mean, worst client and worst tenth"),
    "eval.best_res_update_round_wise_key": same("rounds.keep", "rounds.metric", note="a loss keeps the best round"),
    "eval.monitoring": none("spread and alignment of updates are in the report"),
    "eval.count_flops": none("fedtune plan says what a run takes"),
    "eval.save_data": none("examples are not written"),
    "fedopt.use": same("method.server_optimizer.name", "method.server_learning_rate"),
    "fedopt.optimizer.type": same("method.server_optimizer.name", note="SGD, with momentum fedavgm; Adam; Yogi"),
    "fedopt.optimizer.lr": same("method.server_learning_rate"),
    "fedopt.optimizer.momentum": same("method.server_optimizer.momentum"),
    "fedopt.annealing": none("rounds.schedule lets the clients' rate fall"),
    "fedopt.annealing_step_size": none("rounds.schedule lets the clients' rate fall"),
    "fedopt.annealing_gamma": none("rounds.schedule lets the clients' rate fall"),
    "fedprox.use": same("client.proximal"),
    "fedprox.mu": same("client.proximal"),
    "regularizer.type": none("fedprox.mu is client.proximal"),
    "regularizer.mu": none("fedprox.mu is client.proximal"),
    "fedswa.use": none("states of several rounds are not averaged; rounds.keep = best keeps one"),
    "fedswa.freq": none("states of several rounds are not averaged"),
    "fedswa.start_rnd": none("states of several rounds are not averaged"),
    "aggregator.robust_rule": same(
        "method.robust.name", "rounds.min_clients", note="krum is multikrum, normbounding clip; no bulyan"
    ),
    "aggregator.byzantine_node_num": same("method.robust.attackers", note="as a share of the round's clients"),
    "aggregator.BFT_args.normbounding_norm_bound": same("method.robust.bound"),
    "quantization.method": same("method.wire_dtype", note="uniform with 8 bits is int8; there it never reached LoRA"),
    "quantization.nbits": same("method.wire_dtype", note="8 is int8, 16 is bf16"),
}
PARTS: Mapping[str, FsKey] = {
    "personalization.local_param": same("personal.kind", "personal.keep", note="lora_B is *.b, others globs around it"),
    "personalization.regular_weight": same("personal.strength"),
    "personalization.lr": same("personal.rate", note="0 is the client's own"),
    "personalization.local_update_steps": same("personal.steps", note="-1 is the client's own"),
    "personalization.K": same("personal.steps", note="of pFedMe"),
    "personalization.beta": none("the server takes the clients' mean; method.server_learning_rate moves less"),
    "personalization.share_non_trainable_para": none("the base is the same everywhere and never travels"),
    "personalization.lr_feature": none("of FedRep; the client's own rate"),
    "personalization.lr_linear": same("personal.rate", note="of FedRep"),
    "personalization.epoch_feature": none("of FedRep; the client's own length"),
    "personalization.epoch_linear": none("of FedRep; personal.steps counts steps"),
    "personalization.weight_decay": none("of FedRep; the client's own"),
    "finetune.before_eval": same("personal.kind"),
    "finetune.local_update_steps": same("personal.steps"),
    "finetune.batch_or_epoch": none("personal.steps counts steps"),
    "finetune.optimizer.lr": same("personal.rate"),
    "finetune.optimizer.type": none("the client's own"),
    "finetune.freeze_param": none("the adapter alone is trained"),
    "asyn.use": same("asynchronous.buffer", "asynchronous.trigger", "fleet.name"),
    "asyn.min_received_num": same("asynchronous.buffer"),
    "asyn.min_received_rate": same("asynchronous.buffer", note="of the round's clients, rounded down"),
    "asyn.aggregator": same("asynchronous.trigger", note="goal_achieved is goal, time_up time"),
    "asyn.time_budget": same("asynchronous.budget_s"),
    "asyn.timeout": same("rounds.deadline_s", note="over a network"),
    "asyn.staleness_toleration": same("asynchronous.max_staleness"),
    "asyn.staleness_discount_factor": same("asynchronous.staleness_exponent"),
    "asyn.broadcast_manner": same("asynchronous.send"),
    "asyn.overselection": none("set rounds.over_select to how many times as many clients are asked"),
    "hpo.scheduler": same("search.kind", note="rs is random; with the space that hpo.ss names, where its file is here"),
    "hpo.ss": same("search.space", note="rates, decays, steps, batches and the proximal pull by their names here"),
    "hpo.init_cand_num": same("search.trials"),
    "hpo.metric": none("search.score is the clients' held-out rows; the test set is refused"),
    "hpo.larger_better": none("follows from search.metric"),
    "hpo.log_scale": none("search.space has log for each range"),
    "hpo.working_folder": none("fedtune search --out"),
    "hpo.num_workers": none("trials run one after the other"),
    "hpo.plot_interval": none("fedtune search draws its picture at the end"),
    "hpo.trial_index": none("trials are numbered by the search"),
    "hpo.sha.elim_rate": same("search.reduction"),
    "hpo.sha.elim_round_num": none("follows from search.first_rung, search.reduction and rounds.count"),
    "hpo.sha.iter": none("follows from search.first_rung, search.reduction and rounds.count"),
    "hpo.sha.budgets": same("search.first_rung", note="the first of them"),
    "hpo.pbt.max_stage": same("search.interval", note="rounds.count over it"),
    "hpo.pbt.perf_threshold": none("the worst quarter copies a better trial"),
    "hpo.fedex.use": none("write planner = expgrad with lists of values, such as learning_rates"),
    "hpo.fedex.ss": none("the lists of planner expgrad, such as learning_rates, steps and dropouts"),
    "hpo.fedex.flatten_ss": none("all combinations of the lists are the arms"),
    "hpo.fedex.eta0": none("planner.step_size"),
    "hpo.fedex.sched": none("planner.step_size: adaptive, aggressive, auto and constant"),
    "hpo.fedex.cutoff": none("planner.cutoff"),
    "hpo.fedex.gamma": none("planner.discount"),
    "hpo.fedex.num_arms": none("all combinations of the lists are the arms"),
    "hpo.fedex.diff": none("planner.score = change or loss"),
    "hpo.fedex.psn": none("arms do not depend on the client"),
}
ARGUMENTS: Mapping[str, FsKey] = {
    key: none("no arguments")
    for key in ("llm.adapter.args", "data.splitter_args", "data.args", "llm.offsite_tuning.kwargs")
}
"""Lists of one table, where they are empty."""
KEYS: Mapping[str, FsKey] = {**ARGUMENTS, **RUN, **DATA, **MODEL, **ALIGN, **TRAINING, **PARTS}
"""Every key that is known one by one."""

GROUPS: Mapping[str, str] = {
    "distribute.": "addresses and certificates are in server and site files; messages are encrypted and signed",
    "vertical.": "features that are divided among parties are left out",
    "feat_engr.": "features that are divided among parties are left out",
    "attack.": "attacks are left out; robust rules are method.robust",
    "nbafl.": "differential privacy is not offered yet",
    "sgdmf.": "differential privacy is not offered yet",
    "wandb.": 'report.trackers = ["wandb"] sends each round; its environment says where',
    "llm.deepspeed.": "model.processes divides a client's steps",
    "llm.offsite_tuning.llm_generated.": "clients' answers are never replaced",
    "llm.offsite_tuning.kwargs.": "fedtune export --form emulator --kind drop, prune or quantise",
    "llm.adapter.args.": "an argument of peft without an effect here",
    "train.optimizer.": "this argument of the optimiser has no key here",
    "train.scheduler.": "client.schedule falls within a round, rounds.schedule over the run",
    "finetune.": "personal tuning has kind, steps and rate",
    "fedopt.optimizer.": "this argument of the optimiser has no key here",
    "aggregator.BFT_args.": "method.robust has bound and attackers",
    "aggregator.": "groups of clients are not averaged apart",
    "trainer.": "sharpness-aware and entropy terms are left out",
    "fedsageplus.": "graphs are left out",
    "gcflplus.": "graphs are left out",
    "flitplus.": "graphs are left out",
    "hpo.": "see fedtune search",
    "eval.": "scores are fixed; fedtune evaluate --tasks has benchmarks",
    "model.": "an argument of other kinds of models; a language model's are in its config.json",
    "data.quadratic.": "generated data are left out",
    "data.splitter_args.": "the kinds of data.split have no such argument",
    "data.args.": "arguments of other data sets",
    "data.cSBM_phi": "graphs are left out",
    "data.transform": "images are left out",
    "data.target_transform": "images are left out",
    "data.pre_transform": "graphs are left out",
    "data.val_": "images are left out",
    "data.test_": "images are left out",
    "data.walk_length": "graphs are left out",
    "data.num_steps": "graphs are left out",
    "data.sizes": "graphs are left out",
    "dataloader.": "graphs and ratings are left out",
    "data.": "of its tasks that are no language models'",
    "check_completeness": "every recipe is checked before anything is trained",
    "llm.": "programs around the model have no key here",
}
"""Why keys that are named in `fs_names` have no counterpart, by how they begin: the first that fits. The table above
comes before it."""

SWITCHES = (
    "llm.adapter.",
    "llm.offsite_tuning.emu_align.",
    "llm.offsite_tuning.",
    "fedopt.",
    "fedprox.",
    "fedswa.",
    "asyn.",
    "hpo.fedex.",
)
"""Tables that have no effect unless their key `use` is true."""
