"""Mixed precision on a stand-in for a GPU: fake CUDA tensors have shapes and dtypes, but no content."""

import copy

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import models
from models.evit import reorganise_tokens
from util.checkpoint import load_optimizer
from util.precision import Precision

assert models.evit  # registers the models
MODELS = {
    "dhvt_tiny_cifar_patch4": {"img_size": 32, "depth": 2},
    "deit_tiny_patch16_shrink_base": {"img_size": 64, "depth": 2, "drop_loc": (1,), "fuse_token": True},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_products_are_in_half_precision_and_layer_norms_and_weights_in_float32(name, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    # parameters cannot be changed to fake ones in place
    monkeypatch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
    model = timm.create_model(name, **MODELS[name])
    size = MODELS[name]["img_size"]
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cuda")
        images = torch.randn(2, 3, size, size, device="cuda")
        folded = reparameterize_model(model.eval())
        for network, context in ((model.train(), torch.enable_grad), (folded, torch.inference_mode)):
            found = record_dtypes(network)
            with context(), torch.autocast("cuda", dtype=dtype):
                logits = network(images)
            assert logits.device.type == "cuda" and logits.dtype == dtype
            assert found[nn.LayerNorm] == {torch.float32}
            assert found[nn.Linear] == {dtype} and found[nn.Conv2d] == {dtype}
            assert {p.dtype for p in network.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["dhvt_tiny_cifar_patch4", "deit_tiny_patch16_224", "deit_tiny_patch16_shrink_base"])
def test_a_placed_model_is_in_bf16_except_its_classifier(name):
    """Logits that are computed in bf16 tie; on a CPU its attention is two products and a softmax, not the fused one."""
    torch.manual_seed(0)
    arguments = {"img_size": 32, "patch_size": 4, "depth": 2, "embed_dim": 64, "num_heads": 2, "num_classes": 1000}
    if "shrink" in name:
        arguments["drop_loc"] = (1,)
    model = timm.create_model(name, **arguments).eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        expected = model(images)
        precision = Precision(torch.device("cpu"), torch.bfloat16)
        fused = {module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")}
        with precision.autocast():
            in_bf16 = model(images)
        placed = precision.place(copy.deepcopy(model))
        found = record_dtypes(placed.blocks)
        with precision.autocast():
            logits = placed(images)
    assert fused == {True} and not any(getattr(module, "fused_attn", False) for module in placed.modules())
    assert found[nn.Linear] == {torch.bfloat16} and logits.dtype == torch.float32
    assert list(placed.state_dict()) == list(model.state_dict())
    # bf16 has 8 bits: 2^-8 of the scale, summed over a few layers
    torch.testing.assert_close(logits, expected, atol=0.03 * expected.abs().max().item(), rtol=0)
    assert all(len(row.unique()) == 1000 for row in logits) and not all(len(row.unique()) == 1000 for row in in_bf16)


def test_the_step_of_an_optimizer_that_was_not_fused_goes_to_the_device_of_one_that_is():
    before = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(before.parameters())
    before(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fused = torch.optim.AdamW([torch.empty_like(p, device="cuda") for p in before.parameters()], fused=True)
        load_optimizer(fused, optimizer.state_dict(), "any")
        assert all(tensor.device.type == "cuda" for state in fused.state.values() for tensor in state.values())


def test_evits_fused_token_is_summed_in_float32():
    x = torch.randn(2, 65, 48).bfloat16()
    scores = torch.rand(2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        tokens, index = reorganise_tokens(x, scores, 40, True)
    weights = scores.scatter(1, index, 0.0).double()
    expected = torch.einsum("bn,bnc->bc", weights, x[:, 1:].double())
    torch.testing.assert_close(tokens[:, -1].double(), expected, atol=1e-5, rtol=1e-5)


def record_dtypes(model: nn.Module) -> dict[type, set[torch.dtype]]:
    """Return the dtypes that linear layers, convolutions and layer norms give from now on, by class."""
    found = {nn.Linear: set(), nn.Conv2d: set(), nn.LayerNorm: set()}
    for module in model.modules():
        for kind, dtypes in found.items():
            if isinstance(module, kind):
                module.register_forward_hook(lambda *call, dtypes=dtypes: dtypes.add(call[2].dtype))
    return found
