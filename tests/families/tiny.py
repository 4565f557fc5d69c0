"""Tiny configs, one or more a family; every number is nobody's default, and no two dimensions are equal."""

LLAMA = dict(
  vocab_size=43, hidden_size=24, intermediate_size=37, num_hidden_layers=3, num_attention_heads=6,
  num_key_value_heads=2, head_dim=10, max_position_embeddings=64, rms_norm_eps=3e-4, initializer_range=0.07,
  attention_dropout=0.17, classifier_dropout=0.19, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
THETA = dict(rope_parameters=dict(rope_type="default", rope_theta=123.0))
GEMMA2 = dict(
  LLAMA, hidden_activation="gelu", query_pre_attn_scalar=7, sliding_window=5, final_logit_softcapping=1.7)  # fmt: skip
GEMMA3 = dict(GEMMA2, model_type="gemma3_text", sliding_window_pattern=2, final_logit_softcapping=None)

BERT = dict(
  vocab_size=43, hidden_size=24, intermediate_size=37, num_hidden_layers=3, num_attention_heads=4,
  max_position_embeddings=29, type_vocab_size=3, layer_norm_eps=3e-4, hidden_dropout_prob=0.23,
  attention_probs_dropout_prob=0.17, pad_token_id=0)  # fmt: skip

GPT2 = dict(
  model_type="gpt2", vocab_size=43, n_embd=24, n_layer=3, n_head=4, n_positions=34, n_inner=37, layer_norm_epsilon=3e-4,
  initializer_range=0.07, resid_pdrop=0.23, embd_pdrop=0.19, attn_pdrop=0.17, activation_function="gelu",
  pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip

OPT = dict(
  model_type="opt", vocab_size=43, hidden_size=24, ffn_dim=37, num_hidden_layers=3, num_attention_heads=4,
  max_position_embeddings=34, dropout=0.23, attention_dropout=0.17, init_std=0.07, activation_function="gelu",
  pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip

NEOX = dict(
  model_type="gpt_neox", vocab_size=43, hidden_size=30, intermediate_size=37, num_hidden_layers=3,
  num_attention_heads=3, max_position_embeddings=64, layer_norm_eps=3e-4, initializer_range=0.07,
  hidden_dropout=0.23, attention_dropout=0.17, classifier_dropout=0.19, hidden_act="gelu_fast", pad_token_id=0,
  bos_token_id=1, eos_token_id=2)  # fmt: skip

ROBERTA = {**BERT, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.07}

DISTILBERT = dict(
  model_type="distilbert", vocab_size=43, dim=24, hidden_dim=37, n_layers=3, n_heads=4, max_position_embeddings=29,
  dropout=0.23, attention_dropout=0.17, qa_dropout=0.13, seq_classif_dropout=0.19, activation="gelu_new",
  initializer_range=0.07, pad_token_id=0)  # fmt: skip

T5 = dict(
  vocab_size=43, d_model=14, d_kv=4, d_ff=37, num_layers=2, num_decoder_layers=1, num_heads=3,
  relative_attention_num_buckets=10, relative_attention_max_distance=19, layer_norm_epsilon=3e-4, dropout_rate=0.23,
  classifier_dropout=0.19, initializer_factor=0.7, pad_token_id=0, eos_token_id=1,
  decoder_start_token_id=2)  # fmt: skip

BART = dict(
  vocab_size=43, d_model=24, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=3,
  encoder_ffn_dim=37, decoder_ffn_dim=31, max_position_embeddings=29, activation_function="gelu_new", dropout=0.23,
  attention_dropout=0.17, activation_dropout=0.13, classifier_dropout=0.19, init_std=0.07, scale_embedding=True,
  bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2)  # fmt: skip
PEGASUS = dict(
  {k: v for k, v in BART.items() if k not in ("classifier_dropout", "bos_token_id")}, model_type="pegasus",
  pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, forced_eos_token_id=None)  # fmt: skip

MODERNBERT = dict(
  model_type="modernbert", vocab_size=43, hidden_size=24, intermediate_size=37, num_hidden_layers=4,
  num_attention_heads=4, max_position_embeddings=64, norm_eps=3e-4, local_attention=7, global_attn_every_n_layers=2,
  initializer_range=0.07, initializer_cutoff_factor=1.3, attention_dropout=0.23, embedding_dropout=0.19,
  mlp_dropout=0.17, classifier_dropout=0.13, classifier_activation="relu", pad_token_id=0, bos_token_id=1,
  eos_token_id=2,
  rope_parameters=dict(full_attention=dict(rope_type="linear", factor=1.7, rope_theta=123.0),
                       sliding_attention=dict(rope_type="default", rope_theta=77.0)))  # fmt: skip

DEBERTA = dict(
  BERT, model_type="deberta-v2", hidden_act="silu", type_vocab_size=0, initializer_range=0.07, relative_attention=True,
  position_buckets=6, max_relative_positions=19, norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type="p2c|c2p",
  position_biased_input=False, pooler_dropout=0.13, pooler_hidden_act="relu", cls_dropout=0.19)  # fmt: skip

CONFIGS = {
  "t5": dict(T5, model_type="t5", feed_forward_proj="gelu"),
  "mt5": dict(T5, model_type="mt5", feed_forward_proj="gated-silu"),
  "bart": dict(BART, model_type="bart"),
  "mbart": dict(BART, model_type="mbart", decoder_start_token_id=6),
  "pegasus": PEGASUS,
  "marian": dict(
    PEGASUS,
    model_type="marian",
    activation_function="swish",
    pad_token_id=42,
    eos_token_id=0,
    decoder_start_token_id=42,
    forced_eos_token_id=0,
  ),
  "bert": dict(BERT, model_type="bert", hidden_act="gelu_new"),
  "roberta": dict(ROBERTA, model_type="roberta", hidden_act="relu", type_vocab_size=1),
  "distilbert": DISTILBERT,
  "electra": dict(BERT, model_type="electra", embedding_size=14, hidden_act="relu"),
  "modernbert": MODERNBERT,
  "deberta": DEBERTA,
  "llama": dict(LLAMA, **THETA, model_type="llama"),
  "mistral": dict(LLAMA, **THETA, model_type="mistral", sliding_window=5, tie_word_embeddings=True),
  "qwen2": dict(LLAMA, **THETA, model_type="qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1),
  "qwen3": dict(LLAMA, **THETA, model_type="qwen3", attention_bias=True, tie_word_embeddings=True),
  "gemma": dict(LLAMA, **THETA, model_type="gemma", hidden_act="gelu"),
  "gemma2": dict(GEMMA2, **THETA, model_type="gemma2", attn_logit_softcapping=1.3),
  "gemma3": dict(
    GEMMA3,
    rope_parameters=dict(
      full_attention=dict(rope_type="linear", factor=1.7, rope_theta=123.0),
      sliding_attention=dict(rope_type="default", rope_theta=17.0),
    ),
  ),
  "phi3": dict(
    LLAMA, model_type="phi3", sliding_window=5, resid_pdrop=0.23, rope_theta=123.0, partial_rotary_factor=0.6
  ),
  "olmo2": dict(LLAMA, **THETA, model_type="olmo2"),
  "starcoder2": dict(
    {k: v for k, v in LLAMA.items() if k not in ("rms_norm_eps", "head_dim")}, **THETA, model_type="starcoder2",
    norm_epsilon=3e-4, sliding_window=5, residual_dropout=0.13, embedding_dropout=0.21),
  "gpt2": GPT2,
  "opt": OPT,
  "opt_350m": dict(OPT, word_embed_proj_dim=14, do_layer_norm_before=False),
  "neox": dict(NEOX, rotary_pct=0.4, rotary_emb_base=123),
}

ENCODERS = {  # more of the encoders
  "xlm_roberta": dict(ROBERTA, model_type="xlm-roberta", hidden_act="gelu_new"),
  "electra_base": dict(BERT, model_type="electra", embedding_size=24, hidden_act="silu"),
  "deberta_places": dict(
    DEBERTA, type_vocab_size=3, position_biased_input=True, norm_rel_ebd="none", max_relative_positions=-1,
    pos_att_type=["c2p", "p2c"], position_buckets=9),
  "modernbert_biases": dict(
    {k: v for k, v in MODERNBERT.items() if k != "rope_parameters"}, hidden_activation="silu", norm_bias=True,
    attention_bias=True, mlp_bias=True, classifier_bias=True, classifier_pooling="mean", global_rope_theta=123.0,
    local_rope_theta=77.0,
    layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]),
  "modernbert_untied": dict(
    MODERNBERT, decoder_bias=False, tie_word_embeddings=False, layer_types=["full_attention"] * 4),
}  # fmt: skip

STRETCH = dict(factor=3.7, original_max_position_embeddings=16, rope_theta=123.0)
LLAMAS = {  # more of Llama's relatives, as language models only
  "llama_biases": dict(
    LLAMA, **THETA, model_type="llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
    num_key_value_heads=None, head_dim=None, hidden_act="gelu_new"),
  "llama_linear": dict(LLAMA, model_type="llama", rope_theta=123.0, rope_scaling=dict(type="linear", factor=3.7)),
  "llama_dynamic": dict(
    LLAMA, model_type="llama", max_position_embeddings=24,
    rope_parameters=dict(rope_type="dynamic", factor=3.7, rope_theta=123.0)),
  "llama_llama3": dict(
    LLAMA, model_type="llama",
    rope_parameters=dict(
      STRETCH, rope_type="llama3", low_freq_factor=1.3, high_freq_factor=4.9, original_max_position_embeddings=37)),
  "llama_yarn": dict(
    LLAMA, model_type="llama", rope_parameters=dict(STRETCH, rope_type="yarn", beta_fast=2.3, beta_slow=0.4)),
  "qwen3_yarn": dict(
    LLAMA, model_type="qwen3", rope_theta=123.0, max_position_embeddings=59,
    rope_scaling=dict(
      type="yarn", factor=3.7, original_max_position_embeddings=16, beta_fast=2.3, beta_slow=0.4, truncate=False,
      mscale=0.7, mscale_all_dim=0.4)),
  "olmo2_yarn": dict(
    LLAMA, model_type="olmo2", attention_bias=True, num_key_value_heads=3,
    rope_parameters=dict(STRETCH, rope_type="yarn", beta_fast=2.3, beta_slow=0.4, attention_factor=1.3)),
  "qwen2_types": dict(
    {k: v for k, v in LLAMA.items() if k != "head_dim"}, **THETA, model_type="qwen2", use_sliding_window=True,
    sliding_window=5, layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
  "gemma_untied": dict(LLAMA, **THETA, model_type="gemma", hidden_act="silu", tie_word_embeddings=False,
                       attention_bias=True),
  "gemma2_types": dict(
    GEMMA2, **THETA, model_type="gemma2", attn_logit_softcapping=None, attention_bias=True,
    layer_types=["full_attention", "sliding_attention", "full_attention"]),
  "gemma3_old": dict(
    GEMMA3, rope_theta=123.0, rope_local_base_freq=17.0, rope_scaling=dict(rope_type="linear", factor=1.7),
    attention_bias=True),
  "phi3_whole": dict(LLAMA, **THETA, model_type="phi3", tie_word_embeddings=True, hidden_act="gelu"),
}  # fmt: skip

DECODERS = {  # more of GPT-2, OPT and GPT-NeoX, as language models only
  "gpt2_unscaled": dict(GPT2, scale_attn_weights=False, n_inner=None, tie_word_embeddings=False),
  "opt_galactica": dict(
    OPT, enable_bias=False, layer_norm_elementwise_affine=False, _remove_final_layer_norm=True,
    tie_word_embeddings=False),
  "neox_serial": dict(
    NEOX, use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True,
    rope_parameters=dict(rope_type="linear", factor=1.7, rope_theta=77.0, partial_rotary_factor=0.6)),
}  # fmt: skip

ENCDECS = {  # more of BART's relatives, as language models only
  "bart_unscaled": dict(
    BART, model_type="bart", scale_embedding=False, decoder_start_token_id=5, forced_eos_token_id=3,
    forced_bos_token_id=4),
  "mbart_without_start": dict(BART, model_type="mbart", decoder_start_token_id=None, scale_embedding=False),
}  # fmt: skip
