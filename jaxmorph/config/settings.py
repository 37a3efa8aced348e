"""Every setting, its default and its check. Settings come from flags over a YAML file over defaults.

This module and what it imports know nothing of JAX, so that `--help` and refusals answer at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal


@dataclass(frozen=True)
class Within:
    """The range of a number: `low` and `high` belong to it, `above` and `below` do not."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def holds(self, value: float) -> bool:
        """Say whether a finite `value` lies in the range."""
        return self.low <= value <= self.high and self.above < value < self.below

    def __str__(self) -> str:
        bounds = ((self.low, "≥"), (self.above, ">"), (self.high, "≤"), (self.below, "<"))
        return " and ".join(f"{sign} {bound:g}" for bound, sign in bounds if math.isfinite(bound))


_LARGEST = 2**31 - 1  # counts become int32 arrays
Positive = Annotated[int, Within(low=1, high=_LARGEST)]
Count = Annotated[int, Within(low=0, high=_LARGEST)]
PositiveFloat = Annotated[float, Within(above=0)]
NonNegativeFloat = Annotated[float, Within(low=0)]
Fraction = Annotated[float, Within(low=0, below=1)]
OpenFraction = Annotated[float, Within(above=0, below=1)]
Ratio = Annotated[float, Within(low=0, high=1)]

Scheduler = Literal[
    "cosine", "onecycle", "wsd", "linear", "constant", "step", "exponential", "polynomial",
    "reduce_on_plateau",
]  # fmt: skip
Attention = Literal["auto", "blocked", "xla", "cudnn"]


@dataclass(frozen=True)
class RunSettings:
    """Where the run lives, how long it lasts, when it looks up."""

    run_dir: str | None = None
    """Run folder. Default: runs/NAME, after the config file's name."""
    seed: Count = 0
    """Seed of initialisation, data order and dropout."""
    max_steps: Positive | None = None
    """Optimizer steps to train. Default: 2000, unless num_epochs is given."""
    num_epochs: PositiveFloat | None = None
    """Passes over the training split, in place of max_steps."""
    eval_interval: Positive = 250
    """Steps between evaluations (there is always one at step 0 and one at the end)."""
    eval_iters: Positive = 20
    """Validation batches per evaluation, always the same ones."""
    checkpoint_interval: Positive | None = None
    """Steps between checkpoints. Default: eval_interval."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints to keep."""
    keep_best: bool = True
    """Keep the checkpoint of the lowest validation loss as well."""
    log_interval: Positive = 10
    """Steps between full lines in metrics.jsonl."""
    max_nonfinite_steps: Positive = 20
    """Stop after this many skipped (non-finite) updates in a row."""
    resume: bool = True
    """Go on where the run folder's checkpoint left off; with --no_resume a used folder is refused."""
    dry_run: bool = False
    """Print what the settings resolve to, and stop before anything is loaded or written."""
    progress: Literal["auto", "bar", "lines", "off"] = "auto"
    """Progress display: a bar on a terminal, else a line per log_interval at most every few seconds."""
    tensorboard: bool = False
    """Write TensorBoard files to RUN_DIR/tensorboard (extra: tensorboard)."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Log to Weights & Biases (extra: wandb); offline needs no network."""
    wandb_project: str = "jaxmorph"
    """Weights & Biases project."""


@dataclass(frozen=True)
class DataSettings:
    """What is read, and in what portions."""

    data: str = "stdlib"
    """stdlib (Python's own source, nothing to download), a text file, a folder, a JSONL file with a
    `text` field, or a nanoGPT .bin file."""
    tokenizer: str = "byte"
    """byte, char, bpe (trained on the corpus; extra: bpe), gpt2 (extra: gpt2) or a tokenizer.json."""
    bpe_vocab_size: Annotated[int, Within(low=257, high=1_000_000)] = 8192
    """Vocabulary of a locally trained BPE."""
    val_fraction: OpenFraction = 0.1
    """Part of the corpus held out for validation."""
    cache_dir: str | None = None
    """Tokenised corpora are kept here. Default: the user's cache folder."""
    seq_len: Positive = 256
    """Context length in tokens."""
    batch_size: Positive = 16
    """Sequences per forward pass, over all devices."""
    grad_accum_steps: Positive = 1
    """Forward passes whose gradients are averaged into one update: the update sees
    batch_size × grad_accum_steps sequences."""


@dataclass(frozen=True)
class ModelSettings:
    """The transformer's shape."""

    n_layers: Count = 6
    """Transformer blocks; 0 for a run that begins without any and grows."""
    d_model: Positive = 384
    """Width of the residual stream."""
    n_heads: Positive = 6
    """Attention heads per block; must divide d_model."""
    d_ff: Positive | None = None
    """Hidden width of the MLP. Default: 4 × d_model."""
    dropout: Fraction = 0.0
    """Dropout probability on embeddings, attention and residual branches."""
    positions: Literal["learned", "rotary"] = "learned"
    """Position encoding."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before each sub-layer and before the head."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """MLP nonlinearity; swiglu adds a gate matrix."""
    tied_head: bool = True
    """Use the token embedding as the output head."""
    biases: bool = True
    """Biases in linear layers and LayerNorm."""
    vocab_multiple: Positive = 1
    """Round the vocabulary up to a multiple (64 or 128 is faster on GPU and TPU)."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial weights; residual projections get 1/√(2·n_layers) of it."""
    scan_layers: Literal["auto", "scan", "unrolled"] = "auto"
    """Run the blocks by lax.scan (constant compile time) or unrolled (faster for few layers on CPU).
    auto: scan above 12 layers."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Compute type. Parameters and optimizer state stay float32 (float64 with float64)."""
    remat: bool = False
    """Recompute each block's activations in the backward pass: less memory, about a third more work."""
    attention: Attention = "auto"
    """Attention implementation. auto: cudnn on GPU in bfloat16, blocked on CPU, else xla."""
    loss_chunk: Count | None = None
    """Tokens whose logits are held at a time (0: all at once). Default: all for small vocabularies,
    4096 where all the logits would exceed 256 MB."""
    attn_lora_rank_divisor: NonNegativeFloat = 0.0
    """LoRA adapters on the attention's matrices, of rank d_model / divisor; 0: no LoRA."""
    vocab_lora_rank_divisor: NonNegativeFloat = 0.0
    """A LoRA adapter on the token embedding, of rank d_model / divisor; 0: no LoRA."""
    lora_alpha: PositiveFloat = 16.0
    """Numerator of the adapters' scale, alpha / rank."""
    lora_base: Literal["frozen", "trained"] = "frozen"
    """What happens to the matrices that have an adapter."""


@dataclass(frozen=True)
class OptimizerSettings:
    """The update rule and the learning-rate schedule."""

    optimizer: Literal["adamw", "muon", "lion", "sgd", "adafactor"] = "adamw"
    """muon orthogonalises the blocks' matrices and uses AdamW for the rest."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate."""
    scheduler: Scheduler = "cosine"
    """Shape of the learning rate after its linear warmup."""
    warmup_steps: Count | None = None
    """Steps of linear warmup. Default: 5 % of the total."""
    allow_warmup_past_end: bool = False
    """Accept a warmup that does not end before training does."""
    min_lr_ratio: Ratio = 0.1
    """Learning rate at the end, as a fraction of the peak."""
    onecycle_anneal: Literal["cosine", "linear"] = "cosine"
    """Interpolation of the one-cycle schedule."""
    onecycle_start_ratio: Ratio = 0.04
    """Where the one-cycle schedule starts, as a fraction of the peak."""
    wsd_decay_fraction: Annotated[float, Within(above=0, high=1)] = 0.2
    """Part of the run that warmup-stable-decay spends decaying."""
    lr_stairs: Annotated[int, Within(low=2, high=10_000)] = 3
    """Number of equal stairs of the step schedule."""
    lr_power: PositiveFloat = 2.0
    """Power of the polynomial schedule."""
    plateau_factor: OpenFraction = 0.5
    """reduce_on_plateau multiplies the rate by this ..."""
    plateau_patience: Positive = 3
    """... after this many evaluations without a better validation loss."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices; biases and gains are not decayed."""
    beta1: Fraction = 0.9
    """Decay of the first moment (momentum of sgd and muon)."""
    beta2: Fraction = 0.95
    """Decay of the second moment."""
    epsilon: PositiveFloat = 1e-8
    """Added to the denominator of Adam's update."""
    grad_clip: NonNegativeFloat = 1.0
    """Largest global norm of the gradient; 0: no clipping."""


@dataclass(frozen=True)
class GrowthSettings:
    """The scaling schedule, and what divides and multiplies the settings above at its start."""

    scaling_schedule_file: str | None = None
    """Operations that change model and training under way (*.json, *.yaml); --help_operations
    lists them."""
    allow_schedule_change: bool = False
    """Resume with a schedule whose entries that have not fired yet were edited."""
    precompile: Literal["on", "off"] = "on"
    """Compile the next stage's programs in the background while the present one trains."""
    simulate_loss: str | None = None
    """With dry_run: a CSV file of a run's evaluations (header step,loss); prints when each operation
    would fire."""
    n_layer_divisor: PositiveFloat = 1.0
    """Start with n_layers / divisor layers."""
    n_hidden_divisor: PositiveFloat = 1.0
    """Start with d_ff / divisor hidden units."""
    lr_multiplier: PositiveFloat = 1.0
    """Start with learning_rate × multiplier."""
    batch_size_multiplier: PositiveFloat = 1.0
    """Start with batch_size × multiplier, rounded down."""
    grad_accum_multiplier: PositiveFloat = 1.0
    """Start with grad_accum_steps × multiplier, rounded down."""
    warmup_iters_multiplier: PositiveFloat = 1.0
    """Start with warmup_steps × multiplier, rounded down."""
    eval_iters_multiplier: PositiveFloat = 1.0
    """Start with eval_iters × multiplier, rounded down."""
    eval_interval_multiplier: PositiveFloat = 1.0
    """Start with eval_interval × multiplier, rounded down."""
    lora_alpha_multiplier: PositiveFloat = 1.0
    """Start with lora_alpha × multiplier."""


@dataclass(frozen=True)
class ScaleSettings:
    """Where the work is spread."""

    mesh: str = ""
    """Device mesh, for example data=2,fsdp=4 (axes: data, fsdp, tensor). Default: all on data."""


@dataclass(frozen=True)
class Settings:
    """All settings of a training run."""

    config: str | None = None
    """YAML file: a flat mapping of the flag names below to values. Flags beat the file."""
    run: RunSettings = field(default_factory=RunSettings)
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    growth: GrowthSettings = field(default_factory=GrowthSettings)
    scale: ScaleSettings = field(default_factory=ScaleSettings)


@dataclass(frozen=True)
class ModelConfig:
    """The architecture at one moment: sizes and policies, all that the model's programs depend on."""

    n_layers: int
    d_model: int
    n_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    seq_len: int
    dropout: float
    positions: str
    norm: str
    activation: str
    tied_head: bool
    biases: bool
    init_std: float
    scan_layers: str
    dtype: str
    remat: bool
    attention: Attention
    loss_chunk: int | None
    attn_lora_rank: int
    """Rank of the adapters on the attention's matrices; 0: none."""
    vocab_lora_rank: int
    """Rank of the adapter on the token embedding; 0: none."""
    lora_base: str
    """frozen or trained: what happens to the matrices that have an adapter."""
