"""Wrong versions for traps 17 to 31: losses, optimisation, metrics, state."""

from __future__ import annotations

from mutation.mutant import Mutation

OBJECTIVES, OPTIMISER, CHECKPOINT = (
    "tests/rl/test_objectives.py", "tests/engine/test_optimiser.py", "tests/engine/test_checkpoint.py"
)  # fmt: skip
LOGPROBS, PLAYERS, COLLECT, SAMPLER = (
    "tests/models/test_logprobs.py", "tests/models/test_players.py", "tests/rollout/test_collect.py",
    "tests/rollout/test_sampler.py",
)  # fmt: skip
SPLIT, UPDATE, PPO, LOG = (
    "tests/data/test_split.py", "tests/stages/test_update.py", "tests/stages/test_ppo.py", "tests/stages/test_ppo_log.py"
)  # fmt: skip
REWARD, LABEL, RESUME, CHOICES = (
    "tests/stages/test_reward.py", "tests/stages/test_label.py", "tests/stages/test_resume.py",
    "tests/stages/test_choices.py",
)  # fmt: skip
STEERING = "tests/stages/test_steering.py"

MUTATIONS = [
    Mutation(
        17, "the value clip takes the smaller error", "rl/objectives.py",
        "error = torch.maximum(error, (near - returns).square())",
        "error = torch.minimum(error, (near - returns).square())",
        (f"{OBJECTIVES}::test_trap_17_value_clip_takes_the_max",),
    ),
    Mutation(
        17, "the policy clip takes the larger surrogate", "rl/objectives.py",
        "surrogate = torch.minimum(ratio * advantages,",
        "surrogate = torch.maximum(ratio * advantages,",
        (f"{OBJECTIVES}::test_trap_17_policy_clip_takes_the_min",),
    ),
    Mutation(
        18, "the bonus is the entropy of the eight likeliest tokens", "models/logprobs.py",
        "        entropy = -(p * log_p).sum(0)\n        return entropy, None",
        "        entropy = -(p * log_p).topk(8, dim=0).values.sum(0)\n        return entropy, None",
        (f"{LOGPROBS}::test_trap_18_entropy_is_exact_over_the_vocabulary",),
    ),
    Mutation(
        18, "the entropy logged is minus the sampled log-prob", "models/logprobs.py",
        "entropies[rows] = total.log() - exponentials.mul_(logits.sub_(largest)).sum(0) / total",
        "entropies[rows] = -logprobs[rows]",
        (f"{LOGPROBS}::test_trap_18_entropy_is_exact_over_the_vocabulary",),
    ),
    Mutation(
        18, "the entropy clip is a distance, which never acts", "rl/objectives.py",
        "entropy_B.clamp(max=clip)",
        "(entropy_B - clip).abs()",
        (f"{OBJECTIVES}::test_trap_18_the_entropy_clip_can_bind",),
    ),
    Mutation(
        19, "the policy loss is the mean of its microbatch", "rl/objectives.py",
        "return -masked_sum(surrogate, mask) / denom",
        "return -masked_mean(surrogate, mask)",
        (f"{OBJECTIVES}::test_trap_19_microbatches_add_up_to_the_minibatch[policy]",),
    ),
    Mutation(
        19, "the update averages the means of microbatches", "stages/update.py",
        "_backward_policy(players, piece, micro, advantages, config, steering, denom, found)",
        "own = float(micro.batch.mask_BR.sum()) * len(minibatch.micros)\n"
        "            _backward_policy(players, piece, micro, advantages, config, steering, own, found)",
        (f"{UPDATE}::test_trap_16_and_19_the_size_of_microbatches_changes_nothing[False]",),
    ),
    Mutation(
        20, "the ptx gradient has an optimiser step of its own", "stages/update.py",
        "                _backward_ptx(players, ptx, step, config, totals)\n",
        "                optimisers.policy.step(learning_rate(step, total, **rate(config.optim)))\n"
        "                _backward_ptx(players, ptx, step, config, totals)\n",
        (f"{UPDATE}::test_trap_20_as_many_adamw_steps_as_minibatches[0.3]",),
    ),
    Mutation(
        20, "the ptx gradient waits for the next step", "stages/update.py",
        "            if ptx and config.ptx_weight is not None and not pretraining:\n"
        "                _backward_ptx(players, ptx, step, config, totals)\n"
        '            with players.clock("train/step"):\n'
        "                norms = _step(players, optimisers, experience, plan[which], config, pretraining, step, total, totals)\n",
        '            with players.clock("train/step"):\n'
        "                norms = _step(players, optimisers, experience, plan[which], config, pretraining, step, total, totals)\n"
        "            if ptx and config.ptx_weight is not None and not pretraining:\n"
        "                _backward_ptx(players, ptx, step, config, totals)\n",
        (f"{UPDATE}::test_trap_20_one_step_per_minibatch_holds_the_policy_and_the_ptx_gradient",),
    ),
    Mutation(
        21, "the gradient norm is that of the largest parameter", "engine/optimiser.py",
        "norm = torch.nn.utils.get_total_norm(gradients)",
        "norm = max(g.norm() for g in gradients)",
        (f"{OPTIMISER}::test_trap_21_the_clip_is_global_over_all_parameters",),
    ),
    Mutation(
        20, "the gradient of a minibatch that was too far away stays for the next step", "stages/update.py",
        "                _forget(optimisers)\n",
        "",
        (f"{STEERING}::test_trap_20_a_distance_that_ends_an_iteration_leaves_no_gradient_behind",),
    ),
    Mutation(
        21, "each process clips by the norm of its own shards", "engine/optimiser.py",
        "norm = torch.nn.utils.get_total_norm(gradients)",
        "norm = torch.nn.utils.get_total_norm([g.to_local() if isinstance(g, DTensor) else g for g in gradients])",
        ("tests/parity/test_two_processes.py::test_trap_21_the_norm_that_is_clipped_is_that_of_all_shards[zero2]",),
    ),
    Mutation(
        21, "the critic's gradient is not clipped", "stages/ppo_setup.py",
        "critic = Optimiser(players.critic.trained_parameters(), **adamw(config.critic.optim))",
        'settings = {**adamw(config.critic.optim), "max_grad_norm": None}\n'
        "        critic = Optimiser(players.critic.trained_parameters(), **settings)",
        (f"{UPDATE}::test_trap_21_policy_and_critic_are_clipped_each_by_its_own_norm",),
    ),
    Mutation(
        21, "a norm that is not finite is stepped on", "engine/optimiser.py",
        "        if math.isfinite(norm):\n",
        "        if True:\n",
        (f"{OPTIMISER}::test_trap_21_a_gradient_that_is_not_finite_changes_nothing",),
    ),
    Mutation(
        21, "skipped steps are not counted", "stages/update.py",
        "            totals.skipped += steering.failures > 0\n",
        "",
        (f"{UPDATE}::test_trap_21_a_gradient_that_is_no_number_changes_nothing_and_is_counted",),
    ),
    Mutation(
        21, "skipped steps in a row never stop the run", "stages/nonfinite.py",
        "return 0 if all(map(math.isfinite, norms)) else failures + 1",
        "return 0 if all(map(math.isfinite, norms)) else 1",
        (f"{UPDATE}::test_trap_21_five_such_steps_in_a_row_end_the_run",),
    ),
    Mutation(
        22, "the policy waits for the whole of the critic's iterations", "stages/update.py",
        "    pretraining = steering.pretraining(iteration, config)\n",
        "    pretraining = iteration < config.critic.pretrain_iterations\n",
        (f"{STEERING}::test_trap_22_pre_training_ends_when_the_value_loss_has_converged",),
    ),
    Mutation(
        22, "the policy's schedule begins after iterations that did not take place", "stages/update.py",
        "start = config.critic.pretrain_iterations if steering.pretrained is None else steering.pretrained",
        "start = config.critic.pretrain_iterations",
        (f"{STEERING}::test_trap_22_the_policy_begins_where_the_critics_training_ended",),
    ),
    Mutation(
        22, "after the end the cosine rises again", "engine/optimiser.py",
        "progress = min((step - rising) / max(total - rising - 1, 1), 1.0)",
        "progress = (step - rising) / max(total - rising - 1, 1)",
        (f"{OPTIMISER}::test_trap_22_warm_up_then_cosine_by_hand",),
    ),
    Mutation(
        22, "the schedule starts over in every iteration", "stages/update.py",
        "            step = first + epoch * len(plan) + number\n",
        "            step = epoch * len(plan) + number\n",
        (f"{PPO}::test_trap_22_rates_and_steps_are_those_of_the_plan",),
    ),
    Mutation(
        22, "a resumed run begins its schedule again", "stages/sft.py",
        "budget, learning_rate(step, steps, **rate(config.optim)),",
        "budget, learning_rate(step - start, steps, **rate(config.optim)),",
        (f"{RESUME}::test_trap_22_and_29_stopped_by_a_signal_it_saves_says_how_to_go_on_and_does[sft-2]",),
    ),
    Mutation(
        23, "weight decay on everything", "engine/optimiser.py",
        "return tensor.ndim >= 2 and min(tensor.shape) > 1 and not embedding",
        "return True",
        (f"{OPTIMISER}::test_trap_23_decay_spares_biases_norms_embeddings_and_scalar_heads",),
    ),
    Mutation(
        23, "masters are rounded to the model's precision", "engine/optimiser.py",
        "            self._follow()\n        self.zero_grad()\n",
        "            self._follow()\n            for name, parameter in self.parameters.items():\n"
        "                self.masters[name].copy_(parameter)\n        self.zero_grad()\n",
        (f"{OPTIMISER}::test_trap_23_steps_below_the_precision_of_bfloat16_are_not_lost",),
    ),
    Mutation(
        24, "the score is read at the end of the batch", "models/players.py",
        "return x_BT.gather(1, batch.length_B[:, None] - 1)[:, 0]",
        "return x_BT[:, -1]",
        (f"{PLAYERS}::test_trap_01_and_24_the_score_stands_at_the_last_counted_token",),
    ),
    Mutation(
        24, "a pair's loss depends on its microbatch", "stages/reward.py",
        "weight_B=weight_B, margin=margin_B, denom=len(batch),",
        "weight_B=weight_B, margin=margin_B, denom=len(rows),",
        (f"{REWARD}::test_trap_19_and_24_no_pair_is_split_and_microbatches_change_nothing",),
    ),
    Mutation(
        24, "identical pairs are kept", "data/readers.py",
        "if pair.chosen.strip() == pair.rejected.strip():",
        "if pair.chosen is pair.rejected:",
        (f"{REWARD}::test_trap_24_identical_pairs_are_dropped_and_counted",),
    ),
    Mutation(
        24, "a tie becomes a pair", "stages/label.py",
        "if high - low > tie and worse:",
        "if high - low >= tie and worse:",
        (f"{LABEL}::test_trap_24_ties_and_empty_losers_make_no_pair",),
    ),
    Mutation(
        25, "perplexity at the sampling temperature", "stages/ppo_log.py",
        "math.exp(-float(masked_mean(statistics.plain_logprobs_BR, mask)))",
        "math.exp(-float(masked_mean(scored.old_logprobs_BR, mask)))",
        (f"{LOG}::test_trap_25_perplexity_is_the_exponential_of_the_mean_nll_at_temperature_1",),
    ),
    Mutation(
        25, "perplexity is a mean of exponentials", "stages/ppo_log.py",
        "math.exp(-float(masked_mean(statistics.plain_logprobs_BR, mask)))",
        "float(masked_mean(torch.exp(-statistics.plain_logprobs_BR), mask))",
        (f"{LOG}::test_trap_25_perplexity_is_the_exponential_of_the_mean_nll_at_temperature_1",),
    ),
    Mutation(
        26, "the KL per sequence is the one per token", "stages/ppo_log.py",
        '"kl_per_sequence": float(masked_sum(kl_BR, mask) / B)',
        '"kl_per_sequence": float(masked_mean(kl_BR, mask))',
        (f"{LOG}::test_trap_26_kl_per_token_and_per_sequence",),
    ),
    Mutation(
        26, "the KL per token counts padding", "stages/ppo_log.py",
        '"kl_per_token": float(masked_mean(kl_BR, mask))',
        '"kl_per_token": float(kl_BR.mean())',
        (f"{LOG}::test_trap_26_kl_per_token_and_per_sequence",),
    ),
    Mutation(
        27, "the length of finished responses counts cut ones", "stages/ppo_log.py",
        "float(length_B[finished].mean()) if",
        "float(length_B.mean()) if",
        (f"{LOG}::test_trap_27_length_with_and_without_truncated_responses",),
    ),
    Mutation(
        27, "as long as the limit is called truncated", "rollout/sampler.py",
        "truncated=i not in self.complete)",
        "truncated=len(self.responses[i][0]) == self.uniforms_BR.shape[1])",
        (f"{SAMPLER}::test_trap_27_an_eos_on_the_last_allowed_token_is_no_truncation",),
    ),
    Mutation(
        28, "clip fraction and KL are divided by all entries", "rl/objectives.py",
        '"tokens": mask.sum().to(ratio.dtype)',
        '"tokens": torch.ones_like(ratio).sum()',
        (f"{OBJECTIVES}::test_trap_28_ratio_statistics_by_hand",),
    ),
    Mutation(
        28, "the largest ratio may be that of padding", "rl/objectives.py",
        '"ratio_max": zero_masked(ratio, mask).max()',
        '"ratio_max": ratio.max()',
        (f"{OBJECTIVES}::test_trap_28_ratio_statistics_by_hand",),
    ),
    Mutation(
        28, "explained variance counts padding", "rl/objectives.py",
        "return masked_mean((centred - masked_mean(centred, mask)).square(), mask)",
        "return (centred - masked_mean(centred, mask)).square().mean()",
        (f"{OBJECTIVES}::test_trap_28_explained_variance_agrees_with_the_oracle_whatever_the_padding",),
    ),
    Mutation(
        29, "an iteration stops at the end of an epoch", "rollout/collect.py",
        "for position in range(start, start + per_iteration):",
        "for position in range(start, min(start + per_iteration, (start // count + 1) * count)):",
        (f"{COLLECT}::test_trap_29_every_prompt_comes_once_an_epoch",),
    ),
    Mutation(
        29, "random streams belong to rows of the batch", "engine/randomness.py",
        "rows = [uniforms(seed, iteration, p, s, size=width) for p, s in zip(prompts, samples, strict=True)]",
        "rows = [uniforms(seed, iteration, b, size=width) for b, _ in enumerate(zip(prompts, samples, strict=True))]",
        (f"{COLLECT}::test_trap_29_a_row_depends_on_its_prompt_sample_and_iteration_alone",),
    ),
    Mutation(
        29, "AdamW's moments start anew on resuming", "engine/optimiser.py",
        'if moments["exp_avg"] in tensors:',
        'if moments["exp_avg"] not in tensors and master.grad is not None:',
        (f"{OPTIMISER}::test_trap_29_a_restored_optimiser_goes_on_bit_for_bit",),
    ),
    Mutation(
        29, "the history of scores starts anew on resuming", "stages/ppo_setup.py",
        'job.seen, job.steering = History.from_dict(state["seen"]), Steering(**state["steering"])',
        'job.steering = Steering(**state["steering"])',
        (f"{CHOICES}::test_trap_29_a_run_without_a_critic_and_with_an_average_resumes_bit_for_bit",),
    ),
    Mutation(
        30, "old checkpoints go before the new one is written", "engine/checkpoint.py",
        "        first(lambda: _begin(temporary))\n",
        "        first(lambda: _begin(temporary))\n"
        "        for path in checkpoints(folder)[: len(checkpoints(folder)) - keep + 1]:\n"
        "            shutil.rmtree(path)\n",
        (f"{CHECKPOINT}::test_trap_30_a_save_that_fails_leaves_the_only_checkpoint",),
    ),
    Mutation(
        30, "a checkpoint counts as intact by the size of its files", "engine/checkpoint.py",
        "return None if digest == sha256 else f",
        "return None if digest != '' else f",
        (f"{CHECKPOINT}::test_trap_30_a_flipped_byte_anywhere_is_found_and_the_one_before_used",),
    ),
    Mutation(
        31, "rows are split, not prompts", "data/split.py",
        "return [row for row in rows if row.key not in held], [row for row in rows if row.key in held]",
        "part = round(len(rows) * len(held) / len(hashes))\n    return list(rows[part:]), list(rows[:part])",
        (f"{SPLIT}::test_trap_31_sides_share_no_key_lose_no_row_and_keep_the_order",),
    ),
    Mutation(
        31, "which prompts are held out depends on the order", "data/split.py",
        "            keys.sort(key=lambda key: hashes[key])\n",
        "            keys.sort(key=lambda key: 0)\n",
        (f"{SPLIT}::test_trap_31_a_prompt_keeps_its_side_whatever_the_order",),
    ),
    Mutation(
        31, "prompts of a held-out file are learnt", "stages/reward_data.py",
        "learn = [pair for pair in pairs if pair.key not in keys]",
        "learn = list(pairs) if keys else []",
        (f"{REWARD}::test_trap_31_no_prompt_is_both_learnt_and_held_out[True]",),
    ),
]  # fmt: skip
