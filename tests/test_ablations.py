"""The paper's ablations: each row of its tables against counts by hand, a plain reference and DeiT, and whole runs."""

import json
from functools import partial
from typing import NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
from golden import formula
from timm.optim import param_groups_weight_decay
from timm.utils import reparameterize_model
from torch import Tensor, nn

import engine
import export
import main
from models.build import build_model, init_from_checkpoint, load_trained
from util.config import ModelConfig
from util.errors import InputError

TINY = "dhvt_tiny_cifar_patch4"
SMALL = "dhvt_small_cifar_patch4"
WIDTHS = {TINY: 192, SMALL: 384}
DEIT = {"sope": False, "daff": False, "head_tokens": False, "pos_embed": "learn"}
DHVT = {
    "sope": True,
    "daff": True,
    "head_tokens": True,
    "pos_embed": "none",
    "affine": True,
    "shortcut": True,
    "aggregate": "cls",
    "sope_norm": "bn",
    "daff_norm": "bn",
    "ffn": "mlp",
}


class Row(NamedTuple):
    """A model of a table: its arguments, and its heads where they are not the variant's."""

    kwargs: dict
    name: str = TINY
    heads: int | None = None


def without_head_tokens(pos_embed: str, sope: bool, daff: bool) -> Row:
    return Row({"head_tokens": False, "pos_embed": pos_embed, "sope": sope, "daff": daff})


ROWS = {
    "5, abs. PE": Row(DEIT),
    "5, abs. PE, SOPE": without_head_tokens("learn", True, False),
    "5, abs. PE, DAFF": without_head_tokens("learn", False, True),
    "5, abs. PE, SOPE, DAFF": without_head_tokens("learn", True, True),
    "5, none": without_head_tokens("none", False, False),
    "5, SOPE": without_head_tokens("none", True, False),
    "5, DAFF": without_head_tokens("none", False, True),
    "5, SOPE, DAFF": without_head_tokens("none", True, True),
    "6, head tokens": Row(DEIT | {"head_tokens": True}),
    "6, DHVT": Row({}),
    "8, class token split off": Row(DEIT | {"ffn": "split"}),
    "8, and re-weighted": Row(DEIT | {"ffn": "split_aggregate"}),
    "8, average pooling": Row(DEIT | {"ffn": "split_avgpool"}),
    "9, all tokens": Row({"aggregate": "all"}),
    "9, no shortcut": Row({"shortcut": False}),
    "9, no re-weighting (ours)": Row({"aggregate": "none"}),
    "B.2.2, DHVT without affine maps": Row({"affine": False}),
    "B.2.2, ViT with SOPE without affine maps": Row(DEIT | {"sope": True, "affine": False}),
    "10, DeiT-T, 3 heads": Row(DEIT, heads=3),
    "10, DeiT-T, 4 heads": Row(DEIT, heads=4),
    "10, DHVT-T, 3 heads": Row({}, heads=3),
    "10, DHVT-T, 4 heads": Row({}, heads=4),
    "10, DHVT-S, 4 heads": Row({}, SMALL, 4),
    "10, DHVT-S, 6 heads": Row({}, SMALL, 6),
    "10, DHVT-S, 8 heads": Row({}, SMALL, 8),
    "11, BN-LN": Row({"daff_norm": "ln"}),
    "11, LN-BN": Row({"sope_norm": "ln"}),
    "11, LN-LN": Row({"sope_norm": "ln", "daff_norm": "ln"}),
}
# every value of every argument, for what takes longer
PARTS = [
    DEIT,
    DEIT | {"head_tokens": True, "ffn": "split"},
    {"daff": False, "ffn": "split_aggregate", "affine": False},
    {"sope": False, "daff": False, "ffn": "split_avgpool"},
    {"sope": False, "head_tokens": False, "aggregate": "all", "shortcut": False},
    {"pos_embed": "learn", "aggregate": "none", "sope_norm": "ln", "daff_norm": "ln"},
    {"daff_norm": "ln"},
]
all_rows = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
all_parts = pytest.mark.parametrize("kwargs", PARTS, ids=lambda kwargs: " ".join(f"{k}={v}" for k, v in kwargs.items()))


def create(kwargs: dict, **more) -> nn.Module:
    """Build two small blocks with random weights and statistics, in double precision and evaluation mode."""
    sizes = {"depth": 2, "embed_dim": 48, "num_heads": 4, "num_classes": 5}
    model = timm.create_model(TINY, **sizes | kwargs | more)
    model.load_state_dict({k: formula.tensor(k, tuple(v.shape)) for k, v in model.state_dict().items()})
    return model.double().eval()


def images(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


# parameters, counted by hand


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def count_parameters(kwargs: dict, C: int, h: int, patch: int = 4, patches: int = 64, classes: int = 100) -> int:
    """Count the weights of twelve blocks, an embedding and a head, from the paper's description."""
    a, D, d = DHVT | kwargs, 4 * C, C // h
    # patches of 4: convolutions to C / 2 and C channels, without biases, a norm after each
    total = 3 * patch**2 * C + C
    if a["sope"]:
        total = 9 * 3 * C // 2 + C + 9 * C // 2 * C + 2 * C
    if a["sope"] and a["affine"]:
        total += 2 * 3 + 2 * C
    if a["pos_embed"] == "learn":
        total += (1 + patches) * C
    block = 2 * 2 * C + linear(C, 3 * C) + linear(C, C)  # two norms, queries, keys and values, projection
    if a["head_tokens"]:
        block += h * C + linear(d, C) + 2 * d
    block += linear(C, D) + linear(D, C)  # DAFF's point-wise convolutions have as many
    if a["daff"]:
        block += 9 * D + D + 2 * (D + D + C)  # depth-wise convolution, norms
    if (a["daff"] and a["aggregate"] != "none") or a["ffn"] == "split_aggregate":
        block += linear(C, C // 4) + linear(C // 4, C)
    return total + C + 12 * block + 2 * C + linear(C, classes)  # class token, blocks, norm, head


@all_rows
def test_parameters_are_those_counted_by_hand(row):
    heads = {"num_heads": row.heads} if row.heads else {}
    with torch.device("meta"):
        model = timm.create_model(row.name, **row.kwargs, **heads)
    count = sum(p.numel() for p in model.parameters())
    assert count == count_parameters(row.kwargs, WIDTHS[row.name], model.blocks[0].attn.num_heads)


# outputs and a training step, by a plain reference


class Plain:
    """A model written out for its weights and arguments, with neither modules nor names from models/."""

    def __init__(self, model: nn.Module, kwargs: dict, grid: tuple[int, int], h: int, train: bool) -> None:
        self.w = dict(model.named_buffers()) | dict(model.named_parameters())
        self.a, self.grid, self.h, self.train = DHVT | kwargs, grid, h, train

    def linear(self, key: str, x: Tensor) -> Tensor:
        return x @ self.w[f"{key}.weight"].T + self.w[f"{key}.bias"]

    def layer_norm(self, key: str, x: Tensor, eps: float = 1e-6) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * self.w[f"{key}.weight"] + self.w[f"{key}.bias"]

    def norm(self, key: str, x: Tensor, kind: str) -> Tensor:
        """Normalise [B, C, H, W]: each channel over the batch, or each place over its channels."""
        x = x.permute(0, 2, 3, 1)
        if kind == "ln":
            return self.layer_norm(key, x).permute(0, 3, 1, 2)
        if self.train:
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2), correction=0)
        else:
            mean, var = self.w[f"{key}.running_mean"], self.w[f"{key}.running_var"]
        x = (x - mean) / (var + 1e-5).sqrt() * self.w[f"{key}.weight"] + self.w[f"{key}.bias"]
        return x.permute(0, 3, 1, 2)

    def affine(self, key: str, x: Tensor) -> Tensor:
        return x * self.w[f"{key}.alpha"] + self.w[f"{key}.beta"] if self.a["affine"] else x

    def embed(self, x: Tensor) -> Tensor:
        w = self.w
        if not self.a["sope"]:
            key = "patch_embed.proj"
            p = w[f"{key}.weight"].shape[-1]
            H, W = self.grid
            # pixels of each patch, and a matrix product
            x = x.reshape(2, 3, H, p, W, p).permute(0, 2, 4, 1, 3, 5).reshape(2, H * W, 3 * p * p)
            return x @ w[f"{key}.weight"].flatten(1).T + w[f"{key}.bias"]
        x = self.affine("patch_embed.pre_affine", x)
        convolutions = sorted(k.removesuffix(".0.weight") for k in w if k.startswith("patch_embed.proj."))
        for i, key in enumerate(k for k in convolutions if k.count(".") == 2):
            x = F.gelu(x) if i else x
            x = self.norm(f"{key}.1", F.conv2d(x, w[f"{key}.0.weight"], stride=2, padding=1), self.a["sope_norm"])
        return self.affine("patch_embed.post_affine", x).flatten(2).transpose(1, 2)

    def attention(self, key: str, x: Tensor) -> Tensor:
        B, N, C = x.shape
        h, d = self.h, C // self.h
        if self.a["head_tokens"]:
            t = self.linear(f"{key}.ht_proj", x.mean(1).reshape(B, h, d)).reshape(B, h, h, d)
            t = F.gelu(self.layer_norm(f"{key}.ht_norm", t, 1e-5)).reshape(B, h, C)
            x = torch.cat([x, t + self.w[f"{key}.pos_embed"]], dim=1)
        heads = self.linear(f"{key}.qkv", x).reshape(B, -1, 3, h, d)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        x = ((q @ k.mT / d**0.5).softmax(-1) @ v).transpose(1, 2).reshape(B, -1, C)
        x = self.linear(f"{key}.proj", x)
        if self.a["head_tokens"]:
            x = torch.cat([x[:, :1] + x[:, N:].mean(1, keepdim=True), x[:, 1:N]], dim=1)
        return x

    def weights(self, key: str, patches: Tensor) -> Tensor:
        x = F.gelu(self.linear(f"{key}.compress", patches.mean(1, keepdim=True)))
        return self.linear(f"{key}.excitation", x)

    def ffn(self, key: str, x: Tensor) -> Tensor:
        kind = self.a["ffn"]
        cls, patches = x[:, :1], x[:, 1:]
        hidden = F.gelu(self.linear(f"{key}.fc1", x if kind == "mlp" else patches))
        if kind == "split_avgpool":
            # the mean of nine shifted maps with zeros around them
            H, W = self.grid
            maps = F.pad(hidden.reshape(2, H, W, -1), (0, 0, 1, 1, 1, 1))
            hidden = sum(maps[:, i : i + H, j : j + W] for i in range(3) for j in range(3)).flatten(1, 2) / 9
        x = self.linear(f"{key}.fc2", hidden)
        if kind == "split_aggregate":
            cls = cls * self.weights(key, x)
        return x if kind == "mlp" else torch.cat([cls, x], dim=1)

    def daff(self, key: str, x: Tensor) -> Tensor:
        w, kind = self.w, self.a["daff_norm"]
        cls, x = x[:, :1], x[:, 1:].transpose(1, 2).unflatten(2, self.grid)
        s = F.gelu(self.norm(f"{key}.bn1", F.conv2d(x, w[f"{key}.conv1.weight"], w[f"{key}.conv1.bias"]), kind))
        x = F.conv2d(s, w[f"{key}.conv2.weight"], w[f"{key}.conv2.bias"], padding=1, groups=s.shape[1])
        x = F.gelu(self.norm(f"{key}.bn2", x, kind)) + (s if self.a["shortcut"] else 0)
        x = self.norm(f"{key}.bn3", F.conv2d(x, w[f"{key}.conv3.weight"], w[f"{key}.conv3.bias"]), kind)
        x = x.flatten(2).transpose(1, 2)
        if self.a["aggregate"] == "none":
            return torch.cat([cls, x], dim=1)
        weights = self.weights(key, x)
        return torch.cat([cls * weights, x * weights if self.a["aggregate"] == "all" else x], dim=1)

    def __call__(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = torch.cat([self.w["cls_token"].expand(2, -1, -1), x], dim=1)
        if self.a["pos_embed"] == "learn":
            x = x + self.w["pos_embed"]
        for i in range(2):
            x = x + self.attention(f"blocks.{i}.attn", self.layer_norm(f"blocks.{i}.norm1", x))
            feed_forward = self.daff if self.a["daff"] else self.ffn
            x = x + feed_forward(f"blocks.{i}.mlp", self.layer_norm(f"blocks.{i}.norm2", x))
        return self.layer_norm("norm", x)


@all_rows
def test_outputs_and_a_training_step_are_those_of_a_plain_reference(row):
    model = create(row.kwargs, img_size=(12, 20), num_heads=row.heads or 4)
    x = images(12, 20)
    plain = partial(Plain, model, row.kwargs, (3, 5), row.heads or 4)
    with torch.no_grad():
        close(model.forward_features(x), plain(train=False)(x))
        close(model(x), model.head(plain(train=False)(x)[:, 0]))

    # gradients in training mode, of all tokens, and an update along them
    target = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parameters = dict(model.named_parameters())
    del parameters["head.weight"], parameters["head.bias"]

    def loss(tokens: Tensor) -> Tensor:
        return (tokens - target).square().mean()

    expected = torch.autograd.grad(loss(plain(train=True)(x)), list(parameters.values()))
    before = loss(model.train().forward_features(x))
    before.backward()
    for (key, p), gradient in zip(parameters.items(), expected, strict=True):
        close(p.grad, gradient, msg=key)
    torch.optim.SGD(parameters.values(), lr=1e-3).step()
    assert loss(model.forward_features(x)) < before


@torch.no_grad()
def test_patch_size_8_has_three_convolutions_and_64_patches_of_64_pixels():
    model = create({}, patch_size=8, img_size=64)
    widths = [m.out_channels for m in model.patch_embed.modules() if isinstance(m, nn.Conv2d)]
    assert widths == [12, 24, 48] and model.patch_embed.grid_size == (8, 8)
    close(model.forward_features(images(64, 64)), Plain(model, {}, (8, 8), 4, train=False)(images(64, 64)))


# DeiT


def no_decay(model: nn.Module) -> set[str]:
    """Return the names of the matrices without weight decay."""
    names = {p: key for key, p in model.named_parameters()}
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    return {names[p] for p in groups[0]["params"] if p.ndim > 1}


def dropout(model: nn.Module) -> dict[str, float]:
    return {key: m.p for key, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p}


@pytest.mark.parametrize("size", [224, (32, 48)])
def test_without_any_part_it_is_timms_deit(size):
    same = {"img_size": size, "patch_size": 16, "embed_dim": 48, "num_heads": 3, "num_classes": 7, "depth": 2}
    same |= {"proj_drop_rate": 0.2, "pos_drop_rate": 0.1}
    model = create(DEIT, **same)
    deit = timm.create_model("deit_tiny_patch16_224", **same).double().eval()
    assert list(model.state_dict()) == list(deit.state_dict())
    deit.load_state_dict(model.state_dict())
    x = images(*model.patch_embed.img_size)
    with torch.no_grad():
        close(model(x), deit(x), rtol=0, atol=1e-12)
    assert dropout(model) == dropout(deit) != {}
    assert no_decay(model) == no_decay(deit) == {"cls_token", "pos_embed"}
    # Table 6's second row
    more = set(create(DEIT | {"head_tokens": True}, **same).state_dict()) - set(deit.state_dict())
    names = ("pos_embed", "ht_proj.weight", "ht_proj.bias", "ht_norm.weight", "ht_norm.bias")
    assert more == {f"blocks.{i}.attn.{name}" for i in range(2) for name in names}


@pytest.mark.parametrize("ffn", ["mlp", "split", "split_aggregate", "split_avgpool"])
def test_dropout_acts_on_the_patches_as_in_deit(ffn):
    model = create({"daff": False, "ffn": ffn, "proj_drop_rate": 1.0}).train()
    assert not model.blocks[0].mlp(torch.ones(2, 65, 48, dtype=torch.float64))[:, 1:].any()


def test_all_arguments_by_their_defaults_are_the_model_without_them():
    torch.manual_seed(0)
    model = timm.create_model(TINY, depth=1)
    torch.manual_seed(0)
    same = timm.create_model(TINY, depth=1, **DHVT)
    for (key, value), (other, expected) in zip(same.state_dict().items(), model.state_dict().items(), strict=True):
        assert key == other and torch.equal(value, expected)


def test_a_learned_embedding_is_not_decayed_and_the_head_embeddings_are():
    assert no_decay(create({"pos_embed": "learn"})) == {"cls_token", "pos_embed"}


# what serves any model serves these


@all_parts
def test_folding_and_compiling_change_no_output(kwargs):
    model, x = create(kwargs, depth=1), images(32, 32)
    folded = reparameterize_model(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    layer_norms = [key for key, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
    assert layer_norms == [key for key, m in folded.named_modules() if isinstance(m, nn.LayerNorm)]
    with torch.no_grad():
        expected = model(x)
        close(folded(x), expected)
        torch._dynamo.reset()
        model.compile(backend="eager", fullgraph=True)
        close(model(x), expected)


@all_parts
def test_macs_are_counted(kwargs):
    """Against a count by hand of matrix products and convolutions; torchprofile counts norm layers as well."""
    a, C, D, P, h = DHVT | kwargs, 48, 192, 64, 4
    N = 1 + P + (h if a["head_tokens"] else 0)
    total = 3 * 16 * C * P
    if a["sope"]:
        total = 27 * C // 2 * 4 * P + 9 * C // 2 * C * P
    total += 4 * C * C * N + 2 * N * N * C  # attention
    tokens = P if a["daff"] or a["ffn"] != "mlp" else 1 + P
    total += 2 * C * D * tokens + (9 * D * P if a["daff"] else 0)
    found = engine.count_macs(create(kwargs, depth=1), (32, 32))
    assert total / 1e9 < found < 1.06 * total / 1e9


def run(*words: str) -> int:
    base = "--device cpu --num_workers 0 --data-set DIGITS --no-repeated-aug --batch-size 256 --warmup-epochs 0"
    return main.main([*base.split(), "--aa", "none", *words])


@pytest.mark.parametrize(
    "arguments",
    [
        "sope=false daff=false head_tokens=false pos_embed=learn ffn=split_avgpool",
        "pos_embed=learn affine=false shortcut=false aggregate=none sope_norm=ln daff_norm=ln",
        "daff=false ffn=split_aggregate pos_embed=none",
    ],
)
def test_runs_resume_and_their_checkpoints_know_the_model(arguments, tmp_path, capsys):
    out = tmp_path / "run"
    words = f"--model {TINY} --input-size 16 --model-kwargs depth=1 embed_dim=32 num_heads=2 {arguments}".split()
    assert run(*words, "--epochs", "1", "--output_dir", str(out)) == 0
    assert run(*words, "--epochs", "2", "--output_dir", str(out), "--resume", "auto") == 0
    saved = torch.load(out / "checkpoint.pth")
    # "none" too is a name: timm leaves out an argument that is None
    given = dict(word.split("=") for word in arguments.split())
    kwargs = saved["config"]["kwargs"]
    assert {key: kwargs[key] for key in given} == {key: value != "false" and value for key, value in given.items()}
    assert saved["epoch"] == 1 and saved["model_ema"].keys() == saved["model"].keys()
    epochs = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]

    # without a flag that names the model, of the EMA
    capsys.readouterr()
    flags = f"--eval --use-ema --resume {out}/checkpoint.pth --device cpu --num_workers 0"
    assert main.main(flags.split()) == 0
    assert f"{epochs[-1]['test_ema_acc1']:.1f}" in capsys.readouterr().out

    # exported and loaded by timm, at another size too
    words = f"--checkpoint {out}/checkpoint.pth --out {tmp_path}/exported"
    assert export.main(words.split()) == 0
    trained = load_trained(out / "checkpoint.pth").model
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        loaded = timm.create_model(f"local-dir:{tmp_path}/exported", pretrained=True).eval()
        assert torch.equal(loaded(x), trained(x))
    larger = timm.create_model(f"local-dir:{tmp_path}/exported", pretrained=True, img_size=24)
    assert larger(torch.randn(1, 3, 24, 24)).shape == (1, 10)


@pytest.mark.parametrize("sope", [True, False])
def test_a_learned_embedding_is_resampled_at_another_size(sope, tmp_path):
    kwargs = {"sope": sope, "pos_embed": "learn"}
    before = create(kwargs, img_size=32)
    path = tmp_path / "model.pth"
    torch.save({"model": before.float().state_dict()}, path)
    grid = before.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (8, 8))
    grid = F.interpolate(grid, size=(10, 12), mode="bicubic").flatten(2).transpose(1, 2)
    expected = torch.cat([before.pos_embed[:, :1], grid], dim=1)

    model = create(kwargs, img_size=(40, 48)).float()
    init_from_checkpoint(model, str(path), use_ema=False)
    close(model.pos_embed, expected, rtol=1e-5, atol=1e-6)
    overlay = {"file": str(path), "num_classes": 5}
    sizes = {"depth": 2, "embed_dim": 48, "num_heads": 4, "num_classes": 5, "img_size": (40, 48)}
    model = timm.create_model(TINY, pretrained=True, pretrained_cfg_overlay=overlay, **sizes, **kwargs)
    close(model.pos_embed, expected, rtol=1e-5, atol=1e-6)
    model.set_input_size((24, 56))
    assert model(torch.randn(1, 3, 24, 56)).shape == (1, 5)


# combinations without meaning


@pytest.mark.parametrize(
    "kwargs",
    [
        {"sope": False, "affine": False},
        {"sope": False, "sope_norm": "ln"},
        {"daff": False, "shortcut": False},
        {"daff": False, "aggregate": "all"},
        {"daff": False, "daff_norm": "ln"},
        {"daff": True, "ffn": "split"},
        # no such values
        {"sope": "no"},
        {"pos_embed": "sine"},
        {"aggregate": "patches"},
        {"ffn": "conv"},
        {"sope_norm": "gn"},
    ],
)
def test_arguments_without_a_meaning_are_one_line_that_names_them(kwargs):
    with pytest.raises(InputError) as caught:
        build_model(ModelConfig(TINY, input_size=(32, 32), kwargs=kwargs))
    reason = str(caught.value).split(": ", 1)[1]
    assert "\n" not in str(caught.value)
    assert all(f"{name}={value}" in reason or f"{name}={not value}" in reason for name, value in kwargs.items())
