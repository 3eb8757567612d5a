"""Names of the keys of FederatedScope-LLM that are without a counterpart by whole areas: all others are slips.

Names after github.com/alibaba/FederatedScope, branches llm and master.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

NAMES: Mapping[str, str] = {
    "distribute.": (
        "use server_host server_port client_host client_port role data_file data_idx grpc_max_send_message_length "
        "grpc_max_receive_message_length grpc_enable_http_proxy grpc_compression"
    ),
    "vertical.": (
        "use mode dims encryption key_size algo feature_subsample_ratio protect_object protect_method protect_args "
        "eval_protection data_size_for_debug"
    ),
    "feat_engr.": (
        "type scenario num_bins selec_threshold selec_woe_binning secure.type secure.key_size secure.encrypt.type "
        "secure.dp"
    ),
    "attack.": (
        "attack_method target_label_ind attacker_id edge_path trigger_path setting freq insert_round mean std "
        "trigger_type label_type edge_num poison_ratio scale_poisoning scale_para pgd_poisoning pgd_lr pgd_eps "
        "self_opt self_lr self_epoch reconstruct_lr reconstruct_optim info_diff_type max_ite alpha_TV alpha_prop_loss "
        "classifier_PIA inject_round mia_simulate_in_round mia_is_simulate_in"
    ),
    "nbafl.": "use mu epsilon w_clip constant",
    "sgdmf.": "use R epsilon delta constant theta",
    "wandb.": "use name_user name_project online_track client_train_info",
    "llm.": "cache.model deepspeed.use deepspeed.ds_config accelerator.config",
    "llm.offsite_tuning.llm_generated.": "use ratio",
    "finetune.": "epoch_linear lr_linear weight_decay local_param simple_tuning",
    "aggregator.": "num_agg_groups num_agg_topk inside_weight outside_weight",
    "trainer.": (
        "disp_freq val_freq sam.adaptive sam.rho sam.eta local_entropy.gamma local_entropy.inc_factor "
        "local_entropy.eps local_entropy.alpha finetune.steps finetune.only_psn finetune.stepsize"
    ),
    "fedsageplus.": "num_pred gen_hidden hide_portion fedgen_epoch loc_epoch a b c",
    "gcflplus.": "EPS_1 EPS_2 seq_length standardize",
    "flitplus.": "tmpFed lambdavat factor_ema weightReg",
    "hpo.": (
        "init_strategy fedex.pi_lr table.eps table.num table.idx fts.use fts.ss fts.target_clients fts.diff "
        "fts.local_bo_max_iter fts.local_bo_epochs fts.fed_bo_max_iter fts.ls fts.var fts.g_var fts.v_kernel "
        "fts.obs_noise fts.gp_opt_schedule fts.allow_load_existing_info fts.M fts.M_target pfedhpo.use "
        "pfedhpo.discrete pfedhpo.train_fl pfedhpo.train_anchor pfedhpo.ss pfedhpo.target_fl_total_round"
    ),
    "model.": (
        "use_bias task hidden in_channels out_channels gamma num_of_trees max_tree_depth layer graph_pooling "
        "embed_size num_item num_user input_shape lambda_ stage model_type pretrain_tasks downstream_tasks max_length "
        "min_length no_repeat_ngram_size length_penalty num_beams label_smoothing n_best_size max_answer_len "
        "null_score_diff_threshold use_contrastive_loss contrast_topk contrast_temp contrast_num bos_token eos_token "
        "bos_token_id eos_token_id pad_token pad_token_id"
    ),
    "data.": (
        "quadratic.dim quadratic.min_curv quadratic.max_curv cSBM_phi transform target_transform pre_transform "
        "val_transform val_target_transform val_pre_transform test_transform test_target_transform test_pre_transform "
        "walk_length num_steps sizes file_path max_seq_len max_tgt_len max_query_len trunc_stride cache_dir "
        "num_contrast is_debug num_of_client_for_data hetero_data_name hetero_synth_batch_size "
        "hetero_synth_prim_weight hetero_synth_feat_dim debug"
    ),
    "dataloader.": "walk_length num_steps sizes theta",
    "": "check_completeness",
}
"""By the area that they are in."""
FREE: Sequence[str] = (
    "llm.adapter.args.",
    "llm.offsite_tuning.kwargs.",
    "llm.offsite_tuning.emu_align.train.optimizer.",
    "train.optimizer.",
    "train.scheduler.",
    "fedopt.optimizer.",
    "finetune.optimizer.",
    "finetune.scheduler.",
    "eval.",
    "aggregator.BFT_args.",
    "data.splitter_args.",
    "data.args.",
)
"""Tables in which FederatedScope takes any name, most of them for another library."""
OTHERS: frozenset[str] = frozenset(f"{area}{name}" for area, names in NAMES.items() for name in names.split())


def is_known(key: str) -> bool:
    """Return whether FederatedScope has such a key, or takes any of that table."""
    return key in OTHERS or key.startswith(tuple(FREE))
