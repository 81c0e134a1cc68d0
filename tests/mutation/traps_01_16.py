"""Wrong versions for traps 1 to 16: placement, masks, identity of the policy, estimators."""

from __future__ import annotations

from mutation.mutant import Mutation

MASKED, SHAPING, RETURNS = "tests/rl/test_masked.py", "tests/rl/test_shaping.py", "tests/rl/test_returns.py"
KL, LOSSES = "tests/rl/test_kl.py", "tests/rl/test_policy_objectives.py"
TYPES, CHAT, DRAW, SAMPLER = (
    "tests/test_types.py", "tests/data/test_chat.py", "tests/rollout/test_draw.py", "tests/rollout/test_sampler.py"
)  # fmt: skip
PLAYERS, LOGPROBS, SHARE = "tests/models/test_players.py", "tests/models/test_logprobs.py", "tests/models/test_share.py"
FAMILIES, IDENTITY = "tests/models/test_architectures.py", "tests/stages/test_scoring_identity.py"
SCORING, UPDATE, CHOICES = (
    "tests/stages/test_scoring.py", "tests/stages/test_update.py", "tests/stages/test_choices.py"
)  # fmt: skip
ESTIMATE, STEERING = "tests/stages/test_estimate.py", "tests/stages/test_steering.py"

MUTATIONS = [
    Mutation(
        1, "the score lands one token before the last", "rl/shaping.py",
        "score_B[:, None].expand(mask.shape), last_token(mask))",
        "score_B[:, None].expand(mask.shape), last_token(mask).roll(-1, dims=1))",
        (f"{SHAPING}::test_trap_1_the_score_lands_on_the_last_response_token",),
    ),
    Mutation(
        1, "the score lands one token after the last", "rl/shaping.py",
        "score_B[:, None].expand(mask.shape), last_token(mask))",
        "score_B[:, None].expand(mask.shape), last_token(mask).roll(1, dims=1))",
        (f"{SHAPING}::test_trap_1_the_score_lands_on_the_last_response_token",),
    ),
    Mutation(
        2, "a rollout's mask is where its ids are no pad", "types.py",
        "return length_mask(self.length_B, self.response_ids_BR.shape[1])",
        "return self.response_ids_BR != 0",
        (f"{TYPES}::test_trap_02_the_mask_of_a_rollout_comes_from_its_lengths",),
    ),
    Mutation(
        2, "a batch's lengths count the ids that are no pad", "types.py",
        "torch.tensor([len(row) for row in rows])",
        "(ids_BT != pad).sum(1)",
        (f"{PLAYERS}::test_trap_02_pad_and_eos_ids_inside_a_response_count_like_any_other",),
    ),
    Mutation(
        3, "positions count the padding on the left", "rollout/sampler.py",
        "mask_BS, at.clamp(min=0), prefilled)",
        "mask_BS, (at - at[:, :1]), prefilled)",
        (f"{SAMPLER}::test_trap_03_neighbours_and_order_change_nothing",),
    ),
    Mutation(
        3, "a mean is divided by the width of the batch", "rl/masked.py",
        "return masked_sum(x, mask) / mask.sum().clamp(min=1)",
        "return masked_sum(x, mask) / mask.numel()",
        (f"{MASKED}::test_trap_3_padding_and_order_change_nothing",),
    ),
    Mutation(
        4, "the variance counts padding", "rl/masked.py",
        "variance = masked_mean(centred.square(), mask)",
        "variance = centred.square().mean()",
        (f"{MASKED}::test_trap_4_whiten_by_hand_with_biased_variance",),
    ),
    Mutation(
        4, "the variance is the unbiased one", "rl/masked.py",
        "variance = masked_mean(centred.square(), mask)",
        "variance = masked_sum(centred.square(), mask) / (mask.sum() - 1)",
        (f"{MASKED}::test_trap_4_whiten_by_hand_with_biased_variance",),
    ),
    Mutation(
        5, "a product with the mask in the maths", "rl/masked.py",
        "return torch.where(mask, x, torch.zeros_like(x))",
        "return x * mask",
        (f"{MASKED}::test_trap_5_nan_under_the_mask_leaks_neither_forward_nor_backward",),
    ),
    Mutation(
        5, "a product with the mask where players are read", "models/players.py",
        "return torch.where(batch.mask_BR, picked, torch.zeros_like(picked))",
        "return picked * batch.mask_BR",
        (f"{PLAYERS}::test_trap_05_masked_entries_are_zero_even_where_the_source_is_nan",),
    ),
    Mutation(
        6, "an empty response becomes a rollout", "types.py",
        "int(self.length_B.min()) < 1 or",
        "int(self.length_B.min()) < 0 or",
        (f"{IDENTITY}::test_trap_06_an_empty_response_cannot_become_a_rollout",),
    ),
    Mutation(
        6, "an empty response gets a reward", "rl/shaping.py",
        "score_B[:, None].expand(mask.shape), last_token(mask))",
        "score_B[:, None].expand(mask.shape),\n"
        "        torch.arange(mask.shape[1])[None] == (mask.sum(1) - 1).clamp(min=0)[:, None])",
        (f"{SHAPING}::test_trap_6_an_empty_response_gets_no_reward",),
    ),
    Mutation(
        6, "after a response of one token the padding is read", "rl/returns.py",
        "return torch.where(last_token(mask), after_last[:, None],",
        "return torch.where(last_token(mask) & (mask.sum(1, keepdim=True) > 1), after_last[:, None],",
        (f"{RETURNS}::test_trap_6_one_token_and_empty_rows",),
    ),
    Mutation(
        6, "a prompt longer than the limit is kept", "data/chat.py",
        "return parts[first] if first < len(parts) else None",
        "return parts[min(first, len(parts) - 1)]",
        (f"{CHAT}::test_trap_06_fit_prompt_drops_the_oldest_exchanges",),
    ),
    Mutation(
        7, "scoring reads logits in another precision than training", "models/logprobs.py",
        "logits = of.logits(rows, 1.0, room)",
        "logits = of.logits(rows, 1.0, room).bfloat16().float()",
        (f"{LOGPROBS}::test_trap_07_statistics_and_training_give_the_same_bits",),
    ),
    Mutation(
        7, "training forgets the temperature of scoring", "stages/update.py",
        "micro.batch, temperature=config.sampling.temperature, entropy=",
        "micro.batch, temperature=1.0, entropy=",
        (f"{UPDATE}::test_trap_07_the_ratio_is_1_while_nothing_has_moved[full]",),
    ),
    Mutation(
        7, "dropout acts while layers are recomputed", "models/players.py",
        "            recompute_layers(model)\n",
        "            recompute_layers(model)\n            model.train()\n",
        (f"{FAMILIES}::test_trap_07_scalar_players_read_every_family_without_dropout[True-gpt2]",),
    ),
    Mutation(
        8, "old log-probs are those of temperature 1", "stages/scoring.py",
        "micro.batch, temperature=temperature, statistics=True, against=against, both=reference",
        "micro.batch, temperature=1.0, statistics=True, against=against, both=reference",
        (f"{SCORING}::test_trap_08_and_11_every_reading_is_that_of_plain_transformers",),
    ),
    Mutation(
        8, "sampled log-probs are those of temperature 1", "rollout/sampler.py",
        "(weight_VB.gather(0, token_B[None])[0] / total_B).log()",
        "(weight_VB.log() * distribution.temperature).log_softmax(0).gather(0, token_B[None])[0]",
        (f"{DRAW}::test_trap_08_frequencies_are_those_of_the_tempered_softmax",),
    ),
    Mutation(
        8, "top-p is drawn from but not reported", "rollout/sampler.py",
        "        logits_VB = _warp(logits_VB.T, distribution, history_BS).T\n",
        "        plain_VB = (logits_VB / distribution.temperature).log_softmax(0)\n"
        "        warped_VB = _warp(logits_VB.T, distribution, history_BS).T\n"
        "        drawn_B = draw(warped_VB, uniform_B, Distribution())[0]\n"
        "        return drawn_B, plain_VB.gather(0, drawn_B[None])[0]\n",
        (f"{DRAW}::test_trap_08_warped_distributions_are_those_of_generate",),
    ),
    Mutation(
        9, "responses are decoded and encoded again", "stages/scoring.py",
        "    responses = rollout.responses()\n    plan = []\n",
        "    def again(ids: list[int]) -> list[int]:  # of the same length, so that only the ids are wrong\n"
        "        encoded = players.tokenizer(players.tokenizer.decode(ids), add_special_tokens=False)['input_ids']\n"
        "        return [*encoded, *ids][: len(ids)]\n\n"
        "    responses = [again(ids) for ids in rollout.responses()]\n    plan = []\n",
        (f"{SCORING}::test_trap_09_the_ids_that_are_scored_and_trained_on_are_those_sampled",),
    ),
    Mutation(
        9, "a response that was cut gets an eos", "rollout/sampler.py",
        "        return Sampled(*self.responses[i], truncated=i not in self.complete)",
        "        ids, logprobs = self.responses[i]\n"
        "        return Sampled(ids if i in self.complete else [*ids, min(self.eos)], logprobs, i not in self.complete)",
        (f"{SAMPLER}::test_trap_09_eos_stops_and_is_kept_and_nothing_is_appended",),
    ),
    Mutation(
        9, "special tokens are added to the template's own", "data/chat.py",
        "ids += tokenizer(text, add_special_tokens=False, ",
        "ids += tokenizer(text, add_special_tokens=True, ",
        (f"{CHAT}::test_trap_09_a_tokenizer_that_adds_a_bos_does_not_double_it",),
    ),
    Mutation(
        10, "the reference shares the layers that are trained", "models/share.py",
        "    for i in range(count):\n        other.base.layers[i]",
        "    for i in range(len(first.base.layers)):\n        other.base.layers[i]",
        (f"{SHARE}::test_trap_10_the_reference_does_not_move_with_the_policy",),
    ),
    Mutation(
        10, "the reference is the policy", "stages/players.py",
        "    reference = Policy(load_causal_lm(frozen, compute), train_layers=layers, trained=False)\n",
        "    reference = Policy(load_causal_lm(frozen, compute), train_layers=layers, trained=False)\n"
        "    reference.model, reference.base = policy.model, policy.base\n",
        (f"{UPDATE}::test_trap_10_the_reference_and_the_reward_model_do_not_move[full]",),
    ),
    Mutation(
        11, "the value is read at its token, not before it", "stages/scoring.py",
        "at_responses(values_BT, micro.batch, before=True)",
        "at_responses(values_BT, micro.batch)",
        (f"{IDENTITY}::test_trap_01_and_11_scores_and_values_stand_at_their_tokens",),
    ),
    Mutation(
        11, "after the last token the padding's value is read", "rl/returns.py",
        "return torch.where(last_token(mask), after_last[:, None], torch.roll(x, -1, dims=1))",
        "return torch.roll(x, -1, dims=1)",
        (f"{RETURNS}::test_trap_11_a_value_beyond_the_end_is_never_read",),
    ),
    Mutation(
        11, "responses that ended are bootstrapped too", "stages/scoring.py",
        "torch.where(rollout.truncated_B & wanted, self.after_B, 0.0)",
        "self.after_B * wanted",
        (f"{IDENTITY}::test_trap_11_only_truncated_rows_have_the_value_of_the_cut_state",),
    ),
    Mutation(
        11, "a truncated response is scored and bootstrapped", "stages/estimate.py",
        '    if settings.truncated == "bootstrap":\n        score_B = torch.where(rollout.truncated_B, 0.0, score_B)\n',
        "",
        (f"{SCORING}::test_trap_11_15_16_the_order_of_shaping[bootstrap]",),
    ),
    Mutation(
        12, "k steps sum k + 1 differences", "rl/returns.py",
        "for _ in range(k - 1):",
        "for _ in range(k):",
        (f"{RETURNS}::test_trap_12_k_steps_are_delta_at_k_1_and_monte_carlo_from_k_n",),
    ),
    Mutation(
        12, "GAE discounts by lambda alone", "rl/returns.py",
        "return discounted_sums(delta, factor=gamma * gae_lambda)",
        "return discounted_sums(delta, factor=gae_lambda)",
        (f"{RETURNS}::test_trap_12_gae_at_lambda_0_is_delta_and_at_lambda_1_monte_carlo_minus_value",),
    ),
    Mutation(
        13, "returns are made of centred values", "rl/returns.py",
        "return zero_masked(advantages + values, mask)",
        "return zero_masked(advantages + values - values[mask].mean(), mask)",
        (f"{RETURNS}::test_trap_13_lambda_returns_are_advantages_plus_old_values",),
    ),
    Mutation(
        13, "returns are made of whitened advantages", "stages/estimate.py",
        "returns_BR = lambda_returns(by_gae, values, mask)",
        "returns_BR = lambda_returns((by_gae - by_gae[mask].mean()) / by_gae[mask].std(), values, mask)",
        (f"{SCORING}::test_trap_13_returns_are_advantages_plus_the_unnormalised_old_values",),
    ),
    Mutation(
        14, "k3 estimates the KL of the other direction", "rl/kl.py",
        "return torch.expm1(-difference) + difference",
        "return torch.expm1(difference) - difference",
        (f"{KL}::test_trap_14_k1_and_k3_agree_with_the_full_vocabulary_in_expectation",),
    ),
    Mutation(
        14, "k3 loses its digits near 0 and turns negative", "rl/kl.py",
        "return torch.expm1(-difference) + difference",
        "return torch.exp(-difference) - 1 + difference",
        (f"{KL}::test_trap_14_k3_is_never_negative_in_float32",),
    ),
    Mutation(
        14, "the exact KL is that of the other direction", "rl/kl.py",
        "return (log_p.exp() * difference).sum(dim=-1)",
        "return -(log_q.exp() * difference).sum(dim=-1)",
        (f"{LOSSES}::test_trap_14_the_penalty_without_an_exact_kl_has_the_value_and_gradient_of_kl_old_new",),
    ),
    Mutation(
        14, "the loss that says k2 has k3's gradient", "rl/policy_objectives.py",
        'estimators = {"k1": k1, "k2": k2, "k3": k3}',
        'estimators = {"k1": k1, "k2": k3, "k3": k3}',
        (f"{LOSSES}::test_trap_14_kl_loss_descends_what_its_docstring_says",),
    ),
    Mutation(
        15, "the KL in the reward carries a gradient", "rl/shaping.py",
        "kl_coefficient * kl.detach()",
        "kl_coefficient * kl",
        (f"{SHAPING}::test_trap_15_the_kl_in_the_reward_is_detached",),
    ),
    Mutation(
        15, "the KL coefficient moves once a minibatch", "stages/ppo_setup.py",
        '        if config.kl.target is not None and not pretraining and math.isfinite(row["kl_per_sequence"]):\n'
        "            self.steering.kl = adaptive_coefficient(",
        "        moves = config.rollout_batch // config.minibatch\n"
        "        for _ in range(0 if config.kl.target is None or pretraining else moves):\n"
        "            self.steering.kl = adaptive_coefficient(",
        (f"{STEERING}::test_trap_15_the_kl_coefficient_follows_its_target_once_an_iteration",),
    ),
    Mutation(
        15, "the reward does not take the coefficient that was steered", "stages/ppo.py",
        "experience, rewards_BR = estimate(scored, job.seen, config, kl_coefficient=job.steering.kl)",
        "experience, rewards_BR = estimate(scored, job.seen, config)",
        (f"{STEERING}::test_trap_15_the_kl_coefficient_follows_its_target_once_an_iteration",),
    ),
    Mutation(
        15, "a KL in the loss does not take the coefficient that was steered", "stages/update.py",
        "in_loss = steering.kl if",
        "in_loss = (config.kl.coefficient or 0.0) if",
        (f"{STEERING}::test_trap_15_the_update_takes_the_coefficients_that_were_steered[KL in the loss]",),
    ),
    Mutation(
        15, "the penalty is not the one that was steered", "stages/update.py",
        "penalty=steering.penalty",
        "penalty=config.objective.penalty",
        (f"{STEERING}::test_trap_15_the_update_takes_the_coefficients_that_were_steered[penalty]",),
    ),
    Mutation(
        16, "the history leaves the current batch out", "stages/estimate.py",
        "return History(history.scores.update(scores),",
        "return History(history.scores,",
        (f"{SCORING}::test_trap_16_the_history_includes_every_batch_up_to_the_current_one",),
    ),
    Mutation(
        16, "rolling returns are those of this batch alone", "stages/estimate.py",
        "    returns = history.returns\n",
        "    returns = Moments()\n",
        (f"{ESTIMATE}::test_trap_16_reward_scaling_remembers_earlier_batches",),
    ),
    Mutation(
        16, "a source's history is this batch alone", "stages/estimate.py",
        "update_by_source(history.by_source, scores, sources)",
        "update_by_source({}, scores, sources)",
        (f"{ESTIMATE}::test_trap_16_sources_and_rolling_returns_are_measured_over_all_batches",),
    ),
    Mutation(
        16, "the history's std is the unbiased one", "rl/shaping.py",
        "return math.sqrt(self.m2 / self.count) if self.count else 0.0",
        "return math.sqrt(self.m2 / max(self.count - 1, 1))",
        (f"{SHAPING}::test_trap_16_moments_by_hand",),
    ),
    Mutation(
        16, "scores are divided by log(std + 1e-5)", "rl/shaping.py",
        "normal_B = (score_B - moments.mean) / moments.std",
        "normal_B = (score_B - moments.mean) / math.log(moments.std + 1e-5)",
        (f"{SHAPING}::test_trap_16_signs_never_flip_and_nothing_blows_up",),
    ),
    Mutation(
        16, "scores are clipped before they are normalised", "rl/shaping.py",
        "    normal_B = (score_B - moments.mean) / moments.std\n"
        "    return normal_B if clip is None else normal_B.clamp(-clip, clip)\n",
        "    score_B = score_B if clip is None else score_B.clamp(-clip, clip)\n"
        "    return (score_B - moments.mean) / moments.std\n",
        (f"{SHAPING}::test_trap_16_normalise_and_clip_by_hand",),
    ),
    Mutation(
        16, "scores are clipped after the penalties", "stages/estimate.py",
        "score_B = score_B + missing_eos_penalty(rollout.truncated_B, penalty=settings.missing_eos_penalty)",
        "score_B = score_B + missing_eos_penalty(rollout.truncated_B, penalty=settings.missing_eos_penalty)\n"
        "        score_B = score_B if settings.clip is None else score_B.clamp(-settings.clip, settings.clip)",
        (f"{SCORING}::test_trap_11_15_16_the_order_of_shaping[score]",),
    ),
    Mutation(
        16, "advantages are whitened a microbatch at a time", "stages/update.py",
        "advantages = to_device(advantages_BR[rows, :width], device)",
        "advantages = to_device(_normalised(part.take(rows), config)[:, :width], device)",
        (f"{UPDATE}::test_trap_16_and_19_the_size_of_microbatches_changes_nothing[True]",),
    ),
]  # fmt: skip
