"""What a run does, in words, for its log."""

from pspnet_fast.training.config_train import TrainConfig
from pspnet_fast.training.distributed import World


def describe(config: TrainConfig, iterations: int, world: World) -> list[str]:
    """Sentences on schedule, batch, loss and model of a run whose epochs have ``iterations`` iterations."""
    steps = config.iterations or config.epochs * iterations
    return [
        _optimizer(config),
        _schedule(config, steps),
        f"{steps} iterations, {steps / iterations:g} epochs of {iterations}; validation every "
        + (f"{config.val_every} iterations" if config.val_every else f"{config.val_epochs} epochs")
        + (f"; stops after {config.patience} validations without a better mIoU" if config.patience else ""),
        _batch(config, world),
        _loss(config),
        _numbers(config),
    ]


def _optimizer(config: TrainConfig) -> str:
    name = f"SGD, momentum {config.momentum:g}"
    if config.optimizer == "adamw":
        name = f"AdamW, betas {config.momentum:g} and 0.999"
    head = ", ".join(config.head) or "no child"
    clip = "" if config.clip_norm is None else f"; gradients clipped to norm {config.clip_norm:g}"
    return (
        f"{name}, weight decay {config.weight_decay:g} on all parameters; learning rate {config.lr:g}, "
        f"{config.head_lr_factor:g} times that for {head}{clip}"
    )


def _schedule(config: TrainConfig, steps: int) -> str:
    where = "in the last iteration" if config.reach_min_lr else "after the last iteration"
    warmup = f", after a linear rise over {config.warmup} iterations" if config.warmup else ""
    return f"poly schedule of power {config.power:g} to {config.min_lr:g} {where} of {steps}{warmup}"


def _batch(config: TrainConfig, world: World) -> str:
    images = config.batch_size // (world.size * config.accumulate)
    synchronised = world.size if config.sync_norms else 1
    norms = f"batch norms see {images * synchronised} images"
    if synchronised > 1:
        norms += f", those of {synchronised} processes"
    if config.frozen_norms:
        norms += "; those of the backbone are frozen"
    return (
        f"batches of {config.batch_size} images: {world.size} processes of {config.accumulate} parts of {images} "
        f"images each; {norms}"
    )


def _loss(config: TrainConfig) -> str:
    pixels = "all pixels, ignored ones as 0," if config.average_ignored else "the labelled pixels"
    mean = f"mean over {pixels} of all processes and parts"
    if config.ohem:
        mean = (
            f"mean over each part's pixels below probability {config.ohem_threshold:g}, at least "
            f"{config.ohem_min_kept} an image, then over processes and parts"
        )
    weights = ", weighted by class" if config.class_weights else ""
    smoothing = f", label smoothing {config.label_smoothing:g}" if config.label_smoothing else ""
    factor = "" if config.cross_entropy == 1 else f"{config.cross_entropy:g} times "
    terms = [f"{factor}cross entropy{weights}{smoothing}, {mean}"] if config.cross_entropy else []
    regions = [("Dice", config.dice), ("Lovasz-softmax", config.lovasz)]
    terms += [f"{weight:g} times the {name} loss, mean over parts and processes" for name, weight in regions if weight]
    return f"{'; '.join(terms)}; plus {config.aux_weight:g} times that of the auxiliary head"


def _numbers(config: TrainConfig) -> str:
    dtype = "float16 with a gradient scaler" if config.fp16 else "bfloat16" if config.bf16 else ""
    numbers = f"autocast to {dtype}" if dtype else "the parameters' own precision"
    ema = "" if config.ema is None else f"; weights averaged with decay {config.ema:g} are validated"
    compiled = "; compiled" if config.compile else ""
    recomputed = "; the backbone's activations are recomputed" if config.recompute else ""
    deterministic = "; deterministic algorithms" if config.deterministic else ""
    return f"{numbers}{compiled}{recomputed}{deterministic}; seed {config.seed}{ema}"
