"""How to train. Imports no torch: the command line lists the options as its flags."""

from __future__ import annotations

from dataclasses import dataclass

from ..names import NETWORKS_TRAINED, PRECISIONS

# what an objective trains with where its user does not say otherwise
OBJECTIVE_DEFAULTS: dict[str, dict[str, float]] = {
    "autoencoder": {
        **{"size": 128, "num_clips": 6000, "steps": 12_000, "batch_size": 5},
        **{"learning_rate": 1e-3, "warmup": 100, "ema": 0.998},
    },
    "distill": {
        **{"steps": 4, "updates": 8000, "learning_rate": 3e-4, "warmup": 100, "ema": 0.998},
        **{"decay": 0.7, "teacher_steps": 48},
    },
    "text": {"steps": 3000, "batch_size": 32, "learning_rate": 1.5e-3, "ema": 0.995},
}


# … and where a LoRA is trained
LORA_DEFAULTS: dict[str, float] = {
    **{"steps": 100, "batch_size": 4, "extra_images": 8, "learning_rate": 3e-3, "warmup": 20},
    **{"weight_decay": 0.0, "ema": 0.98, "save_every": 50, "sample_every": 100, "log_every": 10},
}


@dataclass(frozen=True)
class TrainingOptions:
    """How to train; recorded with the weights.

    steps            optimizer steps; the learning rate rises over `warmup` and falls over the last
                     `decay` share
    batch_size       clips a step
    learning_rate, weight_decay, gradient_clip   of AdamW (0.9, 0.99)
    ema              decay of the averaged weights, which are the ones that are shipped
    class_dropout    share of samples whose label becomes the null class, or whose prompt the empty
                     one, for classifier-free guidance
    precision        "bf16" (autocast) or "fp32"
    seed             of all that is random

    For the autoencoder only:
    adversary        norm of the decoder's gradient from an adversary, in norms of that from errors
                     of pixels (training/adversary.py); 0: no adversary

    For decomposed models only:
    extra_images     base frames of further clips a step, for the base network alone
    clean_share      share of clips on which the residual network sees the exact base noise
                     (base_path="clean")
    base_jitter      largest standard deviation of the noise on those clips' base frames, which is
                     drawn uniformly: a generated base frame is not as clean as a real one
    train            "both" networks, or "base" or "residual" alone, so that two processes may train
                     one each; the residual network alone sees the exact base noise on every clip,
                     unless the base network is a published one
    timestep_shift   s: timesteps are drawn at s u / (1 + (s-1) u) of the schedule, u uniform; above
                     1 more of them have much noise (Esser et al. 2024, arXiv 2403.03206, eq. 23)
    cell_weight      weight of the cells that the figure fills, beside 1 of all others
    teacher_steps    where a model is distilled: DDIM steps of its teacher in place of all of the
                     student's; 0: it is not
    """

    steps: int = 20_000
    batch_size: int = 8
    extra_images: int = 40
    learning_rate: float = 8e-4
    warmup: int = 150
    decay: float = 0.5
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    ema: float = 0.999
    class_dropout: float = 0.12
    clean_share: float = 0.85
    base_jitter: float = 0.1
    train: str = "both"
    timestep_shift: float = 1.0
    cell_weight: float = 1.0
    precision: str = "bf16"
    seed: int = 0
    adversary: float = 0.0
    teacher_steps: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("decay", "ema", "class_dropout", "clean_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, got {getattr(self, name)}")
        for name in (
            "extra_images",
            "warmup",
            "weight_decay",
            "base_jitter",
            "seed",
            "teacher_steps",
        ):
            if not getattr(self, name) >= 0:  # also refuses NaN
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("learning_rate", "gradient_clip", "timestep_shift", "cell_weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.adversary < float("inf"):
            raise ValueError(f"adversary must be finite and not negative, got {self.adversary}")
        if self.train not in NETWORKS_TRAINED:
            raise ValueError(f"train must be one of {NETWORKS_TRAINED}, got {self.train!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f'precision must be "bf16" or "fp32", got {self.precision!r}')

    @property
    def only_exact_bases(self) -> bool:
        """Whether no step asks the base network."""
        return self.train == "residual" and self.clean_share == 1

    def check_base(self, is_trained: bool) -> None:
        """ValueError where the residual network alone would be shown what a new network says.

        is_trained: whether the base network is a published one, or a teacher's
        """
        if self.train == "residual" and not (is_trained or self.only_exact_bases):
            raise ValueError(
                "train='residual' shows the exact base noise alone: clean_share must be 1, "
                f"got {self.clean_share}"
            )

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, constant, linear to zero over the last `decay` share of the steps."""
        rise = min(1.0, (step + 1) / max(self.warmup, 1))
        fall = min(1.0, (1 - step / self.steps) / max(self.decay, 1e-9))
        return self.learning_rate * rise * fall
