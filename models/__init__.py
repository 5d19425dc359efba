"""Importing this package registers DHVT and EViT with timm."""

from models import dhvt, evit

__all__ = ["dhvt", "evit"]
