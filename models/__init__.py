"""Importing this package registers our models with timm."""

from models import dhvt

__all__ = ["dhvt"]
