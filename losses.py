"""Training criteria, called as criterion(images, outputs, targets) -> loss; images are [B, C, H, W].

Distillation reference:
    Training data-efficient image transformers & distillation through attention, arXiv 2012.12877
    https://github.com/facebookresearch/deit
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ImageLoss(nn.Module):
    """`loss(outputs, targets)` in float32, with the signature of DistillationLoss: the images are ignored."""

    def __init__(self, loss: Callable) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, images: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(outputs.float(), targets)


class DistillationLoss(nn.Module):
    """Knowledge distillation: (1 - alpha) * base loss + alpha * distillation loss.

    Outputs are the logits of the student's class head and distillation head, each [B, classes]. The base loss,
    `base(outputs, targets)`, compares the class head with the targets. The distillation loss compares the distillation
    head with the teacher's logits for the same images: "hard" is the cross-entropy with the teacher's most likely
    class, "soft" is KL(teacher || student) at temperature `tau`, times tau^2 / (B * classes). "kd" is for students
    without a distillation head: both losses take the same logits [B, classes], and KL is times tau^2 / B, as
    in timm's LogitDistillationTask. All are computed in float32. The teacher stays in eval mode, gets no gradients and
    runs within `autocast()`.
    """

    def __init__(
        self,
        base: Callable,
        teacher: nn.Module,
        kind: str,
        alpha: float,
        tau: float,
        autocast: Callable = nullcontext,
    ) -> None:
        super().__init__()
        self.base = base
        self.teacher = teacher.requires_grad_(False).eval()
        self.kind = kind
        self.alpha = alpha
        self.tau = tau
        self.autocast = autocast

    def forward(self, images: Tensor, outputs: Tensor | tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        if self.kind == "kd":
            outputs = outputs, outputs
        class_logits, distillation_logits = (logits.float() for logits in outputs)
        # the class head learns from the labels
        base_loss = self.base(class_logits, targets)

        # the teacher sees the same images, mixed and augmented as they are
        with torch.no_grad(), self.autocast():
            teacher_logits = self.teacher(images).float()  # B, classes

        # the distillation head learns from the teacher
        if self.kind == "hard":
            distillation_loss = F.cross_entropy(distillation_logits, teacher_logits.argmax(dim=1))
        else:
            kl_divergence = F.kl_div(
                F.log_softmax(distillation_logits / self.tau, dim=1),
                F.log_softmax(teacher_logits / self.tau, dim=1),
                reduction="sum",
                log_target=True,
            )
            # DeiT's mean is over B * classes, timm's over B
            count = len(images) if self.kind == "kd" else distillation_logits.numel()
            distillation_loss = kl_divergence * self.tau**2 / count
        return base_loss * (1 - self.alpha) + distillation_loss * self.alpha
