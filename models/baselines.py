"""What DHVT is compared with on small images: CNNs and CCT, as timm's models with other layers plugged in.

resnet18_cifar, resnet56_cifar: Deep Residual Learning for Image Recognition, arXiv 1512.03385. ResNet-56 is that of
section 4.2; ResNet-18 is the ImageNet model with section 4.2's stem, the usual variant for CIFAR.
wide_resnet28_10_cifar: Wide Residual Networks, arXiv 1605.07146, without dropout.
cct_7_3x1_32: Escaping the Big Data Paradigm with Compact Transformers, arXiv 2104.05704.
Published code: https://github.com/SHI-Labs/Compact-Transformers

Shape comments as in dhvt.py, without a class token: B images, N tokens, C channels, H x W pixels of a feature map.
"""

from functools import partial

from timm.layers import BatchNormAct2d, create_conv2d, get_device_dtype, trunc_normal_
from timm.models import ResNet, VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import Block, checkpoint_filter_fn
from torch import Tensor, nn

from models.dhvt import ConvEmbed

# timm adds the names of the models
__all__ = ["CCT", "CifarResNet", "CifarResNetV2"]


def keep_resolution(model: ResNet | ResNetV2, conv: str, pool: str) -> None:
    """Replace a stem that downsamples by 4, the modules named `conv` and `pool`, by one 3x3 convolution of stride 1."""
    channels = model.feature_info[0]["num_chs"]
    layer = nn.Conv2d(model.in_chans, channels, 3, padding=1, bias=False, **get_device_dtype(model))
    # as timm starts the other convolutions
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    model.set_submodule(conv, layer)
    model.set_submodule(pool, nn.Identity())
    for level in model.feature_info:
        level["reduction"] = max(1, level["reduction"] // 4)


class CifarResNet(ResNet):
    """timm's ResNet after a stem that keeps the images' size; three or four stages."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        keep_resolution(self, "conv1", "maxpool")
        # timm's methods go through four stages, and five levels of features
        if not hasattr(self, "layer4"):
            self.layer4 = nn.Sequential()
            self.feature_info.append({**self.feature_info[-1], "module": "layer4"})


class CifarResNetV2(ResNetV2):
    """timm's pre-activation ResNet after a stem that keeps the images' size."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        keep_resolution(self, "stem.conv", "stem.pool")
        # as in CifarResNet
        if len(self.stages) < 4:
            self.stages.append(nn.Sequential())
            self.feature_info.append({**self.feature_info[-1], "module": "stages.3"})


class PaddedBlock(BasicBlock):
    """timm's block with option A of arXiv 1512.03385: a shortcut to more channels has zeros for them, no projection."""

    def __init__(self, inplanes: int, planes: int, *args, **kwargs) -> None:
        super().__init__(inplanes, planes, *args, **kwargs)
        if self.downsample is not None:
            self.downsample = nn.Sequential(
                nn.MaxPool2d(1, self.stride),  # every second pixel
                nn.ZeroPad3d((0, 0, 0, 0, 0, planes - inplanes)),  # B, planes, H / 2, W / 2
            )


class ConvTokenizer(ConvEmbed):
    """CCT's tokenizer: a 3x3 convolution, ReLU and max pooling; images [B, in_chans, *, *] -> tokens [B, HW, C]."""

    def __init__(self, *, patch_size: int, in_chans: int, embed_dim: int, **kwargs) -> None:
        if patch_size != 2:
            raise ValueError(f"CCT-7/3x1 has patch size 2, not {patch_size}")
        super().__init__(patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, **kwargs)
        conv = nn.Conv2d(in_chans, embed_dim, 3, padding=1, bias=False, **get_device_dtype(self))
        nn.init.kaiming_normal_(conv.weight)
        # this replaces timm's single convolution
        self.proj = nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # B, HW, C


class SequencePool(nn.Module):
    """CCT's pooling: the mean of the tokens, weighted by the softmax of a linear map; [B, N, C] -> [B, C]."""

    def __init__(self, dim: int, **dd) -> None:
        super().__init__()
        self.score = nn.Linear(dim, 1, **dd)
        trunc_normal_(self.score.weight, std=0.02)
        nn.init.zeros_(self.score.bias)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.score(x).softmax(dim=1)  # B, N, 1
        return (weights.transpose(1, 2) @ x).squeeze(1)  # B, C


class CCTBlock(Block):
    """timm's block, but the MLP's shortcut begins after its norm, as in the published code."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(x + self.drop_path1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.mlp(x))


class CCT(VisionTransformer):
    """Convolutional tokenizer, position embedding, blocks, sequence pooling; arguments as timm's ViT."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs, class_token=False, embed_layer=ConvTokenizer, block_fn=CCTBlock)
        # this replaces timm's pooling by a learned query
        if self.global_pool == "map":
            self.attn_pool = SequencePool(self.embed_dim, **get_device_dtype(self))

    def init_weights(self, *args, **kwargs) -> None:
        super().init_weights(*args, **kwargs)
        # as published; timm starts it at 0.02
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.2)

    # without timm's argument attn_mask, so that FX can trace the forward pass
    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _cfg(**kwargs) -> dict:
    # crop ratio, mean and std are timm's defaults
    return {"num_classes": 100, "input_size": (3, 32, 32), "license": "apache-2.0", **kwargs}


default_cfgs = generate_default_cfgs(
    {
        "resnet18_cifar": _cfg(pool_size=(4, 4), first_conv="conv1", classifier="fc"),
        "resnet56_cifar": _cfg(pool_size=(8, 8), first_conv="conv1", classifier="fc"),
        "wide_resnet28_10_cifar": _cfg(pool_size=(8, 8), first_conv="stem.conv", classifier="head.fc"),
        "cct_7_3x1_32": _cfg(fixed_input_size=True, first_conv="patch_embed.proj.0", classifier="head"),
    }
)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-18 for 32 px: four stages of 64 to 512 channels."""
    model_args = {"block": BasicBlock, "layers": (2, 2, 2, 2), "zero_init_last": False}
    return build_model_with_cfg(CifarResNet, "resnet18_cifar", pretrained, **dict(model_args, **kwargs))


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-56 for 32 px: three stages of 16, 32 and 64 channels, shortcuts without parameters."""
    model_args = {
        "block": PaddedBlock,
        "layers": (9, 9, 9),
        "channels": (16, 32, 64),
        # only for its 2 x 8 channels: `keep_resolution` replaces the layers
        "stem_type": "deep",
        "stem_width": 8,
        "zero_init_last": False,
        "feature_cfg": {"feature_cls": "getter"},
    }
    return build_model_with_cfg(CifarResNet, "resnet56_cifar", pretrained, **dict(model_args, **kwargs))


@register_model
def wide_resnet28_10_cifar(pretrained: bool = False, **kwargs) -> CifarResNetV2:
    """WRN-28-10 for 32 px: three stages of pre-activation blocks, ten times as wide as ResNet-56's."""
    model_args = {
        "layers": (4, 4, 4),
        "channels": (160, 320, 640),
        "stem_chs": 16,
        "basic": True,
        "bottle_ratio": 1.0,
        "conv_layer": create_conv2d,
        "norm_layer": BatchNormAct2d,
        "feature_cfg": {"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
    }
    return build_model_with_cfg(CifarResNetV2, "wide_resnet28_10_cifar", pretrained, **dict(model_args, **kwargs))


@register_model
def cct_7_3x1_32(pretrained: bool = False, **kwargs) -> CCT:
    """CCT-7/3x1 for 32 px: seven blocks on 16 x 16 tokens."""
    model_args = {
        "patch_size": 2,
        "embed_dim": 256,
        "depth": 7,
        "num_heads": 4,
        "mlp_ratio": 2,
        "qkv_bias": False,
        "attn_drop_rate": 0.1,
        "global_pool": "map",
        "pretrained_filter_fn": partial(checkpoint_filter_fn, antialias=False),
        "feature_cfg": {"out_indices": 3, "feature_cls": "getter"},
    }
    return build_model_with_cfg(CCT, "cct_7_3x1_32", pretrained, **dict(model_args, **kwargs))
