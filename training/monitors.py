"""Training monitors: they read the metrics as they are logged, and return a warning if something is wrong."""

import math
from collections import deque
from statistics import fmean

from .evaluator import Evaluation

# with all logits of the discriminator beyond these, on the correct sides, its loss is below 0.014
_SATURATED_LOGIT = 5
# above the loss of a discriminator that always predicts 50%
_LOSS_MARGIN = 0.01
# share of pairs that a discriminator ranks correctly once it has won
_WON_ACCURACY = 0.97
# recall and coverage have collapsed below this share of their highest value, unless they differ by less than the noise
# of evaluations with a few hundred samples
_COLLAPSED_SHARE, _COLLAPSED_DIFFERENCE = 0.7, 0.1
# share of near-copies, above that among other training images, at which the networks memorize
_MEMORIZED_SHARE = 0.1
# consecutive saturated steps, or steps in the mean loss, before a warning
_PATIENCE = 500


class GANBalanceMonitor:
    """Warns when the discriminator has won, or is worse than chance: either way the generator learns little.

    Each of the two warnings is returned once. The monitor reads the columns `d_loss`, `d_real`, `d_fake` (logits),
    `d_r1` and `d_r2`.

    Args:
        loss: the loss of the discriminator, as in `objectives.adversarial.GANSetup`.
    """

    def __init__(self, loss: str = "non_saturating"):
        self.is_relativistic = loss == "relativistic"
        self.chance_loss = math.log(2) if self.is_relativistic else 2 * math.log(2)  # if it always predicts 50%
        self.saturated_steps = 0
        self.losses: deque[float] = deque(maxlen=_PATIENCE)
        self.warned: set[str] = set()

    def __call__(self, rows: list[dict[str, float]]) -> str | None:
        """Read the newest rows of metrics.csv and return a warning, or None."""
        for row in rows:
            real, fake = row["d_real"], row["d_fake"]
            if self.is_relativistic:  # only the difference of the logits matters
                saturated = real - fake > _SATURATED_LOGIT
            else:
                saturated = real > _SATURATED_LOGIT and fake < -_SATURATED_LOGIT
            self.saturated_steps = self.saturated_steps + 1 if saturated else 0
            penalties = (row.get(name, math.nan) for name in ("d_r1", "d_r2"))
            self.losses.append(row["d_loss"] - sum(value for value in penalties if not math.isnan(value)))
        if self.saturated_steps >= _PATIENCE and "saturated" not in self.warned:
            self.warned.add("saturated")
            return (
                "The discriminator has separated real from generated images almost perfectly for "
                f"{self.saturated_steps} steps (mean logits {rows[-1]['d_real']:.1f} and {rows[-1]['d_fake']:.1f}), "
                "so the generator is falling behind. A larger --r1_gamma, a smaller --lr_d, or --diffaug translation "
                "cutout on a small dataset usually helps."
            )
        loss = fmean(self.losses) if len(self.losses) == _PATIENCE else 0
        if loss > self.chance_loss + _LOSS_MARGIN and "chance" not in self.warned:
            self.warned.add("chance")
            return (
                f"The discriminator has been worse than chance for {_PATIENCE} steps (mean loss {loss:.3f}, at chance "
                f"{self.chance_loss:.3f}), so the generator learns little from it. A smaller --lr_d, an --lr_g below "
                "it, or --diffaug without color usually helps."
            )
        return None


class DiscriminatorAccuracyMonitor:
    """Warns once when a discriminator ranks real images above generated ones almost always.

    Unlike its logits, which gradient penalties keep close to zero, its accuracy does not depend on their scale. The
    monitor reads the column `d_accuracy`, which steps without the discriminator do not have.
    """

    def __init__(self):
        self.accuracies: deque[float] = deque(maxlen=_PATIENCE)
        self.warned = False

    def __call__(self, rows: list[dict[str, float]]) -> str | None:
        """Read the newest rows of metrics.csv and return a warning, or None."""
        self.accuracies.extend(row["d_accuracy"] for row in rows if "d_accuracy" in row)
        if self.warned or len(self.accuracies) < _PATIENCE or fmean(self.accuracies) < _WON_ACCURACY:
            return None
        self.warned = True
        return (
            f"For {_PATIENCE} steps the discriminator has ranked the real image above the generated one in "
            f"{fmean(self.accuracies):.0%} of pairs (50% is chance), so the generator is falling behind. A larger "
            "--gamma, a larger --instance_noise or a smaller --lr_d usually helps."
        )


class DiversityMonitor:
    """Warns once when evaluations show that samples have lost variety, and once when they repeat training images.

    Variety is lost if recall or coverage fall far below their highest value in the earlier evaluations of the run.
    """

    def __init__(self):
        self.warned: set[str] = set()

    def __call__(self, evaluation: Evaluation, earlier: list[dict[str, float]]) -> str | None:
        """Read an evaluation and return a warning, or None.

        Args:
            earlier: the comparable evaluations before it, rows of metrics.csv.
        """
        found = {"collapse": self._collapse(evaluation, earlier), "memorization": self._memorization(evaluation)}
        new = {kind: warning for kind, warning in found.items() if warning and kind not in self.warned}
        self.warned |= new.keys()
        return " ".join(new.values()) or None

    def _collapse(self, evaluation: Evaluation, earlier: list[dict[str, float]]) -> str | None:
        for name in ("recall", "coverage"):
            key, metric = evaluation.by_name()[name]
            best = max(earlier, key=lambda row: row[key], default={key: 0.0, "step": 0})
            if metric.value < min(_COLLAPSED_SHARE * best[key], best[key] - _COLLAPSED_DIFFERENCE):
                return (
                    f"Since step {best['step']:.0f} {name} has fallen from {best[key]:.2f} to {metric.value:.2f}, so "
                    "the samples have lost variety; a larger --distillation_weight or --gamma usually helps, and "
                    "best/ keeps the best pipeline so far."
                )
        return None

    def _memorization(self, evaluation: Evaluation) -> str | None:
        _, metric = evaluation.by_name()["near_copies"]
        floor = evaluation.floors["near_copies"].value
        if metric.value <= floor + _MEMORIZED_SHARE:
            return None
        return (
            f"{metric.value:.0%} of the samples are near-copies of training images, against {floor:.0%} of other "
            "training images, so the networks memorize them; a smaller --max_train_steps or more images usually help."
        )
