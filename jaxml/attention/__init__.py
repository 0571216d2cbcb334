"""Exact attention: one public function, `flash_attention`."""

from jaxml.attention.reference import flash_attention

__all__ = ["flash_attention"]
