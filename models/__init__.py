"""Importing this package registers DHVT, EViT and the baselines with timm."""

from models import baselines, dhvt, evit

__all__ = ["baselines", "dhvt", "evit"]
