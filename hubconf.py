"""Entry points for torch.hub: torch.hub.load("FOLDER", "dhvt_tiny_imagenet_patch16", source="local", num_classes=7).

No weights were ever published: train a model with main.py, then load its checkpoint into the model.
"""

import timm

import models

dependencies = ["torch", "timm"]

assert models  # it registers the names below
globals().update({name: timm.model_entrypoint(name) for name in timm.list_models(module=["dhvt", "evit"])})
