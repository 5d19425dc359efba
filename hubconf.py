"""Entry points for torch.hub: torch.hub.load("FOLDER", "dhvt_tiny_imagenet_patch16", source="local", num_classes=7)."""

from typing import Any as _Any

import timm as _timm
from torch import nn as _nn

import models as _models

dependencies = ["torch", "timm"]
assert _models.dhvt and _models.evit  # they register the names below


def _build(name: str, pretrained: bool, kwargs: dict[str, _Any]) -> _nn.Module:
    if pretrained:
        raise ValueError(
            f"{name}: no weights were ever published, by the authors or here; train them with main.py, and load them "
            "by model.load_state_dict(torch.load('best_checkpoint.pth')['model'])"
        )
    return _timm.create_model(name, **kwargs)


def dhvt_tiny_cifar_patch4(pretrained: bool = False, **kwargs: _Any) -> _nn.Module:
    """DHVT-T for 32 px, patch 4, 100 classes."""
    return _build("dhvt_tiny_cifar_patch4", pretrained, kwargs)


def dhvt_small_cifar_patch4(pretrained: bool = False, **kwargs: _Any) -> _nn.Module:
    """DHVT-S for 32 px, patch 4, 100 classes."""
    return _build("dhvt_small_cifar_patch4", pretrained, kwargs)


def dhvt_tiny_cifar_patch2(pretrained: bool = False, **kwargs: _Any) -> _nn.Module:
    """DHVT-T for 32 px, patch 2, 100 classes."""
    return _build("dhvt_tiny_cifar_patch2", pretrained, kwargs)


def dhvt_small_cifar_patch2(pretrained: bool = False, **kwargs: _Any) -> _nn.Module:
    """DHVT-S for 32 px, patch 2, 100 classes."""
    return _build("dhvt_small_cifar_patch2", pretrained, kwargs)


def dhvt_tiny_domain_patch16(pretrained: bool = False, **kwargs: _Any) -> _nn.Module:
    """DHVT-T for 224 px, patch 16, 345 classes."""
    return _build("dhvt_tiny_domain_patch16", pretrained, kwargs)


def dhvt_small_domain_patch16(pretrained: bool = False, **kwargs: _Any) -> _nn.Module:
    """DHVT-S for 224 px, patch 16, 345 classes."""
    return _build("dhvt_small_domain_patch16", pretrained, kwargs)


def dhvt_tiny_imagenet_patch16(pretrained: bool = False, **kwargs: _Any) -> _nn.Module:
    """DHVT-T for 224 px, patch 16, 1000 classes."""
    return _build("dhvt_tiny_imagenet_patch16", pretrained, kwargs)


def dhvt_small_imagenet_patch16(pretrained: bool = False, **kwargs: _Any) -> _nn.Module:
    """DHVT-S for 224 px, patch 16, 1000 classes."""
    return _build("dhvt_small_imagenet_patch16", pretrained, kwargs)


def deit_tiny_patch16_shrink_base(pretrained: bool = False, **kwargs: _Any) -> _nn.Module:
    """EViT on DeiT-Tiny: base_keep_rate, fuse_token, drop_loc."""
    return _build("deit_tiny_patch16_shrink_base", pretrained, kwargs)


def deit_small_patch16_shrink_base(pretrained: bool = False, **kwargs: _Any) -> _nn.Module:
    """EViT on DeiT-Small: base_keep_rate, fuse_token, drop_loc."""
    return _build("deit_small_patch16_shrink_base", pretrained, kwargs)


def deit_base_patch16_shrink_base(pretrained: bool = False, **kwargs: _Any) -> _nn.Module:
    """EViT on DeiT-Base: base_keep_rate, fuse_token, drop_loc."""
    return _build("deit_base_patch16_shrink_base", pretrained, kwargs)
