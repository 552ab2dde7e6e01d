"""What the gate runs of tests with many rows: one of each kind. Their other rows, and new ones, run in `make test-all`.

A row is a pattern of ids; no rows at all leave the whole test to `make test-all`.
"""

KINDS = ("backprop", "fa", "brsf", "kolen_pollack", "dfa_shared", "dkp", "drtp", "ldfa*", "grape", "ssa")
LAYERS = (
    "linear", "general, batch axis", "einsum, batch axis moved", "conv 2-D", "conv, grouped", "conv transpose, strided",
)  # fmt: skip
OWN_BY_MATRICES = (
    "matmul", "weights on the left", "einsum of heads", "gate", "conv, in groups", "experts, mapped", "remat", "cond",
    "scan in a scan",
)  # fmt: skip
OWN = (*OWN_BY_MATRICES, "masked by a choice", "experts by index", "one of a stack")

ROWS = {
    # rules that learn otherwise, each of whose laws the contract has, too
    "test_hoyers_penalty_on_the_papers_schedule_lowers_the_ranks_that_pruning_keeps": (),
    "test_devices_add_up_to_the_whole_batch_where_the_loss_is_told": (),
    "test_the_parallel_reading_is_its_closed_form": (),
    "test_the_arbitrary_signs_and_order_of_a_decomposition_change_nothing": ("convolution",),
    # forward gradients
    "test_gradients_are_those_of_a_numpy_reference": ("together",),
    "test_errors_have_no_bias_and_the_variance_of_the_closed_form": ("signs",),
    "test_the_mean_over_draws_is_the_true_gradient": (),
    "test_gradients_of_weights_have_no_bias_and_the_same_variance": (),
    "test_drtp_learns_from_targets_that_the_error_tells_or_refuses_it": ("mixed", "several labels"),
    "test_a_streamed_model_learns_the_same": (),
    "test_models_train_and_what_a_pass_writes_is_written_once": ("norms",),
    # models
    "test_a_model_learns_by_the_first_rules": ("MLP, batch norm, dropout", "VAE, own KL variable",),
    "test_a_model_learns_by_the_other_rules": (),
    "test_every_model_trains_by_every_kind_of_rule_through_nnx": (
        "brsf-scanned, rematerialised", "dkp-recurrent", "kolen_pollack-mlp",
    ),
    "test_the_arrays_of_the_state_are_the_whole_of_it": (
        *KINDS, "dldfa", "ssa_transported", "brsf, scanned", "tiles",
    ),
    "test_wrappers_outside_hold_the_pair": ("backprop-apply*", "kolen_pollack-MultiSteps",),
    "test_labels_of_the_model_before_attaching_are_those_of_the_model_after": ("fa", "kolen_pollack", "dkp"),
    "test_a_line_search_searches_along_the_parameters": ("fa-sgd", "fa-mask*",),
    "test_refine_changes_every_feedback_and_nothing_else": ("grape-mlp", "fdfa-rec*", "fdfa-conv*",),
    "test_training_and_pruning_with_an_nnx_optimizer": (),
    "test_a_layer_keeps_its_dtype_and_takes_any_batch": (),
    "test_at_full_rank_the_model_is_the_dense_one_and_so_is_what_comes_back": (),
    "test_layers_factored_before_obey_at_and_refuse_a_rank": ("parallel",),
    "test_attention_and_einsums_are_factored_and_come_back": (),
    "test_residual_networks_take_errors_by_the_shortcut_if_allowed": (),
    # layers
    "test_forward_is_bit_identical_and_w_as_feedback_is_backprop": (
        "linear", "linear, bfloat16", "einsum, batch axis moved", "conv, grouped", "conv transpose, strided",
        "conv transpose, transposed kernel",
    ),
    "test_a_thin_feedback_sends_back_what_its_product_does": (*LAYERS, "one output", "scan over a stack"),
    "test_low_rank_feedback_follows_the_weights_of_every_layer": ("conv 2-D", "conv transpose, strided",),
    "test_low_rank_feedback_follows_the_weights": ("matmul", "gate", "remat", "cond",),
    "test_kolen_pollack_brings_weights_and_feedback_together": (
        "cond", "einsum of heads", "experts by index", "gate", "weights on the left",
    ),
    # stacks
    "test_every_schedule_learns_what_the_stored_gradient_is": ("dldfa",),
    "test_state_in_any_type_of_variable": (),
    "test_memory_does_not_grow_with_depth": (),
    "test_stored_errors_take_no_more_memory_than_backpropagation": ("deep", "resnet"),
    "test_training_takes_the_same_steps": (),
    "test_batches_side_by_side_learn_from_their_own_errors": (),
    "test_keys_in_the_parameters_and_seeds_side_by_side": ("*stream",),
    "test_a_sharded_batch": ("*stream",),
    "test_what_a_block_closes_over_is_constant": ("*stream",),
    "test_every_schedule_learns_as_the_loop_does": ("dkp",),
    "test_any_block_in_a_loop_or_in_straight_code": (),
    "test_only_the_stream_keeps_no_activations": ("dense-*",),
    "test_the_fused_update_keeps_no_activations": ("dense",),
    "test_the_fused_update_is_the_unfused_one": ("adam",),
    "test_half_precision": ("*stream",),
    "test_every_rule_learns_what_it_learns_on_one_device": ("dkp",),
    "test_on_every_mesh_batch_statistics_are_those_of_the_whole_batch": ("4-2",),
    "test_in_single_precision_the_update_is_the_same_to_rounding": ("*stream",),
    "test_convolutions_in_straight_code": ("*stream",),
    "test_refine_estimates_the_same_jacobian": ("grape",),
    # rules
    "test_a_checkpointed_run_continues_bit_for_bit_and_is_traced_once": (
        "backprop", "brsf", "kolen_pollack", "dkp", "ldfa",
    ),
    "test_steps_with_a_sharded_optimizer_are_the_single_devices": (),
    "test_alignment_may_pull_the_feedback_instead_which_is_weight_transport_by_name": (),
    "test_gradients_and_signals_are_the_equations": (
        "fa-dense", "usf-*", "brsf-conv", "frsf-conv", "kolen_pollack-*", "dfa-*", "dfa_shared-conv", "dkp-*",
        "drtp-conv", "ldfa-*", "grape-conv", "fdfa-conv", "ssa-conv", "ssa_sequential-conv", "dldfa-conv",
    ),
    "test_rules_are_the_gradient_of_a_surrogate": ("fa", "kolen_pollack", "dfa", "dkp"),
    "test_direct_feedback_of_every_shape": ("dense", "image", "token_heads", "vector_to_sequence"),
    "test_shard_map_with_its_type_checks_sums_over_the_devices_by_itself": (
        "dkp", "brsf", "backprop", "dfa_shared", "drtp", "kolen_pollack",
    ),
    "test_shard_map_without_type_checks_averages_local_gradients": ("dkp", "brsf", "backprop", "dfa_shared", "drtp",),
    "test_between_calibrations_it_is_the_rule_and_they_come_on_time": ("kolen_pollack", "ldfa",),
    "test_it_is_a_step_of_backpropagation_that_leaves_the_feedback_alone": ("kolen_pollack", "dkp",),
    "test_an_optimizer_of_its_own_steps_while_the_rules_stands_still": ("grape",),
    "test_kolen_pollacks_difference_falls_at_every_step_whatever_goes_by_names": (
        "mask*", "labels by name", "global norm", "noise", "lion",
    ),
    "test_kolen_pollack_draws_weights_and_feedback_together_at_the_rate_of_the_decay": ("sgd", "adamw"),
    "test_the_mirror_estimates_the_weights_without_bias": ("dense", "conv_grouped"),
    "test_the_mirrored_feedback_tends_to_the_weights_if_decay_matches": ("None-*",),
    "test_the_angle_to_backpropagation_falls_from_ninety_degrees": (),
    "test_it_starts_as_feedback_alignment_through_p": ("dense", "heads",),
    "test_an_orthonormal_square_p_with_its_q_is_backpropagation": ("dense", "heads", "conv2d_strided"),
    "test_layer_wise_it_is_the_papers_equations": ("dense", "tokens", "conv1d_valid"),
    "test_direct_it_is_the_papers_equations": ("dense", "image", "token_heads"),
    "test_direct_at_full_rank_it_is_direct_feedback_alignment": ("dense", "tokens", "vector_to_sequence"),
    "test_a_step_is_the_gradient_of_the_cosines_with_that_estimate": (),
    "test_on_a_fixed_network_it_finds_the_jacobian": ("dense-rule0", "dense-rule1", "conv-rule2"),
    "test_one_pass_is_unbiased_for_every_layer_and_its_error_falls_as_the_root_of_the_samples": ("dense",),
    "test_a_layers_part_is_of_each_examples_own_jacobian": (),
    "test_the_noise_is_measured_without_bias": (),
    "test_blocks_learn_as_they_run_what_they_learn_stored": ("auglocal",),
    "test_no_activation_beyond_a_block_is_kept": ("local_classifier",),
    "test_in_a_network_it_is_the_closed_form": ("*-conv", "predsim-dense"),
    # factors
    "test_a_factored_convolution_is_the_dense_one": ("one dim*", "stride 2, odd", "explicit*", "1 x 1", "three dim*"),
    "test_the_factors_gradients_are_those_of_their_product": ("True-*", "False-shape0"),
    "test_optimizer_and_feedback_follow_the_surviving_columns": (),
    "test_a_dtypes_own_rounding_is_no_drift": (),
    "test_seeds_side_by_side_keep_one_rank": (),
    "test_drifted_layers_are_decomposed_anew_where_they_lose_columns": (),
    # experiments
    "test_errors_add_up_to_the_gradient_of_the_bias": ("mlp-fa",),
    "test_diagnostics_are_those_of_the_matrices_and_leave_the_training_alone": (),
    "test_gpipe_learns_by_backpropagation_and_ours_by_direct_feedback": (),
    "test_the_model_counts_the_bytes_that_the_programs_send": (),
    "test_a_linear_student_at_an_absurd_rate_is_told": (),
    "test_a_study_is_made_without_what_diverged_or_not_at_all": (),
    "test_muon_takes_hidden_kernels_and_adam_all_else": (),
    "test_attention_projects_all_heads_as_one_matrix": (),
    "test_stacked_layers_are_never_mixed": (),
    "test_resumed_run_has_the_bits_of_an_uninterrupted_one": ("training",),
    "test_both_shapes_of_the_loop_give_the_same_bits": (),
    "test_seeds_side_by_side_train_as_they_do_alone": ("True",),
    "test_calibrating_at_every_step_is_backpropagation": (),
    "test_the_pack_is_mnist": (),
    "test_the_example_of_an_experiment_writes_a_report": (),
    "test_forward_is_the_models_own_and_the_error_goes_through_the_feedback_alone": (
        "matmul", "einsum of heads", "conv", "gate", "experts, mapped", "experts by index", "scan over a stack",
        "cond", "transposed", "one of a stack", "masked by a choice", "normed by hand", "jit", "scaled", "masked",
        "cast", "remat*", "reshaped", "weights on the left",
    ),
    "test_every_rule_is_lawful_under_every_wrapper_or_refuses_it": (
        "partition by name-*-*", "lbfgs-dense-inside", "MultiSteps-*-*", "muon-dense-inside", "chain with clip*",
        "apply_if_finite-alike-*", "schedule_free-*", "lookahead-*", "line search-dense-*", "masks by *",
    ),
    "test_what_a_block_writes_or_returns_beside_its_output_has_its_gradient": (
        "*stream-an output", "*dispatch*-a penalty",
    ),
    "test_every_option_is_read_by_an_arm_of_the_run_or_listed_as_unread": (
        "grape*", "ldfa_rank*", "ldfa_v*", "ldfa_cost0", "ssa_a*", "ssa_networks0", "rank*", "ldfa_retina",
    ),
    "test_a_loss_may_be_wrapped_in_any_way": (
        "*-split, scan of checkpoint", "shard_map-loop", "donation-loop", "jacrev-loop",
    ),
    "test_error_goes_through_the_feedback_and_nothing_else": (
        "conv, depthwise", "conv 1-D, causal", "einsum", "general, two axes", "linear, no bias, extra axes",
        "conv transpose, circular", "conv, circular", "conv, strided",
    ),
    "test_without_at_the_finest_places_are_tapped_that_no_error_passes_by": (
        "MLP", "gated", "residual", "transformer",
    ),
    "test_after_100_strong_steps_every_weight_has_moved_and_fixed_feedback_has_not": (
        "backprop", "dfa", "frsf", "weight_mirror",
    ),
    "test_flaxs_layers_that_contract_by_themselves": ("weight norm", "masked*",),
    "test_a_model_may_run_its_blocks_in_any_way": (
        "lax.cond*", "split, scan*", "nnx.jit", "nnx.scan, broadcast", "nnx.remat", "split, jax*", "lax.map*",
        "loop", "nnx.clone", "jax.vmap*",
    ),
    "test_every_mesh_takes_the_same_step": (),
    "test_a_mask_tree_of_the_parameters_made_before_or_after_attaching_is_what_plain_flax_takes": (
        "kolen_pollack-before", "backprop-*",
    ),
    "test_what_batches_side_by_side_teach_is_the_sum_of_what_each_teaches": (
        "dldfa", "drtp", "dkp", "dfa_shared", "ldfa", "brsf", "fa", "backprop", "grape",
    ),
    "test_no_two_arrays_of_a_fresh_state_share_a_buffer_so_that_all_can_be_donated": (
        "ssa_low_rank", "ldfa_labels", "backprop", "brsf", "dfa_shared", "grape",
    ),
    "test_vmap_over_seeds_is_a_loop": ("backprop", "ldfa", "brsf", "kolen_pollack", "dfa",),
    "test_a_tile_estimates_the_mean_over_its_repeats_with_less_variance": (),
    "test_in_a_stack_every_layer_finds_its_own_jacobian": (),
    "test_training_moves_what_learns_by_its_own_rate_and_nothing_else": (
        "*False-ldfa", "*False-dldfa", "False-True-*",
    ),
    "test_drift_and_update_rank_are_what_the_steps_say": (),
    "test_without_its_reference_a_comparison_is_told_all_the_same": (),
    "test_the_first_gradient_of_a_rule_that_was_never_refined_warns_once": ("weight_mirror", "normative_ldfa",),
    "test_alignment_brings_the_sequential_pseudo_gradient_nearer_to_the_true_one": (),
    "test_every_model_takes_both_families": ("fa-*", "dfa-convnet", "dfa-lenet",),
    "test_the_variance_is_that_of_theory": ("*-random_signs--1",),
    "test_bfloat16_gradients_are_near_the_exact_ones": ("ldfa", "brsf", "dfa",),
    "test_counted_operations_are_those_of_the_theory": (),
    "test_recurrent_cells_are_covered": ("GRUCell",),
    "test_the_normative_factors_start_at_the_optimum_keep_it_and_find_it_from_anywhere": ("0.3-conv", "1.0-wide",),
    "test_a_linear_network_with_a_learned_p_of_the_teachers_rank_learns_what_backpropagation_does": (),
    "test_the_variance_of_scaled_perturbations_is_that_of_theory_and_least_at_the_best_scales": (),
    "test_pruning_a_drifted_layer_changes_neither_the_step_nor_averages": (),
    "test_data_parallel_gradients_and_signals_are_the_single_device_ones": ("True-*",),
    "test_imbalance_tells_what_the_network_breaks_from_what_the_optimizer_does": (),
    "test_the_control_of_an_aligned_start_has_its_norms_and_no_alignment": (),
    "test_no_scales_nearby_are_better": (),
    "test_adapters_add_nothing_at_first": (),
    "test_weight_decay_never_touches_the_lift": (),
    "test_a_sketch_keeps_the_effective_rank": (),
    "test_a_fixed_feedback_gets_stuck_below_the_teachers_rank_and_only_there": (),
    "test_a_restored_model_goes_on_bit_for_bit_and_is_not_traced_again": (),
    "test_ranks_of_extreme_matrices": (),
    "test_states_of_other_shapes_than_the_parameters_are_refused": ("lbfgs",),
    "test_of_a_block_that_returns_a_tree_what_is_read_is_tapped": ("*stored",),
    "test_nothing_that_a_forward_pass_writes_is_lost": ("jit-*",),
    "test_a_block_that_is_left_out_learns_nothing": ("*stream",),
    "test_the_last_layer_is_exact_and_the_others_are_not": ("parallel",),
    "test_the_compiler_shards_a_jitted_gradient": ("kp", "dfa",),
    "test_in_bfloat16_p_stays_wide_and_the_error_is_near": ("rule1",),
    "test_the_jacobian_at_an_activation_is_that_of_all_that_read_it": (),
    "test_arms_stand_beside_the_published_numbers_and_their_rules_fit": (
        "ldfa_rank_mlp-options0*", "ldfa_rank_mlp-options4*", "ldfa_vgg*",
    ),
    # laws of conservation
    "test_any_model_starts_aligned": ("conv*",),
    "test_drift_is_half_of_the_squared_steps_for_every_neuron": (
        "relu", "schedule", "tanh", "momentum", "weight_decay",
    ),
    "test_it_holds_for_every_channel_of_convolutions_pooled_and_flattened": ("relu", "momentum"),
    "test_it_holds_in_a_model_that_knows_nothing_of_it": (),
}  # fmt: skip
