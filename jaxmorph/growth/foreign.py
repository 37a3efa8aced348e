"""Names that schedules of other programs use, and what to write here instead.

The operations are those of nano_gpt's training orchestrator, early and late, and names of nanoGPT's and
Hugging Face's settings. `docs/coming_from.md` says the same at more length.
"""

from collections.abc import Mapping

_NO_FREEZING = (
    "no operation freezes parameters; --lora_base frozen trains the adapters over a frozen base"
)
_NO_VOCABULARY = "the vocabulary is the tokenizer's to the end (--tokenizer, --vocab_multiple)"

# What to write instead, or why there is nothing.
FOREIGN_OPERATIONS: Mapping[str, str] = {
    "change_learning_rate": "change_lr",
    "set_learning_rate": "set_lr",
    "change_gradient_accumulation_steps": "change_grad_accum",
    "set_gradient_accumulation_steps": "set_grad_accum",
    "set_batch_size_relative": "change_batch_size",
    "adjust_batch_size": "set_batch_size, or change_batch_size (--dry_run shows memory by stage)",
    "change_warmup_steps": "change_warmup_iters",
    "set_warmup_steps": "set_warmup_iters",
    "set_layers": "set_n_layers",
    "set_n_layer": "set_n_layers",
    "set_n_head": "set_n_heads",
    "set_n_embd": "set_d_model",
    "set_hidden_dim": "set_d_ff",
    "set_n_hidden": "set_d_ff",
    "increase_hidden_dim": "widen_mlp, by a factor, or set_d_ff, to a size",
    "set_block_size": "set_seq_len",
    "set_embedding_lora_rank": "set_vocab_lora_rank",
    "resize_embedding_rank": "set_vocab_lora_rank",
    "resize_lora_rank": "set_attn_lora_rank",
    "set_layer_lora_rank": "one rank for all layers (set_attn_lora_rank), and one for the embedding "
    "(set_vocab_lora_rank)",
    "set_curriculum_alpha": "there is no curriculum over examples; one over lengths is set_seq_len",
    "freeze_layer": _NO_FREEZING,
    "unfreeze_layer": _NO_FREEZING,
    "set_embedding_freeze_mode": _NO_FREEZING,
    "set_embedding_finetune_mode": _NO_FREEZING,
    "resize_vocabulary": _NO_VOCABULARY,
    "disable_vocab_remapping": _NO_VOCABULARY,
}
# The field of an entry that means the same here.
FOREIGN_FIELDS: Mapping[str, str] = {
    "operation": "name",
    "op": "name",
    "trigger_val_loss": "trigger_loss",
    "reevaluate_after": "reevaluate",
    "max_wait_steps": "max_wait_iters",
    "patience": "trigger_plateau",
    "description": "desc",
}
