"""Importing this package registers our models with timm."""

from models import dhvt, evit

__all__ = ["dhvt", "evit"]
