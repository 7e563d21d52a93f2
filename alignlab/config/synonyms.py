"""What other programs call our keys: TRL, diffusers' training scripts, kohya's, ddpo-pytorch, flow_grpo and
Flow-Factory. Whoever types such a name is told ours, and in what it differs.
"""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Ours:
    """What stands here for another program's key."""

    keys: tuple[str, ...]
    """Ours, the one that is meant first; a group is written `reward=NAME`."""
    differs: str = ""
    """What is not the same, as the end of a sentence."""


_ROWS = {
    # how long, and in what portions
    "learning_rate lr_rate unet_lr transformer_lr": ("lr", ""),
    "num_epochs num_train_epochs max_epochs epochs n_epochs": (
        "steps",
        "an epoch samples, scores and updates once, and is no pass over a data set",
    ),
    "max_train_steps num_train_steps max_steps total_steps train_steps num_iterations": (
        "steps",
        "it counts epochs; each has algo.updates_per_epoch optimiser steps, where that key is",
    ),
    "batch_size train_batch_size sample_batch_size per_device_train_batch_size": (
        "micro_batch samples_per_step",
        "micro_batch is how many are computed at once, samples_per_step how many an epoch has in all",
    ),
    "per_device_eval_batch_size eval_batch_size": ("evaluation.batch", "the numbers do not depend on it"),
    "gradient_accumulation_steps train_gradient_accumulation_steps gradient_accumulation": (
        "samples_per_step micro_batch",
        "gradients are summed over samples_per_step / micro_batch portions by themselves",
    ),
    "sample_num_batches_per_epoch num_batches_per_epoch": (
        "samples_per_step",
        "it is the number of images, not of batches",
    ),
    "num_inner_epochs train_num_inner_epochs ppo_epochs": ("algo.inner_epochs", ""),
    "num_updates gradient_steps": ("algo.updates_per_epoch", ""),
    # the optimiser
    "lr_scheduler lr_scheduler_type scheduler_type": ("lr_schedule", "constant, linear or cosine"),
    "lr_warmup_steps warmup_steps num_warmup_steps": ("lr_warmup", "it counts epochs"),
    "max_gradient_norm clip_grad_norm grad_clip gradient_clip_val train_max_grad_norm": (
        "max_grad_norm",
        "",
    ),
    "adam_beta1 adam_beta2 train_adam_beta1 train_adam_beta2 betas": (
        "optimizer.betas",
        "both stand in one list: 'optimizer.betas=[0.9,0.999]'",
    ),
    "adam_weight_decay train_adam_weight_decay weight_decay": ("optimizer.weight_decay", ""),
    "adam_epsilon train_adam_epsilon": ("optimizer.eps", ""),
    "use_8bit_adam train_use_8bit_adam optimizer_type": ("optimizer=adamw8bit", ""),
    "use_ema ema_decay train_ema": ("ema", "it is the decay, 0.99 for example; 0 keeps no average"),
    # what is trained
    "rank lora_rank lora_r r network_dim lora_dim": ("policy.lora.rank", ""),
    "lora_alpha network_alpha": ("policy.lora.alpha", "the LoRA is scaled by alpha / rank"),
    "lora_target_modules target_modules": ("policy.lora.targets", ""),
    "use_lora train_use_lora peft": (
        "policy.full",
        "LoRA is the default; policy.full=true trains every weight",
    ),
    "gradient_checkpointing activation_checkpointing enable_gradient_checkpointing": (
        "policy.checkpointing",
        "",
    ),
    "mixed_precision dtype torch_dtype fp16 bf16 weight_dtype": ("precision", "fp32, bf16 or fp16"),
    "torch_compile": ("compile", ""),
    "fsdp deepspeed zero_stage": ("policy.shard", "it splits full fine-tuning; docs/devices.md"),
    "allow_tf32": ("precision", "bf16 is what saves time on a GPU"),
    # the model
    "model_name_or_path pretrained_model_name_or_path pretrained_model pretrained_model_path "
    "model_name model_id model_path pretrained.model base_model checkpoint ckpt_path": (
        "model.path_or_id model=NAME",
        "the family is chosen with model=NAME",
    ),
    "revision pretrained_revision variant": (
        "model.variant",
        "a commit of the hub is +model.revision=COMMIT",
    ),
    "resolution image_size height width size": (
        "model.size",
        "with model=flux; other models draw at the size that they were trained at",
    ),
    # sampling
    "cfg cfg_scale guidance guidance_scale sample_guidance_scale": (
        "sampler.guidance_scale eval_sampler.guidance_scale",
        "the first is of training, the second of evaluations",
    ),
    "num_inference_steps num_steps sample_num_steps inference_steps sampling_steps num_timesteps": (
        "sampler.steps eval_sampler.steps",
        "the first is of training, the second of evaluations",
    ),
    "eval_num_steps": ("eval_sampler.steps", ""),
    "eta sample_eta noise_level": (
        "sampler.eta eval_sampler.eta",
        "0 is deterministic; DDPO needs more in training",
    ),
    "num_images_per_prompt num_image_per_prompt num_generations group_size": ("prompts.per_prompt", ""),
    "num_validation_images": ("evaluation.images", ""),
    # algorithms
    "beta kl_beta kl_penalty kl_weight kl_ratio init_kl_coef": (
        "kl_coeff",
        "DPO and KTO have a beta of their own, algo.beta",
    ),
    "beta_dpo dpo_beta": ("algo.beta", ""),
    "clip_range train_clip_range cliprange eps_clip": (
        "algo.clip",
        "it bounds the logarithm of the ratio",
    ),
    "adv_clip_max train_adv_clip_max adv_clip": ("algo.advantage_clip", ""),
    "timestep_fraction train_timestep_fraction": ("algo.timestep_fraction", ""),
    "per_prompt_stat_tracking": ("algo.statistics.per_prompt", ""),
    "per_prompt_stat_tracking_buffer_size": ("algo.statistics.buffer_size", ""),
    "per_prompt_stat_tracking_min_count": ("algo.statistics.min_count", ""),
    "truncated_backprop_timestep truncated_backprop truncation_steps": (
        "algo.k",
        "it counts the last steps that keep their gradient",
    ),
    "truncated_backprop_rand": ("algo.truncation", "per_rollout or per_step"),
    "snr_gamma": ("algo.min_snr", "of algo=sft"),
    "proportion_empty_prompts caption_dropout_rate": ("algo.prompt_dropout", ""),
    "loss_type": ("algo.loss", ""),
    "algorithm method trainer trainer_type objective": ("algo=NAME", ""),
    # rewards, prompts, data
    "reward_fn reward_function reward_model reward_model_path reward_funcs scorer": ("reward=NAME", ""),
    "reward_weights": ("reward.clip.weight", "each reward has a weight of its own, reward.NAME.weight"),
    "prompt_fn prompt_function prompt_dataset": ("prompts=NAME", ""),
    "prompt_file prompts_file prompt_path": ("prompts.file", "with prompts=file"),
    "validation_prompts validation_prompt eval_prompts": ("prompts.unseen evaluation.prompts", ""),
    "dataset_name train_data_dir data_dir data_path instance_data_dir dataset": (
        "algo.data prompts.dataset",
        "images to train on are algo.data (sft, dpo, kto), prompts are prompts.dataset (prompts=dataset)",
    ),
    "image_column": ("algo.image_column", "of algo=sft"),
    "caption_column": ("algo.caption_column", "of algo=sft"),
    # what is kept, and where
    "output output_path logdir log_dir logging_dir save_dir run_dir work_dir": ("output_dir", ""),
    "run_name experiment_name exp_name name wandb_run_name": (
        "tracking.name output_dir",
        "a run is called after its folder",
    ),
    "project project_name wandb_project tracker_project_name": ("tracking.project", ""),
    "entity wandb_entity": ("tracking.project", "the entity is WANDB_ENTITY in the environment"),
    "group_name wandb_group": ("tracking.group", ""),
    "wandb_tags": ("tracking.tags", ""),
    "save_steps save_freq checkpointing_steps save_every save_interval": (
        "checkpoint_every",
        "it counts epochs",
    ),
    "checkpoints_total_limit num_checkpoint_limit save_total_limit": ("keep", ""),
    "eval_steps eval_freq validation_steps validation_epochs eval_interval": (
        "eval_every",
        "it counts epochs",
    ),
    "resume_from_checkpoint resume_from resume_path": (
        "resume",
        "it is a run's folder, and resume=last the newest that is not finished",
    ),
    "wandb use_wandb report_to log_with logger tracker_name": ("tracker", "none, wandb or trackio"),
    "hub_model_id push_to_hub_model_id hub_repo_id": ("push_to_hub", "owner/name"),
    "random_seed manual_seed": ("seed", ""),
    "cuda gpu": ("device", "auto, cpu, cuda or mps"),
    "debug smoke_test dry_run": ("quick", ""),
}

SYNONYMS = {
    name: Ours(tuple(keys.split()), differs)
    for names, (keys, differs) in _ROWS.items()
    for name in names.split()
}
"""By the other program's name, in lower case and with underscores."""


def synonym(key: str, known: Collection[str]) -> str | None:
    """What to type in place of another program's key; None for a name that is none.

    Args:
        key: as it was typed, perhaps with that program's groups: train.learning_rate.
        known: the keys of the command, with dots.
    """
    plain = key.lstrip("+-~").lower().replace("-", "_")
    ours = (
        SYNONYMS.get(plain) or SYNONYMS.get(plain.replace(".", "_")) or SYNONYMS.get(plain.rpartition(".")[2])
    )
    if ours is None:
        return None
    groups = {one.partition(".")[0] for one in known}
    here = [k for k in ours.keys if (k.partition("=")[0] in groups if "=" in k else k in known)]
    if not here and not any(k.partition(".")[0] in groups for k in ours.keys):
        return None
    differs = f" ({ours.differs})" if ours.differs else ""
    if here:
        return f"here it is {' or '.join(here)}{differs}"
    return f"it would be {' or '.join(ours.keys)}, which the chosen options do not have{differs}"
