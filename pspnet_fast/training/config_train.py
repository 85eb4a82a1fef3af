"""Typed configuration of training; see :mod:`pspnet_fast.training.config`."""

from dataclasses import dataclass, field

from pspnet_fast.training.config_rules import ABOVE_0, SHARE, Rule, at_least, check, check_rules, one_of

HEAD = ("ppm", "cls", "aux")
OPTIMIZERS = ("sgd", "adamw")

TRAIN_RULES = {
    "train.epochs": at_least(1),
    "train.iterations": at_least(1),
    "train.batch_size": at_least(1),
    "train.accumulate": at_least(1),
    "train.val_batch_size": at_least(1),
    "train.val_epochs": at_least(1),
    "train.val_every": at_least(1),
    "train.checkpoint_every": at_least(1),
    "train.keep": at_least(1),
    "train.patience": at_least(1),
    "train.optimizer": one_of(OPTIMIZERS),
    "train.lr": ABOVE_0,
    "train.min_lr": at_least(0),
    "train.head_lr_factor": ABOVE_0,
    "train.head": Rule(f"some of {', '.join(HEAD)}", lambda value: set(value) <= set(HEAD)),
    "train.power": ABOVE_0,
    "train.warmup": at_least(0),
    "train.momentum": SHARE,
    "train.weight_decay": at_least(0),
    "train.clip_norm": ABOVE_0,
    "train.ema": Rule("above 0 and below 1", lambda value: 0 < value < 1),
    "train.aux_weight": at_least(0),
    "train.cross_entropy": at_least(0),
    "train.dice": at_least(0),
    "train.lovasz": at_least(0),
    "train.label_smoothing": Rule("from 0 to 1", lambda value: 0 <= value <= 1),
    "train.class_weights": Rule(
        "at least 0 each and not all 0", lambda value: min(value, default=-1) >= 0 and max(value) > 0
    ),
    "train.ohem_threshold": Rule("above 0 and at most 1", lambda value: 0 < value <= 1),
    "train.ohem_min_kept": at_least(0),
    "train.seed": at_least(0),
    "train.workers": at_least(0),
    "train.log_every": at_least(1),
}


@dataclass
class TrainConfig:
    """Optimisation, schedule and machine; what :func:`pspnet_fast.training.fit` needs."""

    epochs: int = 50
    """Passes over the training list."""
    iterations: int | None = None
    """Iterations in all, in place of epochs."""
    batch_size: int = 16
    """Images an iteration, those of all processes and parts; an epoch's incomplete last batch is left out."""
    accumulate: int = 1
    """Parts of a batch that run one after the other, for less memory; batch norms see one part at a time."""
    val_batch_size: int = 1
    """More than 1 needs validation images of one size (see data.val_crop)."""
    val_epochs: int = 1
    """Epochs between two validations; the last iteration is followed by one anyway."""
    val_every: int | None = None
    """Iterations between two validations, in place of val_epochs."""
    checkpoint_every: int | None = None
    """Iterations between two checkpoints, beside those after each epoch and validation."""
    keep: int = 2
    """Checkpoints kept: checkpoint.pt, and those before it as checkpoint-ITERATION.pt."""
    patience: int | None = None
    """Validations without a new best mIoU that end the training early; null goes on."""
    optimizer: str = "sgd"
    """SGD with momentum, or AdamW (beta 1 is momentum, beta 2 is 0.999)."""
    lr: float = 0.01
    """Of the backbone, at the first iteration; poly: min_lr + (lr - min_lr) * (1 - step / steps) ** power."""
    min_lr: float = 0.0
    """End of the poly schedule, of all groups alike (mmsegmentation: 1e-4)."""
    reach_min_lr: bool = False
    """Whether the last iteration has min_lr (mmsegmentation), or the one that would follow it (semseg)."""
    head_lr_factor: float = 10.0
    """Learning rate of the head over that of the backbone."""
    head: list[str] = field(default_factory=lambda: list(HEAD))
    """Children of the model that learn at the head's rate; torchvision's recipe: [aux]."""
    power: float = 0.9
    """Of the poly schedule."""
    warmup: int = 0
    """Iterations over which the learning rates rise linearly to the schedule's."""
    momentum: float = 0.9
    """Of SGD; beta 1 of AdamW."""
    weight_decay: float = 1e-4
    """Of all parameters."""
    clip_norm: float | None = None
    """Greatest norm of all gradients together; null clips nothing."""
    frozen_norms: bool = False
    """Whether the backbone's batch norms keep the weights and statistics that they start with."""
    sync_norms: bool = True
    """Whether batch norms have the statistics of all processes' images; of no effect in one process."""
    ema: float | None = None
    """Decay an iteration of averaged weights, which are validated and saved in best.pt; null keeps none."""
    aux_weight: float = 0.4
    """Factor of the auxiliary loss."""
    cross_entropy: float = 1.0
    """Factor of the cross entropy, for both losses."""
    dice: float = 0.0
    """Factor of the soft Dice loss beside it, of each part's pixels, for both losses."""
    lovasz: float = 0.0
    """Likewise, of the Lovasz-softmax loss; it sorts the pixels for each class, which takes its time."""
    average_ignored: bool = False
    """Whether the mean of the loss counts ignored pixels as 0 (mmsegmentation's default, smp), or leaves them out."""
    label_smoothing: float = 0.0
    """Share of the target that goes to all classes alike."""
    class_weights: list[float] | None = None
    """A factor a class of the cross entropy, for both losses."""
    ohem: bool = False
    """Only hard pixels count (online hard example mining), for both losses."""
    ohem_threshold: float = 0.7
    """Pixels whose label has a lower probability are hard."""
    ohem_min_kept: int = 100000
    """Pixels an image that count at least."""
    seed: int = 0
    """Of initial weights, order, transforms and dropout."""
    bf16: bool = False
    """Run the model under bfloat16 autocast; weights, losses and metrics stay float32."""
    fp16: bool = False
    """Likewise float16, with a gradient scaler; for GPUs without bfloat16."""
    channels_last: bool = False
    """Memory format; often faster for convolutions."""
    compile: bool = False
    """Whether torch.compile compiles the training step's model."""
    recompute: bool = False
    """Whether the backward pass computes the backbone's activations again: less memory, more time."""
    deterministic: bool = False
    """The same bits on every run also on a GPU: torch.use_deterministic_algorithms; some layers get slower."""
    device: str = "auto"
    """auto (CUDA where there is a GPU), cpu, cuda or cuda:N."""
    workers: int = 2
    """DataLoader processes of each training process; 0 loads in it. The results do not depend on it."""
    log_every: int = 10
    """Iterations between two looks at the losses (each costs one wait for a GPU)."""

    def __post_init__(self) -> None:
        check_rules("train", self, TRAIN_RULES)
        check(self.batch_size % self.accumulate == 0, "train.accumulate", self.accumulate, "a divisor of batch_size")
        check(self.min_lr <= self.lr, "train.min_lr", self.min_lr, f"at most train.lr = {self.lr}")
        check(
            max(self.cross_entropy, self.dice, self.lovasz) > 0,
            "train.cross_entropy",
            self.cross_entropy,
            "above 0 without train.dice or train.lovasz",
        )
        check(not (self.fp16 and self.bf16), "train.fp16", True, "false where train.bf16 is true")
        check(
            not (self.average_ignored and (self.ohem or self.class_weights)),
            "train.average_ignored",
            True,
            "false with ohem or class_weights",
        )
