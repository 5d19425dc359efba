"""Training criteria as engine.py calls them: criterion(samples, outputs, targets) -> loss."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BaseLoss = Callable[[Tensor, Tensor], Tensor]


class ImageLoss(nn.Module):
    """Apply a loss of (outputs, targets), in float32 whatever the model ran in; the images are not needed."""

    def __init__(self, loss: BaseLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, samples: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(outputs.float(), targets)


class DistillationLoss(nn.Module):
    """Mix a loss of the class head with what a teacher says of the same images (DeiT, arXiv 2012.12877).

    The outputs are the student's two heads (class, distillation), each B, classes. The loss is
    base(class head, targets) * (1 - alpha) + distillation * alpha, in float32, where the distillation head is compared
    with the teacher's most likely class by cross-entropy ("hard"), or with all that it says, at temperature tau, by
    KL(teacher || student) * tau^2 / (B * classes) ("soft").

    `teacher` stays in eval mode and runs within `autocast()`, the run's precision.
    """

    def __init__(
        self,
        base: BaseLoss,
        teacher: nn.Module,
        kind: str,
        alpha: float,
        tau: float,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        super().__init__()
        if kind not in ("soft", "hard"):
            raise ValueError(f"distillation is soft or hard, not {kind}")
        self.base, self.kind, self.alpha, self.tau, self.autocast = base, kind, alpha, tau, autocast
        self.teacher = teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "DistillationLoss":
        """Set the mode of all but the teacher: its batch norms must not move."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, samples: Tensor, outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        if not isinstance(outputs, tuple):  # two rows of one tensor would unpack as well
            raise TypeError("distillation needs the outputs of two heads: was set_distilled_training(True) called?")
        logits, distilled = (x.float() for x in outputs)
        base = self.base(logits, targets)
        with torch.no_grad(), self.autocast():
            said = self.teacher(samples)
        said = said.float()  # B, classes
        if self.kind == "hard":
            distillation = F.cross_entropy(distilled, said.argmax(dim=1))
        else:
            log_p, log_q = (F.log_softmax(x / self.tau, dim=1) for x in (distilled, said))
            distillation = F.kl_div(log_p, log_q, reduction="sum", log_target=True) * self.tau**2 / distilled.numel()
        return base * (1 - self.alpha) + distillation * self.alpha
