"""Every setting with its default and properties. Flags override a YAML file, which overrides defaults.

A setting's annotation says everything about it: its type, the range of a number (`Within`), that it is
a path (`PathTo`), that a resumed run may change it (`Changeable[...]`). `config.fields` reads that.
This module and its imports do not import JAX, so that `--help` and input errors appear immediately.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from jaxmorph.cli.paths import is_file, is_file_or_folder, is_folder_or_free, is_path

_SMALLEST_FLOAT32, _LARGEST_FLOAT32 = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # below: flushed to 0


@dataclass(frozen=True)
class Within:
    """The range of a number: `low` and `high` are inclusive, `above` and `below` exclusive.

    A float must lie in it as float32 too, the type of a run's arrays: 1e-50 would be 0 there, 1e39
    infinite, and 0.9999999999 is not below 1.
    """

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def holds(self, value: float) -> bool:
        """Return whether a finite `value` lies in the range."""
        return self.low <= value <= self.high and self.above < value < self.below

    def problem(self, value: float, kind: type, noun: str = "a number") -> str | None:
        """Return what is expected instead of a number; None where it can be used.

        Args:
          value: the number; an integer may stand for a float.
          kind: int or float, the type it is used as.
          noun: what is expected, without its range.
        """
        wanted = f"{noun} {self}".strip()
        if isinstance(value, float) and not math.isfinite(value):
            return wanted.replace("a ", "a finite ", 1)
        if not self.holds(value):
            return wanted
        if kind is int:
            return None
        if value and not _SMALLEST_FLOAT32 <= abs(value) <= _LARGEST_FLOAT32:
            limits = f"{_SMALLEST_FLOAT32:.2g} and {_LARGEST_FLOAT32:.2g}"
            becomes = "0" if abs(value) < 1 else "infinite"
            return f"{wanted}, of a size between {limits} (in float32 this one is {becomes})"
        (stored,) = struct.unpack("f", struct.pack("f", value))
        return None if self.holds(stored) else f"{wanted} (in float32 this one is {stored:g})"

    def __str__(self) -> str:
        bounds = ((self.low, "≥"), (self.above, ">"), (self.high, "≤"), (self.below, "<"))
        return " and ".join(f"{sign} {bound:g}" for bound, sign in bounds if math.isfinite(bound))


@dataclass(frozen=True)
class PathTo:
    """What a path must point to; the path is made absolute when it is read.

    Args:
      expected: what must be there, in words.
      holds: checks the path; may raise OSError or ValueError, whose text is then the reason.
      keywords: words accepted instead of a path, and left unchanged.
    """

    expected: str
    holds: Callable[[Path], bool]
    keywords: tuple[str, ...] = ()


class MayChange:
    """Mark a setting that does not affect what a run has already done."""


Setting = TypeVar("Setting")
Changeable = Annotated[Setting, MayChange]  # a run may be resumed with another value

LARGEST_COUNT = 2**31 - 1  # counts become int32 arrays
Positive = Annotated[int, Within(low=1, high=LARGEST_COUNT)]
Count = Annotated[int, Within(low=0, high=LARGEST_COUNT)]
PositiveFloat = Annotated[float, Within(above=0)]
NonNegativeFloat = Annotated[float, Within(low=0)]
Fraction = Annotated[float, Within(low=0, below=1)]
OpenFraction = Annotated[float, Within(above=0, below=1)]
Ratio = Annotated[float, Within(low=0, high=1)]

STDLIB = "stdlib"
TOKENIZER_KINDS = ("byte", "char", "bpe", "gpt2")
ExistingFile = Annotated[str, PathTo("an existing file", is_file)]
AnyPath = Annotated[str, PathTo("a path", is_path)]
Folder = Annotated[str, PathTo("a folder, or a path not yet in use", is_folder_or_free)]
CorpusPath = Annotated[str, PathTo("an existing file or folder", is_file_or_folder, (STDLIB,))]
TokenizerPath = Annotated[
    str, PathTo("an existing tokenizer.json or meta.pkl", is_file, TOKENIZER_KINDS)
]

Scheduler = Literal[
    "cosine", "onecycle", "wsd", "linear", "constant", "step", "exponential", "polynomial",
    "reduce_on_plateau",
]  # fmt: skip
Attention = Literal["auto", "blocked", "xla", "cudnn"]


@dataclass(frozen=True)
class RunSettings:
    """Where the run is stored, how long it lasts, when it evaluates, saves and logs."""

    run_dir: Changeable[Folder | None] = None
    """Run folder. Default: runs/NAME, after the config file's name."""
    seed: Count = 0
    """Seed of initialisation, data order and dropout."""
    max_steps: Changeable[Positive | None] = None
    """Optimizer steps to train. Default: 2000, unless num_epochs is given."""
    num_epochs: Changeable[Annotated[float, Within(above=0, high=LARGEST_COUNT)] | None] = None
    """Passes over the training split, instead of max_steps."""
    eval_interval: Changeable[Positive] = 250
    """Steps between evaluations (there is always one at step 0 and one at the end)."""
    eval_iters: Changeable[Positive] = 20
    """Validation batches per evaluation, always the same ones."""
    checkpoint_interval: Changeable[Positive | None] = None
    """Steps between checkpoints. Default: eval_interval."""
    keep_checkpoints: Changeable[Positive] = 2
    """How many of the newest checkpoints to keep."""
    keep_best: Changeable[bool] = True
    """Also keep the checkpoint with the lowest validation loss."""
    log_interval: Changeable[Positive] = 10
    """Steps between full lines in metrics.jsonl."""
    max_nonfinite_steps: Changeable[Positive] = 20
    """Stop after this many skipped (non-finite) updates in a row."""
    resume: Changeable[bool] = True
    """Resume from the run folder's newest checkpoint; with --no_resume a used folder is refused."""
    accept_damaged_log: Changeable[bool] = False
    """Resume although lines of metrics.jsonl, operations.jsonl or heads.jsonl are missing or changed;
    those that are left are kept."""
    dry_run: Changeable[bool] = False
    """Print what the settings resolve to, and exit before anything is loaded or written."""
    progress: Changeable[Literal["auto", "bar", "lines", "off"]] = "auto"
    """Progress display: a bar on a terminal, else a line per log_interval at most every few seconds."""
    tensorboard: Changeable[bool] = False
    """Write TensorBoard files to RUN_DIR/tensorboard (extra: tensorboard)."""
    wandb: Changeable[Literal["off", "offline", "online"]] = "off"
    """Log to Weights & Biases (extra: wandb); offline needs no network."""
    wandb_project: Changeable[str] = "jaxmorph"
    """Weights & Biases project."""


@dataclass(frozen=True)
class DataSettings:
    """The corpus, its tokenizer and the batch."""

    data: Changeable[CorpusPath] = STDLIB  # its content is checked by the corpus's digest
    """stdlib (Python's own source, nothing to download), a text file, a folder, a JSONL file with a
    `text` field, or a nanoGPT .bin file."""
    tokenizer: TokenizerPath = "byte"
    """byte, char, bpe (trained on the corpus; extra: bpe), gpt2 (extra: gpt2), a tokenizer.json, or
    nanoGPT's meta.pkl, which describes a .bin file beside it without being named."""
    bpe_vocab_size: Annotated[int, Within(low=257, high=1_000_000)] = 8192
    """Vocabulary of a locally trained BPE."""
    val_fraction: OpenFraction = 0.1
    """Fraction of the corpus held out for validation."""
    cache_dir: Changeable[AnyPath | None] = None
    """Folder for tokenised corpora. Default: the user's cache folder."""
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
    """Transformer blocks; 0 for a run that starts without any and grows."""
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
    """Run the blocks in a lax.scan (constant compile time) or unrolled (faster for few layers on CPU).
    auto: scan above 12 layers."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Compute dtype. Parameters and optimizer state stay float32 (float64 with float64)."""
    remat: bool = False
    """Recompute each block's activations in the backward pass: less memory, about a third more work."""
    attention: Attention = "auto"
    """Attention implementation. auto: cudnn on GPU in bfloat16, blocked on CPU, else xla."""
    loss_chunk: Count | None = None
    """Tokens whose logits are computed at a time (0: all at once). Default: all for small vocabularies,
    4096 if all the logits would exceed 256 MB."""
    attn_lora_rank_divisor: NonNegativeFloat = 0.0
    """LoRA adapters on the attention's matrices, of rank d_model / divisor; 0: no LoRA."""
    vocab_lora_rank_divisor: NonNegativeFloat = 0.0
    """A LoRA adapter on the token embedding, of rank d_model / divisor; 0: no LoRA."""
    lora_alpha: PositiveFloat = 16.0
    """Numerator of the adapters' scale, alpha / rank."""
    lora_base: Literal["frozen", "trained"] = "frozen"
    """Whether the matrices that have an adapter are trained."""


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
    allow_warmup_past_end: Changeable[bool] = False
    """Accept a warmup that does not end before training does."""
    min_lr_ratio: Ratio = 0.1
    """Learning rate at the end, as a fraction of the peak."""
    onecycle_anneal: Literal["cosine", "linear"] = "cosine"
    """Interpolation of the one-cycle schedule."""
    onecycle_start_ratio: Ratio = 0.04
    """Where the one-cycle schedule starts, as a fraction of the peak."""
    wsd_decay_fraction: Annotated[float, Within(above=0, high=1)] = 0.2
    """Fraction of the run that warmup-stable-decay spends decaying."""
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
    """The scaling schedule, and divisors and multipliers of the settings above at its start."""

    scaling_schedule_file: Changeable[ExistingFile | None] = None  # a resume compares its entries
    """Operations that change model and settings during training (*.json, *.yaml); --help_operations
    lists them."""
    allow_schedule_change: Changeable[bool] = False
    """Resume with a schedule in which entries that have not fired yet were edited."""
    plateau_min_change: Fraction = 1e-3
    """For trigger_plateau, a validation loss is an improvement if it is lower than at the last
    improvement by more than this fraction."""
    precompile: Changeable[Literal["on", "off"]] = "on"
    """Compile the next stage's programs in the background while the current one trains."""
    simulate_loss: Changeable[ExistingFile | None] = None
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
class HeadSettings:
    """Learning rates per attention head, and the controller that closes and opens heads."""

    enable_head_lr: bool = False
    """Give heads that open a learning rate of their own: up to boost × the run's, then back."""
    head_lr_profile: Literal["pretrain", "finetune", "prune"] = "pretrain"
    """Defaults of the four settings below: boost, decay, warmup, cooldown are 5, 0.9, 200, 1000 for
    pretrain; 2, 0.9, 50, 400 for finetune; 3, 0.9, 100, 600 for prune."""
    head_lr_boost: PositiveFloat | None = None
    """Largest multiplier of an opened head's learning rate. Default: the profile's, 5."""
    head_lr_decay: OpenFraction | None = None
    """Decay of the boost per hundredth of the cooldown. Default: the profile's, 0.9."""
    head_lr_warmup: Count | None = None
    """Steps from a head's opening to its full boost. Default: the profile's, 200."""
    head_lr_cooldown: Positive | None = None
    """Steps from a head's opening to the run's own rate. Default: the profile's, 1000."""
    head_lr_adaptive: Literal["off", "layer", "importance", "gradient"] = "off"
    """Scale each head's boost: by its layer, from 0.5 in the first to 2 in the last, or within these by
    the importance or the gradient that the controller measures, over the median."""
    enable_controller: bool = False
    """Close heads that matter little, and open closed ones that would help."""
    controller_interval: Positive = 100
    """Steps between the controller's updates."""
    controller_warmup: Count = 500
    """Steps before the first of them; fewer than the run's."""
    controller_batches: Positive = 4
    """Training batches on which it, and operations that choose by importance, measure the heads: always
    the same ones, outside the run's stream."""
    controller_lr: PositiveFloat = 1.0
    """Step of a gate's logit per update; a gate is closed at most 6 steps of 1 after 1."""
    controller_lr_decay: Annotated[float, Within(above=0, high=1)] = 0.95
    """The step is multiplied by this ..."""
    controller_lr_decay_steps: Positive = 1000
    """... over this many training steps."""
    min_controller_lr: PositiveFloat = 0.1
    """Smallest step of a logit."""
    max_pruned_heads: Fraction = 0.3
    """Largest fraction of all heads that the controller closes, and its target."""
    min_heads_per_layer: Positive = 1
    """Heads that it and prune_heads leave open in each layer."""
    controller_patience: Positive = 5
    """The controller stops after this many updates in a row that change little ..."""
    controller_min_change: NonNegativeFloat = 0.01
    """... namely the gates by less than this on average."""
    controller_audit: Positive = 5
    """Every so many updates all open heads are ablated, not only the shortlist; then closed ones that
    would be worth more than half of the open ones open again."""
    gate_l1: NonNegativeFloat = 0.0
    """Weight of the gates' sum, added to the loss, with which the controller also learns their logits by
    gradient descent, down to a gate of 0.2; 0: it does not."""


@dataclass(frozen=True)
class ScaleSettings:
    """How the work is distributed over devices."""

    mesh: Changeable[str] = ""
    """Device mesh, for example data=2,fsdp=4 (axes: data, fsdp, tensor). Default: all on data."""
    allow_oversized: Changeable[bool] = False
    """Start even if a stage of the run certainly needs more memory than there is."""


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
    heads: HeadSettings = field(default_factory=HeadSettings)
    scale: ScaleSettings = field(default_factory=ScaleSettings)
