"""Entry points for torch.hub: torch.hub.load("FOLDER", "dhvt_tiny_imagenet_patch16", source="local", num_classes=7).

No weights were ever published: train a model with main.py, then load its checkpoint into the model.
"""

import timm

import models

dependencies = ["torch", "timm"]

names = timm.list_models(module=models.__all__)
globals().update({name: timm.model_entrypoint(name) for name in names})
